"""A sentence encoder split by D2DMoE and by MoEfication: dynamic-k beside a fixed top-k, and routers beside their ground truth.

all-MiniLM-L6-v2 (see ``real_encoders.py``) becomes 24 experts of 64 neurons in two ways, each calibrated on three quarters of the
embedded texts and not refitted: D2DMoE's clusters with routers that predict norms, and MoEfication's graph cut with its own
routers. Each is then run at about 20, 40 and 60% of the neurons: D2DMoE by dynamic-k, with one tau for all layers that is sought
on other lines until the mean share is that of 5, 10 and 14 experts, and by as many experts for every token; MoEfication by these.
The ground truth chooses by what the routers only predict: the norms of the experts' outputs, and the sums of their neurons'
activations.

Cosine and recall@10 compare embeddings of lines that were not calibrated on with the dense model's; times are of embedding 128 of
them.

    python -P tests/benchmarks/wrapped/encoder_rules.py --out docs/measured/encoder_rules.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    *(str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)),
    str(Path(__file__).resolve().parents[1] / "training"),
]

import torch
from real_encoders import minilm
from training_curves import write_page

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.evaluation.encoders.embeddings import compared, embed_texts, sentences
from upcycle.models.load import load_model
from upcycle.models.own.moe_block import MoeBlock
from upcycle.models.own.routing.base import RouterRule
from upcycle.models.own.routing.dynamic_k import DynamicKRule
from upcycle.models.own.routing.top_k import TopKRule
from upcycle.progress import SILENT
from upcycle.text.reading.plain_text import DEMO_TEXTS, EVERYDAY, read_text
from upcycle.text.windows import demo_parts
from upcycle.verification.neurons_run import NeuronsRun

EXPERTS, ACTIVE = 24, (5, 10, 14)  # of 64 neurons: 21, 42 and 58%
LINES, TIMED, SOUGHT, STEPS, CONTEXT = 400, 128, 64, 8, 512
_MOEFICATION: dict[str, Any] = {
    "method": "coactivation_graph",
    "router": "moefication",
    "top_k": 5,
    "routing": {"scores": "ones", "normalized": False},
}
_D2D: dict[str, Any] = {"method": "d2d", "router": "d2d_norms", "routing": "dynamic_k"}
COMMON: dict[str, Any] = {
    "target": "upcycle_moe",
    "experts": EXPERTS,
    "refit": "none",
    "calibration": {"text": "demo", "tokens": 32768, "window": 64},
    "verification": {"enabled": False},
}


def blocks(model: Any) -> list[MoeBlock]:
    """The blocks of experts, layer by layer."""
    return [module for module in model.modules() if isinstance(module, MoeBlock)]


def ruled(model: Any, rule: RouterRule) -> None:
    """Let all layers follow a rule."""
    for block in blocks(model):
        block.router.rule = rule


def top(count: int) -> RouterRule:
    """So many experts, each at weight 1."""
    return TopKRule(count, "ones", False)


@contextmanager
def ground_truth(model: Any, of_experts: Callable[[MoeBlock, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let routers know what they predict inside the ``with`` block: ``of_experts`` gives it as ``[T, E]``."""

    def knowing(block: MoeBlock) -> Any:
        def forward(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = of_experts(block, x)
            ids, weights = block.router.rule.route(logits)
            return logits, weights, ids

        return forward

    for block in blocks(model):
        block.router.forward = knowing(block)
    try:
        yield
    finally:
        for block in blocks(model):
            del block.router.forward


def norms(block: MoeBlock, x: torch.Tensor) -> torch.Tensor:
    """The norm of every expert's output, ``[T, E]``."""
    experts, found, first = block.experts, [], 0
    for expert, width in enumerate(experts.widths):
        found.append((experts.active(x, expert) @ experts.down[first : first + width]).norm(dim=1))
        first += width
    return torch.stack(found, 1)


def activations(block: MoeBlock, x: torch.Tensor) -> torch.Tensor:
    """The sum of the absolute activations of every expert's neurons, ``[T, E]``."""
    return torch.stack([block.experts.active(x, e).abs().sum(1) for e in range(block.experts.count)], 1)


def lines(part: int) -> list[str]:
    """Lines of the embedded texts: of the parts that are calibrated on (0), or of the others and of a text of another kind (1)."""
    contents = [demo_parts(name)[part] for name in DEMO_TEXTS]
    return sentences(contents + [read_text(EVERYDAY)] * part, LINES)


def tau_for(model: Any, share: float, embed: Callable[[Any, Sequence[str]], torch.Tensor]) -> float:
    """The tau at which that share of the neurons runs in the mean."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        ruled(model, DynamicKRule(tau := (low + high) / 2))
        running = NeuronsRun(model, None)
        with running.counted():
            embed(model, lines(0)[:SOUGHT])
        low, high = (tau, high) if fmean(running.shares) > share else (low, tau)
    return round((low + high) / 2, 3)


def main() -> None:
    """Convert, run and print the tables; with ``--out`` they are written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of timing, the least of which counts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tokenizer, texts = load_tokenizer(minilm()), lines(1)

    def embed(model: Any, some: Sequence[str]) -> torch.Tensor:
        return embed_texts(model, tokenizer, some, CONTEXT, False, SILENT)

    dense = load_model(minilm(), experts="auto", encoder=True)
    reference = embed(dense, texts)
    rows: list[tuple[int, str, float, float, float, str]] = []
    timed: dict[tuple[int, str], Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        models: dict[str, Any] = {}
        for name, keys in (("d2d", _D2D), ("moefication", _MOEFICATION)):
            upcycle.convert(str(minilm()), Path(place) / name, **COMMON, **keys)
            models[name] = load_model(Path(place) / name, experts="auto", encoder=True)

        def add(count: int, title: str, model: Any, rule: RouterRule, said: str = "", clock: bool = False) -> None:
            ruled(model, rule)
            running = NeuronsRun(model, None)
            with running.counted():
                found = compared(embed(model, texts), reference, "lines")
            rows.append((count, title, fmean(running.shares), found.cosine, found.recall, said))
            if clock:
                timed[count, title] = lambda: (ruled(model, rule), embed(model, texts[:TIMED]))
            print(rows[-1], file=sys.stderr, flush=True)

        d2d, graph = models["d2d"], models["moefication"]
        for count in ACTIVE:
            tau = tau_for(d2d, count / EXPERTS, embed)
            add(count, "D2DMoE: norm routers, dynamic-k", d2d, DynamicKRule(tau), f"tau {tau:g}", clock=True)
            add(count, "D2DMoE's split and routers, top-k", d2d, top(count), f"top_k {count}", clock=True)
            add(count, "MoEfication: its own routers, top-k", graph, top(count), f"top_k {count}", clock=True)
            with ground_truth(d2d, norms):
                tau = tau_for(d2d, count / EXPERTS, embed)
                add(count, "ground truth of D2DMoE, dynamic-k", d2d, DynamicKRule(tau), f"tau {tau:g}")
                add(count, "ground truth of D2DMoE, top-k", d2d, top(count), f"top_k {count}")
            with ground_truth(graph, activations):
                add(count, "ground truth of MoEfication, top-k", graph, top(count), f"top_k {count}")
        best = dict.fromkeys([*timed, (0, "")], float("inf"))
        for _ in range(options.rounds):
            for key, work in {**timed, (0, ""): lambda: embed(dense, texts[:TIMED])}.items():
                started = time.perf_counter()
                work()
                best[key] = min(best[key], time.perf_counter() - started)
    table = [
        "| | setting | neurons that run | mean cosine | recall@10 | time (dense: 1) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for count, title, share, cosine, recall, said in sorted(rows, key=lambda row: row[0]):
        clock = f"{best[count, title] / best[0, '']:.2f}" if (count, title) in best else ""
        table.append(f"| {title} | {said} | {share:.1%} | {cosine:.4f} | {recall:.1%} | {clock} |")
    said = (
        "\n".join(table) + f"\n\n{len(texts)} lines; the dense model embeds {TIMED} of them in {best[0, '']:.1f} s.\n"
    )
    print(said)
    if options.out:
        write_page(options.out, "Rules on a sentence encoder", "wrapped/encoder_rules.py", said)


if __name__ == "__main__":
    main()
