"""Training-free quality of the shipped split recipes on SmolLM2-135M, all 30 layers, against what they must beat.

For 75%, 50% and 25% of the neurons: ``configs/convert/split_NN.yaml``; ``static_prune`` to the same number of neurons with the
same refit (``--refit blocks`` trains both alike), also beside a dense first layer, as the splits have it; and at 50% CMoE's own
recipe (its split and router, no refit). What is compared sees the same calibration tokens, as many as the recipe asks for
(documentation, code and science in equal parts), and is measured on other documents of these kinds, and on news, a kind that
none was calibrated on; it is not in the mean. ``--oracle`` adds the limit of all routing.
``--calibration self`` calibrates on text that the model writes itself, ``mixed`` on as much of that as of the files.

First, the time of calibrating, splitting and refitting on 65,536 tokens is compared with one forward pass of the same
tokens, and its memory weighed (``--no-speed`` leaves that out, ``--no-quality`` the other).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
import yaml
from domains import DOMAINS, FOREIGN, texts
from measure import UPCYCLE, Row, mega, report, run

from upcycle.architectures.stock import load_tokenizer
from upcycle.calibration.own_text import with_own_text
from upcycle.calibration.read_tokens import tokens_of
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.evaluation.candidate_walk import Candidate, Texts, Walk, ratio
from upcycle.planning.expert_job import ExpertJob
from upcycle.planning.job import method_of
from upcycle.planning.prepare_experts import prepare_experts
from upcycle.planning.prune_job import PruneJob, prepare_pruning
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import parse_recipe
from upcycle.recipe.recipe_parts import CalibrationRecipe
from upcycle.text.mixture import mixed_windows

RECIPES = Path(__file__).resolve().parents[3] / "configs" / "convert"
TARGETS = {75: 1.10, 50: 1.28, 25: math.inf}
MOST_OF_CMOE, MOST_TIME, MOST_BYTES, SPEED_TOKENS = 0.6, 3.0, 2_500_000_000, 65536
RECIPE, STATIC, UNEVEN, CMOE = "recipe", "static pruning, same refit", "  beside a dense first layer", "CMoE, no refit"
EVALUATION_TOKENS = 4096  # per domain, unless asked otherwise

# One plain forward pass, in windows as the calibration reads them; prints its seconds.
FORWARD = """
import sys, time, torch
import upcycle.models.stock_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.randint(model.config.vocab_size, (int(sys.argv[2]) // 512, 512))
with torch.no_grad():
    model(ids[:1], use_cache=False)
    started = time.perf_counter()
    for batch in ids.split(8):
        model(batch, use_cache=False)
print(time.perf_counter() - started)
"""


class Lines(Progress):
    """Says on stderr how far it is."""

    done = 0

    def advance(self, steps: int = 1) -> None:
        """Count, and say so now and then."""
        self.done += steps
        if self.done % 30 == 0:
            print(f"{self.done} steps", file=sys.stderr, flush=True)


def candidates_of(
    checkpoint: DenseCheckpoint,
    tokens: int | None,
    percents: list[int],
    oracle: bool,
    calibration: list[Path],
    refit: str | None,
    layers: str | None,
) -> list[Candidate]:
    """The recipes and what they are compared with."""
    found = []
    for percent in percents:
        content = yaml.safe_load((RECIPES / f"split_{percent}.yaml").read_text())
        content["source"] = checkpoint.source.name
        content["calibration"] |= {"text": [str(path) for path in calibration]}
        if tokens:
            content["calibration"]["tokens"] = tokens
        content["refit"] = refit or content["refit"]
        content["layers"] = layers or content["layers"]
        pruned = prune_recipe(content, percent / 100)
        found.append(Candidate(pruning_job(checkpoint, pruned), percent / 100, STATIC))
        variants: list[tuple[str, str | None, dict]] = [(RECIPE, None, {})]
        if content["refit"] == "down":  # uneven layers: no stock dense model holds them, so that no job writes them
            variants.append((UNEVEN, "static", {}))
        if oracle:
            variants.append(("oracle routing, refit", "oracle", {"refit": "down"}))  # a bound in closed form
        if percent == 50:
            changes = {"method": "cmoe", "parameters": {}, "router": "representative", "refit": "none", "scale": "sum"}
            variants.append((CMOE, None, changes))
        for label, baseline, changes in variants:
            recipe = parse_recipe({**content, **changes}, label)
            job = prepare_experts(
                ExpertJob, recipe, method_of(recipe), checkpoint.family, checkpoint.config, checkpoint.store.specs
            )
            found.append(Candidate(job, percent / 100, label, baseline))
    return found


def prune_recipe(content: dict[str, Any], active: float) -> dict[str, Any]:
    """Return the recipe of a smaller dense model with as many neurons, made with the same text and the same refit."""
    kept = ("source", "calibration", "refit", "reconstruction", "seed", "dtype")
    return {key: content[key] for key in kept if key in content} | {"method": "static_prune", "active": active}


def pruning_job(checkpoint: DenseCheckpoint, content: dict[str, Any]) -> PruneJob:
    """Return the job of a pruning recipe."""
    recipe = parse_recipe(content, STATIC)
    parts = (checkpoint.family, checkpoint.config, checkpoint.raw_config, checkpoint.store.specs)
    return prepare_pruning(PruneJob, recipe, method_of(recipe), *parts)


def calibration_tokens(
    kind: str, checkpoint: DenseCheckpoint, contents: dict[str, str], count: int, window: int
) -> torch.Tensor:
    """Windows to calibrate on: of the files, written by the model itself, or half and half."""
    read = contents if kind != "self" else {}
    wanted = CalibrationRecipe(text=[*read, *([] if kind == "files" else ["self"])], tokens=count, window=window)
    windows, own = tokens_of(wanted, read, window, load_tokenizer(checkpoint.source.path), checkpoint, 0)
    if own:
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            windows, about = with_own_text(own, windows, checkpoint.source.path, Path(folder) / "written", Lines())
            print(f"the model wrote {own.windows * window:,} tokens in {time.process_time() - started:.0f} s: {about}")
    assert windows is not None
    return windows


def quality(model: Path, wanted: argparse.Namespace) -> int:
    """Measure all recipes side by side and print them; returns the exit code."""
    percents, kind = wanted.active, wanted.calibration
    calibration, evaluation = texts()
    _, (foreign,) = texts([FOREIGN])
    checkpoint = DenseCheckpoint.open(str(model), None)
    asked = (wanted.oracle, calibration, wanted.refit, wanted.layers)
    candidates = candidates_of(checkpoint, wanted.tokens, percents, *asked)
    if wanted.only_recipes:
        candidates = [candidate for candidate in candidates if candidate.label == RECIPE]
    window = candidates[0].job.recipe.calibration.window
    tokenizer = load_tokenizer(checkpoint.source.path)
    measured = {
        name: mixed_windows({name: path.read_text()}, tokenizer, wanted.evaluation_tokens, window)
        for name, path in zip((*DOMAINS, FOREIGN), (*evaluation, foreign), strict=True)
    }
    contents = {str(path): path.read_text() for path in calibration}
    looked_at: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        looked_at.setdefault(candidate.job.recipe.calibration.tokens, []).append(candidate)
    dense: list[float] = []
    for count, group in looked_at.items():
        given = Texts(calibration_tokens(kind, checkpoint, contents, count, window), measured)
        with tempfile.TemporaryDirectory() as folder:
            dense = Walk(checkpoint, "keep", given, Path(folder), Lines()).run(group)
    known = len(DOMAINS)
    ratios = {(round(100 * c.active), c.label): ratio(c.nats[:known], dense[:known]) for c in candidates}
    print(f"SmolLM2-135M; perplexity on {', '.join(measured)}:")
    print(f"calibrated on {kind}; dense: " + ", ".join(f"{math.exp(nats):.2f}" for nats in dense))
    for c in candidates:
        numbers = ", ".join(f"{math.exp(nats):.2f}" for nats in c.nats)
        captured = f", captured {sum(c.captured) / len(c.captured):.1%}" if c.captured and not c.baseline else ""
        mean = ratios[round(100 * c.active), c.label]
        about = f"{c.job.recipe.calibration.tokens:,} tokens, KL {c.kl:.3f}{captured}, {c.seconds:.0f} s"
        print(f"{c.active:.0%} {c.label}: {numbers} ({mean:.3f}x, {about})")
    rows = []
    for percent in percents:
        most, ours = TARGETS[percent], ratios[percent, RECIPE]
        static = min((ratios[percent, rival] for rival in (STATIC, UNEVEN) if (percent, rival) in ratios), default=None)
        target = f"at most {most:.2f}x" if math.isfinite(most) else ""
        passed = ours <= most if target else None
        rows.append(Row(f"{percent}% against dense", f"{ours:.3f}x", "1.000x", "", target, passed))
        if static is None:
            continue
        share = f"{ours / static:.2f}x"
        rows.append(
            Row(f"{percent}% against static", f"{ours:.3f}x", f"{static:.3f}x", share, "below 1.00x", ours < static)
        )
    if (50, CMOE) in ratios:
        ours, other = ratios[50, RECIPE], ratios[50, CMOE]
        passed, target = ours <= MOST_OF_CMOE * other, f"at most {MOST_OF_CMOE:.2f}x"
        rows.append(Row("50% against CMoE", f"{ours:.3f}x", f"{other:.3f}x", f"{ours / other:.2f}x", target, passed))
    return report("perplexity relative to dense, geometric mean over domains", ("recipe", "other"), rows)


def speed(model: Path) -> int:
    """Time the whole calibrated conversion against one forward pass; returns the exit code."""
    calibration, _ = texts()
    with tempfile.TemporaryDirectory() as folder:
        forward = subprocess.run(
            [sys.executable, "-P", "-c", FORWARD, str(model), str(SPEED_TOKENS)],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds = float(forward.stdout.split()[-1])
        command: Sequence[str | Path] = (
            *(
                UPCYCLE,
                "convert",
                RECIPES / "split_50.yaml",
                Path(folder) / "out",
                "--source",
                model,
                "--no-verify",
                "--quiet",
            ),
            *("--calibration", ",".join(map(str, calibration)), "--calibration-tokens", str(SPEED_TOKENS)),
        )
        cost = run(command)
    recipe = RECIPES / "split_50.yaml"
    planned = [UPCYCLE, "plan", recipe, "--source", model, "--calibration-tokens", str(SPEED_TOKENS), "--json"]
    printed = subprocess.run(list(map(str, planned)), capture_output=True, text=True, check=True).stdout
    forecast = json.loads(printed)["peak_memory_bytes"]
    rows = [
        Row(
            "calibrate, split, refit",
            f"{cost.seconds:.0f} s",
            f"{seconds:.0f} s",
            f"{cost.seconds / seconds:.2f}x",
            f"at most {MOST_TIME:.2f}x",
            cost.seconds <= MOST_TIME * seconds,
        ),
        Row("peak memory", mega(cost.peak_bytes), "", "", f"below {mega(MOST_BYTES)}", cost.peak_bytes < MOST_BYTES),
        Row("  as upcycle plan forecasts it", mega(forecast), "", f"{cost.peak_bytes / forecast:.2f}x", ""),
    ]
    return report(f"SmolLM2-135M, {SPEED_TOKENS:,} tokens, the whole command", ("upcycle", "one forward pass"), rows)


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="calibration tokens; default: the recipes'")
    parser.add_argument("--active", type=int, nargs="+", choices=TARGETS, default=list(TARGETS), help="percentages")
    parser.add_argument("--oracle", action="store_true", help="also run the limit of all routing")
    parser.add_argument("--refit", choices=("down", "blocks"), help="default: the recipes'")
    parser.add_argument("--layers", help="those that are split, as the recipe key says it; default: the recipes'")
    parser.add_argument("--calibration", choices=("files", "self", "mixed"), default="files", help="default: files")
    parser.add_argument("--evaluation-tokens", type=int, default=EVALUATION_TOKENS, help="per domain  [default: 4096]")
    parser.add_argument("--only-recipes", action="store_true", help="nothing that they are compared with")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--no-quality", action="store_true")
    arguments = parser.parse_args()
    model = Path(
        subprocess.run(
            [sys.executable, "-P", Path(__file__).resolve().parents[2] / "support" / "smollm2.py"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")[-2]
    )
    code = 0 if arguments.no_speed else speed(model)
    return code | (0 if arguments.no_quality else quality(model, arguments))


if __name__ == "__main__":
    sys.exit(main())
