"""D2DMoE on the demo model, beside MoEfication and a ridge router with a fixed number of experts: loss against neurons that run.

The demo model gets ReLU in its FFNs and is trained on with the square Hoyer loss (``configs/train/d2dmoe_sparsify.yaml``), for a
few minutes where the paper takes thousands of GPU steps; beside it the dense model is trained on as long without either, which is what
its loss has to be compared with. Then both are converted with ``upcycle_moe``: D2DMoE's split with its norm routers and dynamic-k,
MoEfication's graph cut with its own routers, and D2DMoE's split with ridge routers; nothing is refitted, and nothing trained
afterwards. ``tau`` and top-k are changed at load time. Losses are of held-out documents, the mean of code and prose; calibration reads
documents of the side that is trained on.

    python -P tests/benchmarks/wrapped/d2d_demo.py --out docs/measured/d2d_demo.md
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import torch
from healing import DOMAINS, demo_texts, sampled
from torch.nn.functional import cross_entropy
from training_curves import trained, write_domains, write_page
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.files.locate import locate
from upcycle.recipe.conversion_recipe import read_recipe
from upcycle.verification.neurons_run import NeuronsRun

ROOT = Path(__file__).resolve().parents[3]
LENGTH, BATCH, EXPERTS, CALIBRATED = 256, 4, 36, 32768
WINDOWS = 48  # of every domain are measured on
TAUS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
TOP_K = (36, 32, 28, 24, 20, 16, 12, 9, 6)
NEAR = (0.01, 0.05, 0.1)  # nats above all experts on
HOYER, DENSE = "sparsified", "dense, trained on"


@dataclass(frozen=True)
class System:
    """How a dense model is converted, and what its routing rule is changed to."""

    title: str
    recipe: Mapping[str, Any]
    settings: tuple[dict[str, Any], ...]


_ONES = {"rule": "top_k", "scores": "ones", "normalized": False}
_TOP_K = tuple({"top_k": k} for k in TOP_K)
SYSTEMS = {
    "d2d": System(
        "D2DMoE: norm routers, dynamic-k",
        {**read_recipe(ROOT / "configs" / "convert" / "d2dmoe.yaml"), "experts": EXPERTS},
        tuple({"tau": tau} for tau in TAUS),
    ),
    "moefication": System(
        "MoEfication: its own routers, top-k",
        {**read_recipe(ROOT / "configs" / "convert" / "moefication.yaml"), "experts": EXPERTS, "top_k": EXPERTS // 4},
        _TOP_K,
    ),
    "ridge": System(
        "D2DMoE's split, ridge routers, top-k",
        {
            "method": "d2d",
            "experts": EXPERTS,
            "top_k": EXPERTS // 4,
            "router": "ridge",
            "routing": _ONES,
            "refit": "none",
        },
        _TOP_K,
    ),
}


@dataclass(frozen=True)
class Point:
    """One measurement: mean share of neurons, share of the FFN's FLOPs with the router's, loss in nats per token."""

    setting: str
    neurons: float
    flops: float
    loss: float


def training(data: Mapping[str, Any], steps: int, rate: float, hoyer: float | None) -> dict[str, Any]:
    """The recipe of a run from the demo model; ``hoyer`` is the coefficient, None: the dense model as it is."""
    schedule = {"kind": "cosine", "warmup": max(1, steps // 10), "floor": 0.1}
    stage: dict[str, Any] = {"name": "all", "steps": steps, "learning_rate": rate, "schedule": schedule}
    if hoyer is not None:
        losses = {"hoyer": {"coefficient": hoyer, "ramp": 0.5, "layers": "mean"}}
        stage |= {"name": "sparsify", "activation": "relu", "losses": losses}
    return {
        "model": str(locate("demo").path),
        "data": {**data, "validation": {"tokens": 4096}},
        "length": LENGTH,
        "global_batch": BATCH,
        "micro_batch": BATCH,
        "saving": {"every": 100, "keep": 1, "export": True},
        "log": {"validation": max(1, steps // 5)},
        "stages": [stage],
    }


def windows(texts: Mapping[str, Sequence[Sequence[str]]], tokenizer: Any) -> list[torch.Tensor]:
    """Token ids ``[WINDOWS, LENGTH]`` of held-out documents of every domain, spread over all of them."""
    found = []
    for domain in DOMAINS:
        ids = torch.tensor([i for text in texts[domain][1] for i in tokenizer(text)["input_ids"]])
        rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        found.append(rows[torch.linspace(0, len(rows) - 1, min(WINDOWS, len(rows))).long()])
    return found


@torch.no_grad()
def measured(folder: Path, text: Sequence[torch.Tensor], routing: Mapping[str, Any] | None = None) -> Point:
    """The loss of a model, and what of its FFNs ran."""
    more = {"routing": dict(routing)} if routing else {}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    running, losses = NeuronsRun(model, model.config.intermediate_size), []
    with running.counted():
        for rows in text:
            sums = [
                cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
                for ids in rows.split(8)
            ]
            losses.append(sum(sums) / (rows.numel() - len(rows)))
    shares = running.shares
    share = fmean(shares) if shares else 1.0
    routers = sum(weight.numel() for name, weight in model.named_parameters() if ".router." in name)
    dense = 3 * model.config.hidden_size * model.config.intermediate_size * model.config.num_hidden_layers
    setting = ", ".join(f"{key} {value:g}" for key, value in (routing or {}).items()) or "dense"
    return Point(setting, share, share + routers / dense, fmean(losses))


def table(title: str, points: Sequence[Point], dense: float) -> str:
    """Markdown; losses beside the parent's."""
    lines = [
        f"### {title}",
        "",
        "| setting | neurons that run | FFN FLOPs with the router | loss | above its dense parent |",
        "|---|---:|---:|---:|---:|",
    ]
    for point in points:
        above = point.loss - dense
        lines.append(f"| {point.setting} | {point.neurons:.1%} | {point.flops:.1%} | {point.loss:.4f} | {above:+.4f} |")
    return "\n".join(lines) + "\n"


def share_at(points: Sequence[Point], loss: float) -> str:
    """The least share of neurons at which a loss is kept, between measurements linearly."""
    ordered = sorted(points, key=lambda point: -point.neurons)
    if ordered[0].loss > loss:
        return "never"
    for more, less in pairwise(ordered):
        if less.loss > loss:
            part = (loss - more.loss) / (less.loss - more.loss)
            return f"{more.neurons - part * (more.neurons - less.neurons):.0%}"
    return f"{ordered[-1].neurons:.0%} or less"


def main() -> None:
    """Train, convert, measure, and print the tables; with ``--out`` they are written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help=f"of training, {LENGTH * BATCH} tokens each")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--hoyer", type=float, default=2e-3, help="coefficient of the Hoyer loss")
    parser.add_argument("--jobs", type=int, default=2, help="training runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="d2d-"))
    texts = demo_texts()
    data = write_domains(work / "text", texts)
    calibration = {
        "text": [str(path) for path in sampled(work / "text", texts)],
        "tokens": CALIBRATED,
        "window": LENGTH,
    }
    steps, rate = options.steps, options.rate
    runs = {
        f"hoyer-{options.hoyer:g}-{rate:g}-{steps}": training(data, steps, rate, options.hoyer),
        f"dense-{rate:g}-{steps}": training(data, steps, rate, None),
    }
    trained(runs, work / "runs", options.jobs)
    parents = dict(zip((HOYER, DENSE), (work / "runs" / name / "model" for name in runs), strict=True))
    text = windows(texts, load_tokenizer(locate("demo").path))
    start = measured(locate("demo").path, text).loss
    parts, summary = (
        [f"The demo model itself: {start:.4f} nats per token on {sum(map(torch.numel, text)):,} tokens.\n"],
        [],
    )
    for parent, folder in parents.items():
        dense = measured(folder, text).loss
        parts.append(f"## {parent}: {dense:.4f} nats\n")
        for name, system in SYSTEMS.items():
            out = work / f"{folder.parent.name}-{name}"
            shutil.rmtree(out, ignore_errors=True)
            keys = {**system.recipe, "calibration": calibration, "verification": {"enabled": False}}
            upcycle.convert(str(folder), out, target="upcycle_moe", **{k: v for k, v in keys.items() if k != "target"})
            points = [measured(out, text, setting) for setting in system.settings]
            parts.append(table(system.title, points, dense))
            summary.append((parent, system.title, *(share_at(points, dense + near) for near in NEAR)))
            print(parts[-1], file=sys.stderr, flush=True)
    heads = [f"within {near:g} nats" for near in NEAR]
    lines = [
        "## Least share of neurons, by how much loss is lost to the dense parent",
        "",
        "| parent | system | " + " | ".join(heads) + " |",
        "|---|---|" + "---:|" * len(heads),
        *("| " + " | ".join(row) + " |" for row in summary),
    ]
    said = "\n".join(["\n".join(lines) + "\n", *parts])
    print(said)
    if options.out:
        write_page(options.out, "D2DMoE on the demo model", "wrapped/d2d_demo.py", said)


if __name__ == "__main__":
    main()
