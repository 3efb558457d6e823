"""Expert choice in a decoder: what it gains in training, and what its causal router keeps of that, beside top-k trained as long.

8 copies of every FFN of the demo model, of which 2 run for a token, in the mean, behind random routers: the recipe ``causal_choice``,
and the same by top-k. The text is new to the demo model: SciPy's docstrings and scikit-learn's code. One model is trained by top-k
with Switch's balance loss. In the other, experts choose the tokens of a row, while a router beside learns to predict whom; in the
last fifth of the steps the predictions route, and the rest of the model trains under them (``configs/train/causal_choice.yaml``).
Rates are those of a run of minutes, and the same for both. Losses are of held-out documents, the mean of code and prose.

    python -P tests/benchmarks/wrapped/causal_choice_demo.py --out docs/measured/causal_choice.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "training")]

import torch
from d2d_demo import BATCH, LENGTH, measured, training, windows
from domains import parted
from masked_growing import KINDS
from torch.nn.functional import cross_entropy
from training_curves import trained, write_domains, write_page
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.files.locate import locate
from upcycle.trainers.checkpoints.export import export
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.router_control import RouterControl
from upcycle.trainers.routing.router_records import capture

CHOICE, TOP_K = "causal_choice", "top_k"
COPIES: dict[str, Any] = {
    "method": "sparse_upcycling",
    "experts": 8,
    "router": "random",
    "target": "upcycle_moe",
    "verification": {"enabled": False},
}
CHOOSING = 2  # experts for a token, in the mean
ROUTED: dict[str, dict[str, Any]] = {
    TOP_K: {"top_k": CHOOSING},
    CHOICE: {"routing": {"rule": "causal_choice", "capacity_factor": CHOOSING}},
}


def stages(arm: str, steps: int, rate: float) -> list[dict[str, Any]]:
    """The stages of one arm's recipe, of ``steps`` steps together."""
    last = steps // 5

    def stage(name: str, count: int, rate: float, **more: Any) -> dict[str, Any]:
        schedule = {"kind": "cosine", "warmup": max(1, count // 10), "floor": 0.1}
        return {"name": name, "steps": count, "learning_rate": rate, "schedule": schedule, **more}

    if arm == TOP_K:
        return [stage("all", steps, rate, losses={"switch_balance": {"coefficient": 0.01}})]
    choosing = {"control": {"choice": "expert_choice"}, "losses": {"choice_prediction": {}}}
    return [stage("experts_choose", steps - last, rate, **choosing), stage("predicted", last, rate / 3)]


@torch.no_grad()
def chosen(folder: Path, text: Sequence[torch.Tensor]) -> float:
    """The loss of a model whose experts choose tokens of whole rows, as in training: no loss of anything that writes."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    control, losses = RouterControl(ControlParameters(choice="expert_choice")), []
    with capture(model, control):
        for rows in text:
            total = 0.0
            for ids in rows.split(8):
                control.rows(torch.ones_like(ids, dtype=torch.bool))
                logits = model(ids).logits[:, :-1].flatten(0, 1)
                total += cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
            losses.append(total / (rows.numel() - len(rows)))
    return fmean(losses)


def table(rows: Sequence[tuple[str, int, float, float]], dense: float) -> str:
    """Markdown."""
    lines = ["| | steps | neurons that run | loss | above the demo model |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {name} | {steps} | {run:.1%} | {loss:.4f} | {loss - dense:+.4f} |" for name, steps, run, loss in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Convert, train, measure and print the table; with ``--out`` it is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help=f"of training, {LENGTH * BATCH} tokens each")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--router-rate", type=float, default=5.0, help="factor on the learning rate of all routers")
    parser.add_argument("--jobs", type=int, default=2, help="training runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="causal-choice-"))
    texts = {kind: parted(domain) for kind, domain in KINDS.items()}
    data = write_domains(work / "text", texts)
    before = options.steps - options.steps // 5
    runs: dict[str, Mapping[str, Any]] = {}
    for arm, routing in ROUTED.items():
        start = work / f"{arm}-start"
        if not start.exists():
            upcycle.convert("demo", start, **COPIES, **routing)
        run = training(data, options.steps, options.rate, None)
        rates = {"rates": {"router": options.router_rate}}
        own = [{**stage, **rates} for stage in stages(arm, options.steps, options.rate)]
        saving = {"every": before, "keep": 3, "export": True}
        runs[arm] = {**run, "model": str(start), "stages": own, "saving": saving, "log": {"validation": before}}
    trained(runs, work / "runs", options.jobs)
    text = windows(texts, load_tokenizer(locate("demo").path))
    middle = work / "before-the-switch"
    export(work / "runs" / CHOICE / "checkpoints" / f"step-{before:08d}", middle, overwrite=True)
    ends = {arm: measured(work / "runs" / arm / "model", text) for arm in ROUTED}
    starts = {arm: measured(work / f"{arm}-start", text) for arm in ROUTED}
    switched = measured(middle, text)
    rows = [
        ("top-k, untrained", 0, starts[TOP_K].neurons, starts[TOP_K].loss),
        ("top-k", options.steps, ends[TOP_K].neurons, ends[TOP_K].loss),
        ("experts choose, untrained", 0, CHOOSING, chosen(work / f"{CHOICE}-start", text)),
        ("experts choose (looks ahead)", before, CHOOSING, chosen(middle, text)),
        ("the same model, causal router", before, switched.neurons, switched.loss),
        ("causal router, trained under it", options.steps, ends[CHOICE].neurons, ends[CHOICE].loss),
    ]
    dense = measured(locate("demo").path, text).loss
    said = f"The demo model itself: {dense:.4f} nats per token. Steps are of {LENGTH * BATCH:,} tokens.\n\n" + table(
        rows, dense
    )
    print(said)
    if options.out:
        write_page(options.out, "Expert choice in a decoder: the causal router", "wrapped/causal_choice_demo.py", said)


if __name__ == "__main__":
    main()
