"""MoEC on the demo model: clusters of experts, trained on so little text that it is read several times, beside balance alone.

The demo model becomes 8 copies of its FFNs, two per token, which train on a few documents with Switch's balance loss, and again
with MoEC's variance loss within 4 clusters of 2 and half of every cluster dropped, as ``configs/train/moec.yaml`` does. MoEC's
claim is less overfitting where there are many experts: losses are of the text that was trained on and of held-out documents, the
mean of code and prose. The variance is the loss's own value, the mean over layers on held-out text, and the load that of the
fullest expert over an equal share.

    python -P tests/benchmarks/wrapped/moec_demo.py --out docs/measured/moec_demo.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "training")]

import torch
from d2d_demo import BATCH, LENGTH, measured, training, windows
from healing import demo_texts
from training_curves import trained, write_domains, write_page
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.files.locate import locate
from upcycle.trainers.routing.stock_routers import moe_layers

EXPERTS, CLUSTERS = 8, 4
CHARACTERS = 8_000  # of each domain
BALANCE: dict[str, Any] = {"switch_balance": {"coefficient": 0.01}}
ARMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "balance": ("balance alone", BALANCE, {}),
    "moec": (
        "MoEC: variance loss and cluster dropout",
        {**BALANCE, "cluster_variance": {"coefficient": 0.01, "clusters": CLUSTERS}},
        {"cluster_dropout": 0.5, "clusters": CLUSTERS, "cluster_steps": 10},
    ),
}


def few(documents: Sequence[str]) -> list[str]:
    """The first documents, so many characters together."""
    found: list[str] = []
    for text in documents:
        room = CHARACTERS - sum(map(len, found))
        if room <= 0:
            break
        found.append(text[:room])
    return found


@torch.no_grad()
def clusters_and_load(folder: Path, text: Sequence[torch.Tensor]) -> tuple[float, float]:
    """``E mean_g var_{i in g} P_i``, and the load of the fullest expert: means over layers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = moe_layers(model)
    shares, counts = torch.zeros(len(layers), EXPERTS).double(), torch.zeros(len(layers), EXPERTS).double()

    def reader(place: int) -> Any:
        def read(_: Any, __: Any, made: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            shares[place] += made[0].view(-1, EXPERTS).double().softmax(1).sum(0)
            counts[place] += torch.bincount(made[2].flatten(), minlength=EXPERTS)

        return read

    for place, layer in enumerate(layers):
        layer.router.register_forward_hook(reader(place))
    for rows in text:
        for ids in rows.split(8):
            model(ids)
    means = shares / shares.sum(1, keepdim=True)
    variance = EXPERTS * means.view(len(layers), CLUSTERS, -1).var(2, correction=0).mean(1)
    return float(variance.mean()), float((counts.max(1).values / counts.mean(1)).mean())


def main() -> None:
    """Convert, train, measure and print the table; with ``--out`` it is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help=f"of training, {LENGTH * BATCH} tokens each")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--jobs", type=int, default=2, help="training runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="moec-"))
    texts = demo_texts()
    texts = {domain: [few(side[0]), side[1]] for domain, side in texts.items()}
    data = write_domains(work / "text", texts)
    if not (work / "start").exists():
        told = {"target": "mixtral", "experts": EXPERTS, "top_k": 2, "verification": {"enabled": False}}
        upcycle.convert("demo", work / "start", **told)
    runs: dict[str, Mapping[str, Any]] = {}
    for name, (_, losses, control) in ARMS.items():
        run = training(data, options.steps, options.rate, None)
        run["model"] = str(work / "start")
        run["stages"][0] |= {"losses": losses, **({"control": control} if control else {})}
        runs[f"{name}-{options.rate:g}-{options.steps}"] = run
    trained(runs, work / "runs", options.jobs)
    tokenizer = load_tokenizer(locate("demo").path)
    # A sixth of the windows of each domain says enough.
    held = [rows[::6] for rows in windows(texts, tokenizer)]
    seen = [rows[::6] for rows in windows({domain: [side[1], side[0]] for domain, side in texts.items()}, tokenizer)]
    tokens = sum(len(tokenizer(text)["input_ids"]) for side in texts.values() for text in side[0])
    lines = [
        "| | loss on what was trained on | on held-out text | variance within clusters | load |",
        "|---|---:|---:|---:|---:|",
    ]
    folders = {"before": work / "start"}
    folders |= {ARMS[name][0]: work / "runs" / run / "model" for name, run in zip(ARMS, runs, strict=True)}
    for title, folder in folders.items():
        variance, load = clusters_and_load(folder, held)
        losses_of = [measured(folder, text).loss for text in (seen, held)]
        lines.append(f"| {title} | {losses_of[0]:.4f} | {losses_of[1]:.4f} | {variance:.4f} | {load:.2f} |")
    times = options.steps * LENGTH * BATCH / tokens
    said = "\n".join(lines) + f"\n\n{tokens:,} tokens of text, each trained on {times:.1f} times.\n"
    print(said)
    if options.out:
        write_page(options.out, "MoEC on the demo model", "wrapped/moec_demo.py", said)


if __name__ == "__main__":
    main()
