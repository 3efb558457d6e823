"""How long the shipped split recipes take, beside the dense parent and beside a statically pruned model of as many neurons.

SmolLM2-135M's shapes with random weights, in fp32 and on one thread unless told otherwise: reading 256 tokens, and writing one,
relative to the dense model, in turns, with transformers' kernels and with upcycle's. Less is faster.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
import yaml
from measure import Row, report

from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.evaluation.candidate_walk import Candidate
from upcycle.evaluation.compare_times import Timing, kept_neurons, shape_name, time_candidates
from upcycle.evaluation.shape_speed import OWN, STOCK
from upcycle.planning.expert_job import ExpertJob
from upcycle.planning.job import method_of
from upcycle.planning.prepare_experts import prepare_experts
from upcycle.planning.speed.predict import predicted_time
from upcycle.planning.speed.table import committed
from upcycle.progress import SILENT
from upcycle.recipe.conversion_recipe import parse_recipe

RECIPES = Path(__file__).resolve().parents[3] / "configs" / "convert"
# Of prefill and decode, with upcycle's kernels and with transformers': at most so much of the dense model's time.
TARGETS = {75: ((0.90, 0.90), (0.90, 0.97)), 50: ((0.80, 0.82), (0.85, 0.97)), 25: ((0.70, 0.70), (0.70, 0.97))}


def candidates_of(checkpoint: DenseCheckpoint, percents: list[int], layers: str | None = None) -> list[Candidate]:
    """Each recipe's shape, and static pruning to as many neurons."""
    found = []
    for percent in percents:
        content = yaml.safe_load((RECIPES / f"split_{percent}.yaml").read_text())
        content["layers"] = layers or content["layers"]
        recipe = parse_recipe({**content, "source": checkpoint.source.name}, f"split_{percent}")
        dense = (checkpoint.family, checkpoint.config, checkpoint.store.specs)
        job = prepare_experts(ExpertJob, recipe, method_of(recipe), *dense)
        found += [Candidate(job, percent / 100, f"{percent}", baseline) for baseline in (None, "static")]
    return found


def print_predictions(candidates: list[Candidate], timing: Timing, dtype: str) -> None:
    """Print what ``upcycle plan`` predicts beside what was measured, and how far it is off."""
    off = []
    for candidate in candidates:
        job, times = candidate.job, timing.times(candidate)
        assert times is not None
        shape, target = job.shape, job.target.name
        if candidate.baseline:
            shape, target = replace(shape, experts=0, shared=1, expert_size=kept_neurons(candidate)), job.family.name
        predicted = predicted_time(job.dense, shape, target, committed(dtype))
        for how in (STOCK,) if candidate.baseline else (OWN, STOCK):
            for part, found in times[how].items():
                said = predicted["relative"][how][part]
                off.append(abs(said / found - 1))
                what = f"{candidate.active:.0%} {candidate.baseline or how} {part}"
                print(f"{what}: predicted {said:.2f}x, measured {found:.2f}x, {said / found - 1:+.0%}")
    print(f"predictions are off by {median(off):.1%} in the median, {max(off):.1%} at worst, of {len(off)}")


def main() -> int:
    """Time what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--active", type=int, nargs="+", choices=TARGETS, default=list(TARGETS), help="percentages")
    parser.add_argument("--layers", help="those that are split, as the recipe key says it; default: the recipes'")
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time (default: 1)")
    parser.add_argument("--rounds", type=int, default=15, help="prompts that each model is timed with (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and states")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    smollm2 = [sys.executable, "-P", Path(__file__).resolve().parents[2] / "support" / "smollm2.py"]
    model = subprocess.run(smollm2, capture_output=True, text=True, check=True).stdout.split("\n")[-2]
    checkpoint = DenseCheckpoint.open(model, None)
    candidates = candidates_of(checkpoint, arguments.active, arguments.layers)
    timing = time_candidates(
        checkpoint, candidates, arguments.batch, SILENT, arguments.rounds, getattr(torch, arguments.dtype)
    )
    about = timing.about
    rows = []
    for candidate in candidates:
        percent, times = round(100 * candidate.active), timing.times(candidate)
        assert times is not None
        if candidate.baseline:
            found = times[STOCK]
            rows.append(
                Row(
                    f"{percent}% {shape_name(candidate)}", f"{found['prefill']:.2f}x", f"{found['decode']:.2f}x", "", ""
                )
            )
            continue
        for how, (prefill, decode) in zip((OWN, STOCK), TARGETS[percent], strict=True):
            found = times[how]
            passed = found["prefill"] <= prefill and found["decode"] <= decode
            target = f"at most {prefill:.2f}x, {decode:.2f}x"
            name = f"{percent}% {shape_name(candidate)}, {how}"
            rows.append(Row(name, f"{found['prefill']:.2f}x", f"{found['decode']:.2f}x", "", target, passed))
    title = (
        f"SmolLM2-135M's shapes, relative to dense ({about['prefill_seconds']:.2f} s and {about['decode_seconds']:.3f} s), "
        f"{about['threads']} threads, {about['instructions']}, {about['dtype']}, batch {about['batch']}"
    )
    status = report(title, ("prefill", "decode"), rows)
    print_predictions(candidates, timing, arguments.dtype)
    return status


if __name__ == "__main__":
    sys.exit(main())
