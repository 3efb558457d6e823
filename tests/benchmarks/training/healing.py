"""Healing the demo model after it was split to 50% of its neurons, from the split that ``upcycle compare`` recommends and from a
random one: plain continual pre-training (CPT), with the dense parent's distribution beside the text's next token, with the
parent's alone, routers first. The random split is also healed in closed form first, block by block (``router: ridge``,
``refit: down``, which the other split has been already), and then by the parent's distribution and hidden states; the tokens that
the fits read are counted as tokens of the run.

All see the same rows of CPython's documentation and source in the same order, on the side of the split the demo model was
trained on, and are measured on the other. The gap is that of the split's loss to the dense model's, mean of both domains; the
table says after how many tokens how much of it is closed, the mean of the seeds. All runs from one split have one learning
rate (``--rate`` for another, ``--runs`` and ``--splits`` for some of them), except from fitted weights, which larger steps undo.

    python -P tests/benchmarks/training/healing.py --out docs/measured/healing_demo.md --plot docs/images/healing_demo.png
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parent))

from training_curves import Curve, plot, trained, validation_loss, write_domains, write_page

import upcycle
from upcycle.files.locate import locate
from upcycle.recipe.conversion_recipe import read_recipe
from upcycle.trainers.demo.demo_text import demo_documents

ROOT = Path(__file__).resolve().parents[3]
SHARES = (0.5, 0.8, 0.9)
BALANCE = {"switch_balance": {"coefficient": 0.01}}
DISTILLED = {
    "CPT + distillation": {"logits": 1.0, "ffn": 1.0, "next_token": 1.0},
    "distillation alone": {"logits": 1.0, "ffn": 1.0, "next_token": 0.0},
}
FITTED_FIRST = "closed form, distillation"
FITTED = {"logits": 1.0, "hidden": 10.0, "next_token": 0.0}
FITTED_RATE, FITTED_ROUTER, FITTED_TOKENS = 2e-4, 1e-3, 16_384
RUNS = ("CPT", *DISTILLED, "router first, CPT", FITTED_FIRST)
DOMAINS = ("prose", "code")
LENGTH, BATCH = 256, 4
SAMPLE = 200_000  # characters of each domain


@dataclass(frozen=True)
class Split:
    """Where healing begins, the learning rate from there, its factor for routers, and how many tokens are trained on.

    Routers that were taught by conversion are cooled: an optimizer's usual step is many times their weights.
    """

    title: str
    rate: float
    router: float
    tokens: int


SPLITS = {
    "compared": Split("The split that compare recommends", 1e-4, 1e-3, 500_000),
    "random": Split("A random split", 1e-3, 1.0, 500_000),
}


def convert(kind: str, out: Path, samples: Sequence[Path]) -> Path:
    """``compared`` is the shipped recipe's, in fewer experts, which train faster; ``random`` cuts into 8, of which 4 run;
    ``fitted`` cuts into the same, and fits routers and down projections.

    ``samples`` are calibrated on: the embedded texts, which the recipe names, are among those measured on here.
    """
    if not (out / "config.json").exists():
        told: dict[str, Any] = {"source": "demo", "verification": {"enabled": False}}
        if kind == "compared":
            shipped = read_recipe(ROOT / "configs" / "convert" / "split_50.yaml")
            calibration = {**shipped["calibration"], "text": [str(path) for path in samples]}
            told = {**shipped, "pieces": 24, "calibration": calibration, **told}
        else:
            told |= {"method": "random_split", "experts": 8, "top_k": 4}
        if kind == "fitted":
            text = [str(path) for path in samples]
            told["calibration"] = {"text": text, "tokens": FITTED_TOKENS, "window": LENGTH}
            told |= {"router": "ridge", "refit": "down"}
        upcycle.convert(out=out, **told)
    return out


def demo_texts() -> dict[str, list[list[str]]]:
    """The documents of every domain: those that the demo model was trained on, and those that it was not."""
    sides = demo_documents()
    return {domain: [[each.text for each in side if each.domain == domain] for side in sides] for domain in DOMAINS}


def sampled(folder: Path, texts: Mapping[str, Sequence[Sequence[str]]]) -> list[Path]:
    """Text to calibrate on, of the side that is trained on: whole documents from all over it, by domain."""
    paths = []
    for domain, (training, _) in texts.items():
        wanted, taken = SAMPLE, []
        for text in sorted(training, key=lambda text: hashlib.sha256(text.encode()).hexdigest()):
            taken.append(text[:wanted])
            wanted -= len(taken[-1])
            if not wanted:
                break
        paths.append(folder / f"{domain}-sample.txt")
        paths[-1].write_text("\n\n".join(taken), encoding="utf-8")
    return paths


def stages(run: str, steps: int, rate: float, router: float) -> list[dict[str, Any]]:
    """The stages of a run; all runs are equally long."""
    schedule = {"kind": "cosine", "warmup": max(1, steps // 10), "floor": 0.1}
    everything: dict[str, Any] = {
        "name": "all",
        "steps": steps,
        "learning_rate": rate,
        "schedule": schedule,
        "losses": BALANCE,
        "rates": {"router": router},  # said, as routers that were taught are spared otherwise
    }
    if run == "CPT":
        return [everything]
    if run in DISTILLED:
        return [{**everything, "distillation": DISTILLED[run]}]
    if run == FITTED_FIRST:
        everything |= {"learning_rate": FITTED_RATE, "rates": {"router": FITTED_ROUTER}}
        return [{**everything, "distillation": FITTED}]
    first = steps // 10
    router_only: dict[str, Any] = {
        "name": "router",
        "train": ["router"],
        "steps": first,
        "learning_rate": 3 * rate,
        "losses": BALANCE,
        "rates": {"router": router},
    }
    schedule = {**schedule, "warmup": max(1, (steps - first) // 10)}
    return [router_only, {**everything, "steps": steps - first, "schedule": schedule}]


def recipe(data: Mapping[str, Any], seed: int, every: int) -> dict[str, Any]:
    """What all runs have in common; validated ``every`` so many steps."""
    return {
        "data": {**data, "validation": {"tokens": 4096}},
        "length": LENGTH,
        "global_batch": BATCH,
        "micro_batch": BATCH,
        "seed": seed,
        "saving": {"every": 25, "keep": 1, "export": False},
        "log": {"validation": every},
    }


def key(kind: str, run: str, seed: int, rate: float, steps: int) -> str:
    """The folder of a run."""
    return f"{kind} {run} {rate:g} {steps} {seed}".replace(" + ", "-").replace(", ", "-").replace(" ", "-")


def with_fits(curve: Curve, split: Mapping[str, float]) -> Curve:
    """A curve from fitted weights as one from the split: its tokens come behind those that were fitted on, which close nothing
    until the last is read.
    """
    return Curve(
        {0: split, FITTED_TOKENS - 1: split, **{FITTED_TOKENS + tokens: by for tokens, by in curve.points.items()}}
    )


def runs_from(kind: str, runs: Sequence[str]) -> list[str]:
    """Those that are made from a split: what is fitted has nothing to fit."""
    return [run for run in runs if kind == "random" or run != FITTED_FIRST]


def table(dense: float, curves: Mapping[str, Sequence[Curve]]) -> str:
    """Markdown; one line per run, means of the seeds."""
    converted = next(iter(curves.values()))[0].losses()[0][1]
    gap = converted - dense
    lines = [
        f"Dense {dense:.4f} nats per token, split {converted:.4f}: a gap of {gap:.4f}.",
        "",
        "| run | "
        + " | ".join(f"{share:.0%} closed after" for share in SHARES)
        + " | closed at the end | loss at the end |",
        "|---|" + "---:|" * (len(SHARES) + 2),
    ]
    for name, seeds in curves.items():
        cells = []
        for share in SHARES:
            found = [each.tokens_to(converted - share * gap) for each in seeds]
            reached = [tokens for tokens in found if tokens is not None]
            cells.append(f"{fmean(reached):,.0f} tokens" if len(reached) == len(found) else "never")
        last = fmean(each.losses()[-1][1] for each in seeds)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {(converted - last) / gap:.0%} | {last:.4f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Convert, train, and print the tables; with ``--out`` and ``--plot`` they are written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="of every run (default: the split's own)")
    parser.add_argument("--points", type=int, default=25, help="validations of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--rate", type=float, help="learning rate of all runs (default: the split's own)")
    parser.add_argument("--router", type=float, help="factor on the routers' rate (default: the split's own)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="healing-"))
    texts = demo_texts()
    data = write_domains(work / "text", texts)
    samples = sampled(work / "text", texts)
    told: dict[str, dict[str, Any]] = {}
    steps = {kind: -(-(options.tokens or SPLITS[kind].tokens) // (LENGTH * BATCH)) for kind in options.splits}
    for kind in options.splits:
        rate = options.rate or SPLITS[kind].rate
        for run, seed in product(runs_from(kind, options.runs), options.seeds):
            start = "fitted" if run == FITTED_FIRST else kind
            model = convert(start, work / start, samples)
            common = recipe(data, seed, max(1, steps[kind] // options.points))
            told[key(kind, run, seed, rate, steps[kind])] = {
                "model": str(model),
                **common,
                "stages": stages(run, steps[kind], rate, options.router or SPLITS[kind].router),
            }
    curves = trained(told, work / "runs", options.jobs)
    loss = fmean(validation_loss(locate("demo").path, next(iter(told.values()))).values())
    parts = []
    for kind in options.splits:
        rate = options.rate or SPLITS[kind].rate
        own = {
            run: [curves[key(kind, run, seed, rate, steps[kind])] for seed in options.seeds]
            for run in runs_from(kind, options.runs)
        }
        if FITTED_FIRST in own:
            split = validation_loss(work / kind, next(iter(told.values())))
            own[FITTED_FIRST] = [with_fits(each, split) for each in own[FITTED_FIRST]]
        router = options.router or SPLITS[kind].router
        told_rate = f"Learning rate {rate:g}" + ("" if router == 1 else f", {router:g} of it for routers")
        if FITTED_FIRST in own:
            told_rate += f" (from fitted weights {FITTED_RATE:g}, {FITTED_ROUTER:g} of it for routers)"
        head = f"{steps[kind] * LENGTH * BATCH:,} tokens. {told_rate}."
        parts.append(f"## {SPLITS[kind].title}\n\n{head} {table(loss, own)}")
        if options.plot:
            name = options.plot if kind == "compared" else options.plot.with_stem(f"{options.plot.stem}_{kind}")
            plot(name, f"Healing the demo model: {SPLITS[kind].title.lower()}", (*DOMAINS, None), own)
    text = "\n".join(parts)
    print(text)
    if options.out:
        write_page(options.out, "Healing the demo model", "training/healing.py", text)


if __name__ == "__main__":
    main()
