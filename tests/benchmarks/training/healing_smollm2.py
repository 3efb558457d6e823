"""SmolLM2-135M split to 50% of its neurons as ``configs/convert/split_50.yaml`` says, in fewer experts, which train faster, and
healed by its dense parent with the losses of ``configs/train/heal_distill.yaml``: how much of the gap between the split's loss and
the dense model's is closed after how many tokens, and perplexity on held-out documents of every domain, dense, split, and healed; and
on news, a kind that no run sees, which tells what a run forgets. Every number of ``--tokens`` is a run of its own, with a schedule of
that length, that learns from the parent alone, as shipped; every number of ``--with-text`` one that learns as much from the text
itself (``next_token: 1.0``). About 93 MB are downloaded once.

The model computes in bfloat16 where the CPU multiplies it natively (the optimizer keeps fp32 weights), and in fp32 elsewhere,
which takes longer; ``--dtype`` overrules. The page says which it was.

    python -P tests/benchmarks/training/healing_smollm2.py --tokens 200000 1600000 --with-text 200000 \
        --out docs/measured/healing_smollm2.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from math import exp
from pathlib import Path
from statistics import fmean, median
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import yaml
from domains import DOMAINS, FOREIGN, parted, texts
from healing import ROOT
from smollm2 import dense_folder
from training_curves import cosine, read_curve, validation_loss, write_domains, write_page

import upcycle
from upcycle.kernels.cpu.products import fast_natively
from upcycle.recipe.conversion_recipe import read_recipe
from upcycle.trainers.checkpoints.write import finished
from upcycle.trainers.run.loop import train
from upcycle.trainers.run.step_reports import read_log

LENGTH, BATCH = 512, 2
PIECES = 48
HELD_OUT = 8192
POINTS = 8  # validations of a run


def convert(source: Path, out: Path) -> Path:
    """The shipped recipe's split, calibrated on the domains' own text."""
    if not (out / "config.json").exists():
        shipped = read_recipe(ROOT / "configs" / "convert" / "split_50.yaml")
        calibration = {**shipped["calibration"], "text": [str(path) for path in texts()[0]]}
        told: dict[str, Any] = {**shipped, "source": str(source), "pieces": PIECES, "calibration": calibration}
        upcycle.convert(out=out, **{**told, "verification": {"enabled": False}})
    return out


def recipe(
    model: Path, output: Path, data: dict[str, Any], tokens: int, rate: float, dtype: str, text: float = 0.0
) -> dict[str, Any]:
    """As ``upcycle train`` takes it: the shipped recipe's losses, and the text's own; fitted routers are spared by themselves."""
    shipped = yaml.safe_load((ROOT / "configs" / "train" / "heal_distill.yaml").read_text(encoding="utf-8"))
    first = shipped["stages"][0]
    steps = -(-tokens // (LENGTH * BATCH))
    learned = {**first["distillation"], "next_token": text}
    stage = cosine(steps, rate, losses=first["losses"], distillation=learned)
    return {
        "model": str(model),
        "output": str(output),
        "data": {**data, "validation": {"tokens": HELD_OUT}},
        "length": LENGTH,
        "global_batch": BATCH,
        "micro_batch": BATCH,
        "dtype": dtype,
        "keep_memory": True,
        "stages": [{"name": "heal", **stage}],
        "saving": {"every": max(25, steps // 4), "keep": 1, "export": False},
        "log": {"validation": -(-steps // POINTS)},
    }


def healed(told: dict[str, Any]) -> tuple[dict[int, dict[str, float]], float]:
    """Losses of every domain by tokens trained on, and tokens a second of the median step."""
    run = Path(told["output"])
    if train(told).stopped:
        sys.exit(f"stopped by a signal; --work {run.parent} continues, and only then is there a table")
    speed = median(line["tokens_per_second"] for line in read_log(run / "log.jsonl") if line["kind"] == "step")
    return {tokens: dict(losses) for tokens, losses in sorted(read_curve(run).points.items())}, speed


def table(dense: dict[str, float], points: dict[int, dict[str, float]], unseen: list[float]) -> list[str]:
    """Perplexities at the end, of news, too (``unseen``: dense, split, healed), and the curve."""
    split, end = points[0], points[max(points)]

    def closed(losses: dict[str, float], domain: str) -> float:
        return (split[domain] - losses[domain]) / (split[domain] - dense[domain])

    lines = ["| domain | dense | split | healed | of the gap in loss closed |", "|---|---:|---:|---:|---:|"]
    for domain in DOMAINS:
        values = " | ".join(f"{exp(loss[domain]):.2f}" for loss in (dense, split, end))
        lines.append(f"| {domain} | {values} | {closed(end, domain):.0%} |")
    share = (unseen[1] - unseen[2]) / (unseen[1] - unseen[0])
    lines.append(f"| {FOREIGN} (no run sees it) | {' | '.join(f'{exp(loss):.2f}' for loss in unseen)} | {share:.0%} |")
    lines += ["", f"| tokens | {' | '.join(DOMAINS)} | mean |", "|---:|" + "---:|" * (len(DOMAINS) + 1)]
    for tokens, losses in points.items():
        shares = [closed(losses, domain) for domain in DOMAINS]
        if tokens:
            lines.append(f"| {tokens:,} | " + " | ".join(f"{share:.0%}" for share in (*shares, fmean(shares))) + " |")
    return lines


def main() -> None:
    """Convert, train, and print the tables; with ``--out`` they are written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[200_000], help="of each run (default: 200,000)")
    parser.add_argument("--rate", type=float, default=4e-4, help="learning rate (default: 4e-4)")
    parser.add_argument(
        "--with-text", type=int, nargs="*", default=[], help="likewise, of runs that learn the text, too"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="that the model computes in")
    parser.add_argument("--work", type=Path, help="keep the runs here, and continue them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dtype = options.dtype or ("bfloat16" if fast_natively(torch.bfloat16) else "float32")
    work = options.work or Path(tempfile.mkdtemp(prefix="healing-smollm2-"))
    source = dense_folder()
    data = write_domains(work / "text", {domain: parted(domain) for domain in DOMAINS})
    split = convert(source, work / "split")
    lines = [
        f"Learning rate {options.rate:g}, rows of {LENGTH} tokens, {BATCH} of them in a step, computed in {dtype}. Perplexity on "
        f"{HELD_OUT:,} held-out tokens of each domain; the gap is that of the split's loss to the dense model's.",
    ]
    foreign = write_domains(work / "foreign", {FOREIGN: parted(FOREIGN)})
    unseen: dict[Path, float] = {}
    dense: dict[str, float] = {}
    for tokens, text in [(each, 0.0) for each in options.tokens] + [(each, 1.0) for each in options.with_text]:
        run = work / (f"run-{tokens}" + (f"-text-{text:g}" if text else ""))
        told = recipe(split, run, data, tokens, options.rate, dtype, text)
        points, speed = healed(told)
        elsewhere = {**told, "data": {**foreign, "validation": {"tokens": HELD_OUT}}}
        models = source, split, finished(run)[-1]
        for model in models:
            if model not in unseen:
                unseen[model] = validation_loss(model, elsewhere)[FOREIGN]
        dense = dense or dict(validation_loss(source, told))  # on the same text in every run
        what = ", from the parent and the text" if text else ", from the parent alone"
        lines += [
            "",
            f"## {max(points):,} tokens{what}",
            "",
            f"The median step trained {speed:,.0f} tokens a second.",
            "",
        ]
        lines += table(dense, points, [unseen[model] for model in models])
    page = "\n".join(lines) + "\n"
    print(page)
    if options.out:
        write_page(options.out, "Healing SmolLM2-135M", "training/healing_smollm2.py", page)


if __name__ == "__main__":
    main()
