"""D2DMoE whole, on the demo model: its FFNs are sparsified, then attention's projections imitated, both split, and all trained on.

1. The demo model gets ReLU in its FFNs and learns to use few neurons (``configs/train/d2dmoe_sparsify.yaml``).
2. Its FFNs are split, and every q, k, v and o becomes a two-layer ReLU MLP that imitates it and is split, too; the MLPs are made
   sparse while they learn, alone. The paper makes them first and sparsifies all together, which stock dense classes cannot hold.
3. The model of experts is trained on with dynamic-k at work, by the loss of the next token.

Losses, behind each step, are of held-out documents, the mean of code and prose, beside the sparsified model's, and beside that of
the same model after as much more training. ``tau`` is changed at load time.

    python -P tests/benchmarks/wrapped/sparse_attention_demo.py --out docs/measured/sparse_attention_demo.md
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
from d2d_demo import BATCH, LENGTH, measured, training, windows
from healing import demo_texts, sampled
from projections_demo import BASE
from torch.nn.functional import cross_entropy
from training_curves import trained, write_domains, write_page
from transformers import AutoConfig, AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.files.locate import locate
from upcycle.verification.neurons_run import NeuronsRun

FFN, ATTENTION = 0.05, 0.1  # tau while the model of experts is trained
TAUS = ((0.0, 0.0), (FFN, 0.0), (FFN, ATTENTION), (0.1, 0.2), (0.15, 0.3))  # of FFNs, of projections


@torch.no_grad()
def shares_and_loss(
    folder: Path, taus: tuple[float, float], text: Sequence[torch.Tensor]
) -> tuple[float, float, float]:
    """The share of the FFNs' neurons that run, that of the projections', and the loss."""
    config = AutoConfig.from_pretrained(folder)
    for entry in config.replaced_ffns:
        entry["routing"]["tau"] = taus[bool(entry.get("projection"))]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    ffns, attention = (NeuronsRun(model, None, projections=where) for where in (False, True))
    losses = []
    with ffns.counted(), attention.counted():
        for rows in text:
            sums = [
                cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
                for ids in rows.split(8)
            ]
            losses.append(sum(sums) / (rows.numel() - len(rows)))
    return fmean(ffns.shares), fmean(attention.shares), fmean(losses)


def main() -> None:
    """Train, convert, train on, and print the table; with ``--out`` it is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsify", type=int, default=300, help=f"steps of {LENGTH * BATCH} tokens")
    parser.add_argument("--steps", type=int, default=150, help="of training on, with experts and without")
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate on")
    parser.add_argument("--epochs", type=int, default=20, help="of imitating")
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="sparse-attention-"))
    texts = demo_texts()
    data = write_domains(work / "text", texts)
    trained({"sparsified": training(data, options.sparsify, 1e-3, 2e-3)}, work / "runs", 1)
    parent, split = work / "runs" / "sparsified" / "model", work / f"split-{options.tokens}-{options.epochs}"
    text = sampled(work / "text", texts)
    if not split.exists():
        keys = {**BASE, "routing": {"rule": "dynamic_k", "tau": FFN}, "verification": {"enabled": False}}
        asked = {"experts": 8, "hoyer": 1.0, "epochs": options.epochs, "tau": ATTENTION}
        calibration = {"text": [str(path) for path in text], "tokens": options.tokens, "window": LENGTH}
        upcycle.convert(str(parent), split, **keys, calibration=calibration, projections=asked)
    more = {**training(data, options.steps, 3e-4, None), "model": str(split)}
    still = {**training(data, options.steps, 3e-4, 2e-3), "model": str(parent)}
    trained({"experts": more, "parent": still}, work / "runs", 1)
    held = [rows[::2] for rows in windows(texts, load_tokenizer(locate("demo").path))]
    sparse, on = (measured(work / "runs" / name / "model", held).loss for name in ("sparsified", "parent"))
    lines = [
        f"The sparsified model: {sparse:.4f} nats per token, and {on:.4f} after {options.steps} more steps.\n",
        "| tau of FFNs, of projections | neurons of FFNs that run | of projections | loss | after training on | neurons, then |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for taus in TAUS:
        (ffns, attention, loss), (late_ffns, late, after) = (
            shares_and_loss(folder, taus, held) for folder in (split, work / "runs" / "experts" / "model")
        )
        above, left = f"{loss:.4f} ({loss - sparse:+.4f})", f"{after:.4f} ({after - on:+.4f})"
        shares = f"{ffns:.1%} | {attention:.1%}"
        lines.append(f"| {taus[0]:g}, {taus[1]:g} | {shares} | {above} | {left} | {late_ffns:.1%}, {late:.1%} |")
        print(lines[-1], file=sys.stderr, flush=True)
    said = "\n".join(lines) + "\n"
    print(said)
    if options.out:
        title = "D2DMoE whole: sparsify, then attention"
        write_page(options.out, title, "wrapped/sparse_attention_demo.py", said)


if __name__ == "__main__":
    main()
