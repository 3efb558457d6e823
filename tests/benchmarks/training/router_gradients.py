"""Dense gradients of routers (DenseMixer) beside those of the chosen experts, at equal tokens and at equal time.

The demo model's FFNs become 16 clusters of neurons of which 4 run, behind random routers, and are healed on text that the demo model
has not seen (``growing.py`` says which): once as ever, once with ``control: {dense_gradients: true}``. All see the same rows in the
same order. Time is that of a step's forward and backward pass and update, by the processor's clock, which other work on the machine
does not change.

    python -P tests/benchmarks/training/router_gradients.py --out docs/measured/router_gradients.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from domains import parted
from growing import BATCH, KINDS, LENGTH
from training_curves import Curve, cosine, run_recipe, trained, write_domains, write_page

import upcycle
from upcycle.models.load import load_model
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.router_control import RouterControl
from upcycle.trainers.routing.stock_routers import moe_layers

ARMS: dict[str, dict[str, Any]] = {"chosen experts": {}, "all experts": {"dense_gradients": True}}
LOSSES = {"switch_balance": {"coefficient": 0.01}}
TIMED = 6  # steps, of which the first two do not count


def recipe(control: Mapping[str, Any], start: Path, seed: int, steps: int, rate: float, data: Any) -> dict[str, Any]:
    """A run, the same for both but for the control of its routers."""
    stage = cosine(steps, rate, losses=LOSSES, **({"control": dict(control)} if control else {}))
    return run_recipe(start, data, stage, (LENGTH, BATCH), validated=max(1, steps // 8), seed=seed)


def seconds(control: Mapping[str, Any], start: Path) -> float:
    """Processor time of a step of training."""
    torch.set_num_threads(1)
    model = load_model(start, torch.float32, training=True)
    controls = RouterControl(ControlParameters(**control))
    for layer in moe_layers(model):
        controls.attach(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(5, 4000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(TIMED):
        began = time.process_time()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(time.process_time() - began)
    return min(found[2:])


def loss_after(curve: Curve, tokens: float) -> float:
    """The mean loss after so many tokens, between measurements linearly."""
    points = curve.losses()
    for (before, above), (after, below) in pairwise(points):
        if tokens <= after:
            return above + (below - above) * max(0.0, tokens - before) / (after - before)
    return points[-1][1]


def main() -> int:
    """Convert, train, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=48, help=f"of training, {LENGTH * BATCH} tokens each")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="router-gradients-"))
    work.mkdir(parents=True, exist_ok=True)
    data = write_domains(work / "text", {kind: parted(domain) for kind, domain in KINDS.items()})
    start = work / "start"
    if not start.exists():
        told = {"method": "weight_kmeans", "experts": 16, "top_k": 4, "router": "random", "refit": "none"}
        upcycle.convert("demo", start, **told, verification={"enabled": False})
    runs = {
        (arm, seed): recipe(control, start, seed, options.steps, options.rate, data)
        for arm, control in ARMS.items()
        for seed in options.seeds
    }
    names = {key: f"{key[0].split()[0]}-{options.rate:g}-{options.steps}-{key[1]}" for key in runs}
    found = trained({names[key]: run for key, run in runs.items()}, work / "runs", options.jobs)
    times = {arm: seconds(control, start) for arm, control in ARMS.items()}
    total, first = options.steps * LENGTH * BATCH, next(iter(ARMS))
    lines = [
        f"| gradient of the router | start | after {total:,} tokens | seconds per step | after the first one's time for these |",
        "|---|---:|---:|---:|---:|",
    ]
    for arm in ARMS:
        curves = [found[names[arm, seed]] for seed in options.seeds]
        begin = fmean(curve.losses()[0][1] for curve in curves)
        end = fmean(curve.losses()[-1][1] for curve in curves)
        timed = fmean(loss_after(curve, total * times[first] / times[arm]) for curve in curves)
        lines.append(f"| {arm} | {begin:.4f} | {end:.4f} | {times[arm]:.2f} | {timed:.4f} |")
    text = (
        f"16 clusters of neurons, 4 per token, {options.steps} steps of {LENGTH * BATCH:,} tokens at a peak rate of {options.rate:g}, "
        f"seeds {', '.join(map(str, options.seeds))}; nats per token on held-out text, the mean of {' and '.join(KINDS)}.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print(text)
    if options.out:
        write_page(options.out, "Dense gradients of routers", "training/router_gradients.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
