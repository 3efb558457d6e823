"""Sparse upcycling against going on with the dense model, and against a Mixture-of-Experts from scratch: the same new text for all.

The demo model was made of CPython's own texts. The new text is prose it has not seen, SciPy's docstrings, and code it has not seen,
scikit-learn's without docstrings (``domains.py``), half each; other modules are held out. Three runs see the same rows in the same
order: the dense model continued (``dense``), 8 copies of every FFN of which 2 run (``upcycled``: ``sparse_upcycling``, losses as in
``configs/train/upcycle_cpt.yaml``), and the latter's architecture with random weights (``scratch``).

Both that start from the demo model try the same two learning rates on the first seed (``RATES``), and repeat the one that ends
best on the other seeds, which change the order of the text, the routers and the random weights. Two more dense runs say what the
same cost buys without experts: one is trained on as many more tokens as makes its FLOPs equal (products of the forward and the
backward pass, by the formulas of ``upcycle plan train``), one on as many as makes its processor time equal (steps of both, timed
in turns). Passes when the upcycled model ends below the dense one of equal tokens on both kinds of text, on every seed.

    python -P tests/benchmarks/training/growing.py --out docs/measured/growing_demo.md --plot docs/images/growing_demo.png
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from domains import parted
from training_curves import Curve, cosine, plot, run_recipe, trained, write_domains, write_page
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import upcycle
from upcycle.architectures.stock import load_stock_model
from upcycle.files.locate import locate
from upcycle.trainers.forecast.flops import training_flops
from upcycle.trainers.run.loop import train

KINDS = {"prose": "science", "code": "library"}
ARMS = {
    "dense": "dense, continued",
    "upcycled": "upcycled: 8 copies, 2 per token",
    "scratch": "the same MoE from scratch",
    "flops": "dense, equal FLOPs",
    "time": "dense, equal time",
}
DENSER = ("flops", "time")  # the dense run again, on more tokens
TIMED, TURNS = 6, 3  # steps of a turn, and turns of each
# What a trained model bears; the peak that the demo model itself was trained with.
RATES = {"dense": (1e-3,), "upcycled": (1e-3,), "scratch": (3e-3,), "flops": (1e-3,), "time": (1e-3,)}
LOSSES = {"switch_balance": {"coefficient": 0.01}, "router_z": {"coefficient": 0.001}}
LENGTH, BATCH = 256, 4


def model(arm: str, seed: int, work: Path) -> str:
    """Where a run starts."""
    if arm in ("dense", *DENSER):
        return "demo"
    out = work / f"{arm}-{seed}"
    if arm == "scratch":
        if not (out / "tokenizer.json").exists():  # written last
            shape = model("upcycled", seed, work)
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape), dtype=torch.float32).save_pretrained(
                out
            )
            AutoTokenizer.from_pretrained(shape).save_pretrained(out)
    elif not out.exists():
        upcycle.convert("demo", out, experts=8, top_k=2, seed=seed, verification={"enabled": False})
    return str(out)


def recipe(
    arm: str, rate: float, seed: int, steps: int, points: int, start: str, data: Mapping[str, Any]
) -> dict[str, Any]:
    """A run, the same for all but for where it starts, its learning rate and the losses of routers."""
    stage = cosine(steps, rate, losses={} if start == "demo" else LOSSES)
    return run_recipe(start, data, stage, (LENGTH, BATCH), validated=max(1, steps // points), saved=25, seed=seed)


def more_steps(steps: int, work: Path, data: Mapping[str, Any]) -> dict[str, int]:
    """Steps of every dense run: as many as the upcycled model's FLOPs, or its time, are worth."""
    starts = {arm: model(arm, 0, work) for arm in ("dense", "upcycled")}
    flops = {arm: training_flops(load_stock_model(locate(start).path), LENGTH).total for arm, start in starts.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in starts}
    for turn in range(TURNS):
        for arm, start in starts.items():
            told = recipe(arm, RATES[arm][0], 0, TIMED, 1, start, data)
            ended = [0.0]

            def step(line: str, ended: list[float] = ended) -> None:
                if line.startswith("train "):
                    ended.append(time.process_time())

            train({**told, "output": str(work / "timing" / f"{arm}-{turn}")}, step, restart=True)
            seconds[arm] += [after - before for before, after in pairwise(ended[2:])]  # the first ones allocate
    spent = {arm: median(found) for arm, found in seconds.items()}
    ratios = {"flops": flops["upcycled"] / flops["dense"], "time": spent["upcycled"] / spent["dense"]}
    return {arm: max(1, round(steps * ratio)) for arm, ratio in ratios.items()}


def ahead(curves: Mapping[str, Sequence[Curve]]) -> str:
    """By how much the upcycled model ends below every dense one."""
    lines = []
    for arm, what in {"dense": "tokens", "flops": "FLOPs", "time": "time"}.items():
        if arm in curves:
            pairs = zip(curves["upcycled"], curves[arm], strict=True)
            by = [dense.losses()[-1][1] - own.losses()[-1][1] for own, dense in pairs]
            word, least, most = ("ahead", min(by), max(by)) if fmean(by) >= 0 else ("behind", -max(by), -min(by))
            lines.append(
                f"- At equal {what}, the upcycled model is {word} by {abs(fmean(by)):.3f} nats ({least:.3f} to {most:.3f})."
            )
    return "\n".join(lines) + "\n"


def table(chosen: Mapping[str, float], curves: Mapping[str, Sequence[Curve]]) -> str:
    """Markdown: losses at the end by kind of text, as mean and range of the seeds."""
    lines = [f"| run | learning rate | tokens | {' | '.join(KINDS)} | mean |", "|---|" + "---:|" * (len(KINDS) + 3)]
    for arm, seeds in curves.items():
        cells = [f"{chosen[arm]:g}", f"{seeds[0].losses()[-1][0]:,}"]
        cells += [ranged([each.losses(kind)[-1][1] for each in seeds]) for kind in (*KINDS, None)]
        lines.append(f"| {ARMS[arm]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ranged(values: Sequence[float]) -> str:
    """``3.21 (3.20 to 3.22)``."""
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def grid(ends: Mapping[str, Mapping[float, float]]) -> str:
    """Markdown: where each learning rate ended."""
    found = {arm: ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in by.items()) for arm, by in ends.items()}
    return "\n".join(f"- {ARMS[arm]}: {text}" for arm, text in found.items()) + "\n"


def main() -> int:
    """Train, print, write; 1 when the dense model ends ahead somewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--points", type=int, default=5, help="validations of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-scratch", action="store_true", help="only what starts from the demo model")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="growing-"))
    work.mkdir(parents=True, exist_ok=True)
    data = write_domains(work / "text", {kind: parted(domain) for kind, domain in KINDS.items()})
    steps = -(-options.tokens // (LENGTH * BATCH))
    arms = [arm for arm in ARMS if arm != "scratch" or not options.no_scratch]
    steps_of = dict.fromkeys(arms, steps) | more_steps(steps, work, data)

    def runs(wanted: Sequence[tuple[str, float, int]]) -> list[Curve]:
        told = {
            f"{arm}-{rate:g}-{steps_of[arm]}-{seed}": recipe(
                arm, rate, seed, steps_of[arm], options.points, model(arm, seed, work), data
            )
            for arm, rate, seed in wanted
        }
        return list(trained(told, work / "runs", options.jobs).values())

    tried = [(arm, rate, options.seeds[0]) for arm in arms for rate in RATES[arm]]
    found = dict(zip(tried, runs(tried), strict=True))
    ends: dict[str, dict[float, float]] = {arm: {} for arm in arms}
    for (arm, rate, _), curve in found.items():
        ends[arm][rate] = curve.losses()[-1][1]
    chosen = {arm: min(by_rate, key=lambda rate: by_rate[rate]) for arm, by_rate in ends.items()}
    others = [(arm, chosen[arm], seed) for arm in arms for seed in options.seeds[1:]]
    found |= dict(zip(others, runs(others), strict=True))
    curves = {arm: [found[arm, chosen[arm], seed] for seed in options.seeds] for arm in arms}
    start = curves["dense"][0].losses()[0][1]
    seeds = ", ".join(map(str, options.seeds))
    text = (
        f"{steps * LENGTH * BATCH:,} tokens; nats per token, mean (range) of the seeds {seeds}; "
        f"the demo model starts at {start:.3f}.\n\n"
        f"{table(chosen, curves)}\n{ahead(curves)}\n"
        f"Where each learning rate ended, mean of both kinds, seed {options.seeds[0]}:\n\n{grid(ends)}"
    )
    print(text)
    if options.out:
        write_page(options.out, "Growing the demo model", "training/growing.py", text)
    if options.plot:
        named = {ARMS[arm]: seeds for arm, seeds in curves.items() if arm not in DENSER}
        plot(options.plot, "The demo model on new text: mean and range of the seeds", (*KINDS, None), named)
    pairs = zip(curves["upcycled"], curves["dense"], strict=True)
    below = all(ours.losses(kind)[-1][1] < dense.losses(kind)[-1][1] for ours, dense in pairs for kind in KINDS)
    print(f"upcycled below dense on both kinds of text and every seed: {'PASS' if below else 'FAIL'}")
    return int(not below)


if __name__ == "__main__":
    sys.exit(main())
