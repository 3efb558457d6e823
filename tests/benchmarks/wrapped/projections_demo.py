"""Experts of attention's projections (D2DMoE) on the demo model: how well MLPs imitate them, and loss against neurons that run.

Every q, k, v and o becomes a two-layer ReLU MLP with as many multiplications as the projection (or twice as many), trained alone on
the dense model's own states, and split into 8 experts with routers that predict norms. FFNs are split, too, and all their experts run:
they are exact, and what is lost is lost by attention. The square Hoyer loss, which makes the MLPs sparse while they learn, has several
coefficients. ``tau`` of the projections is changed at load time. Nothing is trained afterwards. Errors are of held-out calibration
tokens, relative to how far outputs are from their mean; losses are of held-out documents, the mean of code and prose.

    python -P tests/benchmarks/wrapped/projections_demo.py --out docs/measured/projections_demo.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "training")]

import torch
from d2d_demo import LENGTH, measured, windows
from healing import DOMAINS, sampled
from torch.nn.functional import cross_entropy
from training_curves import write_domains, write_page
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.files.locate import locate
from upcycle.trainers.demo.demo_text import demo_documents
from upcycle.verification.neurons_run import NeuronsRun

EXPERTS = 8
ARMS = ((1.0, 0.0), (1.0, 1.0), (2.0, 0.0))  # multiplications of the MLPs, coefficient of the Hoyer loss
TAUS = (0.0, 0.1, 0.3, 0.5)
BASE: dict[str, Any] = {
    "method": "d2d",
    "experts": 18,
    "target": "upcycle_moe",
    "routing": {"rule": "dynamic_k", "tau": 0},
    "router": {"name": "d2d_norms", "parameters": {"epochs": 10}},
    "refit": "none",
    "verification": {"enabled": False},
}


@torch.no_grad()
def share_and_loss(folder: Path, tau: float, text: Sequence[torch.Tensor]) -> tuple[float, float]:
    """The share of the projections' neurons that run at a tau, and the loss."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    for entry in config.replaced_ffns:
        if entry.get("projection"):
            entry["routing"]["tau"] = tau
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    running, losses = NeuronsRun(model, None, projections=True), []
    with running.counted():
        for rows in text:
            sums = [
                cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
                for ids in rows.split(8)
            ]
            losses.append(sum(sums) / (rows.numel() - len(rows)))
    return fmean(running.shares), fmean(losses)


def main() -> None:
    """Convert, measure and print the tables; with ``--out`` they are written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate on")
    parser.add_argument("--epochs", type=int, default=20, help="of imitating")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    imitated = ["| MLPs | projection | neurons | error | active neurons |", "|---|---|---:|---:|---:|"]
    ran = ["| MLPs | tau | neurons of projections that run | loss | above dense |", "|---|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory(prefix="projections-") as place:
        work, sides = Path(place), demo_documents()
        texts = {
            domain: [[each.text for each in side if each.domain == domain] for side in sides] for domain in DOMAINS
        }
        write_domains(work / "text", texts)
        calibration = {
            "text": [str(path) for path in sampled(work / "text", texts)],
            "tokens": options.tokens,
            "window": LENGTH,
        }
        text = [rows[::2] for rows in windows(texts, load_tokenizer(locate("demo").path))]
        dense = measured(locate("demo").path, text).loss
        for flops, hoyer in ARMS:
            name = f"{flops:g}x the multiplications, Hoyer {hoyer:g}"
            projections = {"experts": EXPERTS, "flops": flops, "hoyer": hoyer, "epochs": options.epochs}
            out = work / f"{flops}-{hoyer}"
            result = upcycle.convert("demo", out, **BASE, calibration=calibration, projections=projections)
            found = [one for layer in result.layers for one in layer["projections"]]
            for path in dict.fromkeys(one["path"] for one in found):
                some = [one for one in found if one["path"] == path]
                error, active = (fmean(one[key] for one in some) for key in ("error", "active"))
                imitated.append(f"| {name} | {path} | {some[0]['neurons']} | {error:.3f} | {active:.0%} |")
            for tau in TAUS:
                share, loss = share_and_loss(out, tau, text)
                ran.append(f"| {name} | {tau:g} | {share:.1%} | {loss:.4f} | {loss - dense:+.4f} |")
                print(ran[-1], file=sys.stderr, flush=True)
    said = (
        f"The demo model: {dense:.4f} nats per token on {sum(map(torch.numel, text)):,} tokens.\n\n## Imitation\n\n"
        "Means over layers.\n\n"
        + "\n".join(imitated)
        + "\n\n## Running some of the experts\n\n"
        + "\n".join(ran)
        + "\n"
    )
    print(said)
    if options.out:
        write_page(options.out, "Projections of attention as experts", "wrapped/projections_demo.py", said)


if __name__ == "__main__":
    main()
