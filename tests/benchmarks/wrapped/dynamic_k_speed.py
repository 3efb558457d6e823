"""Speed of dynamic-k at a mean share of 25% of the neurons, in BERT-base's shape on a CPU: one FFN, and the whole encoder.

Weights are random, of the wrapper and of transformers' own class; ``tau`` is set layer by layer so that a quarter of the neurons
runs in the mean. Both sides run in turn in one process, and the medians of their times are compared. The goals are for the widest of
``--widths``: FFN at least 2.5x faster, end to end at least 1.5x. Narrower experts cost more to gather and to add up: they are shown.

    python -P tests/benchmarks/wrapped/dynamic_k_speed.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
from measure import Row, report
from torch import nn
from transformers import AutoModel, BertConfig

import upcycle.models  # noqa: F401 - registers upcycle_moe
from upcycle.ffn.router_network import RouterForm
from upcycle.models.own.configuration import wrapped_config
from upcycle.models.own.moe_block import MoeBlock
from upcycle.models.own.replaced_ffn import ReplacedFfn
from upcycle.models.own.routing.dynamic_k import DynamicKRule

D, F, LAYERS, BATCH, LENGTH = 768, 3072, 12, 64, 128
ROUTER = RouterForm(128, "relu", absolute=True)  # D2DMoE's
GOALS = {"FFN": 2.5, "BERT-base": 1.5}


class DenseFfn(nn.Module):
    """BERT's FFN."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        self.up, self.act, self.down = nn.Linear(D, F), ACT2FN[activation], nn.Linear(F, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., d]`` to ``[..., d]``."""
        out: torch.Tensor = self.down(self.act(self.up(x)))
        return out


def described(width: int, activation: str, paths: tuple[tuple[str, ...], ...] = (("ffn",),)) -> ReplacedFfn:
    """The FFN as experts of a width."""
    biases = frozenset({"up", "output"})
    return ReplacedFfn(
        paths, D, activation, False, biases, (width,) * (F // width), 0, False, DynamicKRule(), router=ROUTER
    )  # type: ignore[arg-type]


def set_share(block: MoeBlock, x: torch.Tensor, share: float) -> float:
    """Set the block's ``tau`` so that ``share`` of its experts run for inputs ``x`` in the mean; returns what runs."""
    logits = block.router(x.reshape(-1, D))[0]
    relative = logits.abs() / logits.abs().amax(-1, keepdim=True)
    tau = float(torch.quantile(relative.flatten()[:: max(1, relative.numel() // 1_000_000)], 1 - share))
    block.router.rule = DynamicKRule(tau)
    return float((block.router.rule.gates(logits) > 0).float().mean())


def times(rounds: int, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of both, run in turn after one run each."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for side, call in zip(found, (ours, theirs), strict=True):
            started = time.perf_counter()
            call()
            if number:
                side.append(time.perf_counter() - started)
    return median(found[0]), median(found[1])


def row(name: str, share: float, ours: float, theirs: float, judged: bool) -> Row:
    """A line of the table."""
    ratio, goal = theirs / ours, GOALS[name.partition(",")[0]]
    cells = (f"{1e3 * ours:,.0f} ms at {share:.1%}", f"{1e3 * theirs:,.0f} ms")
    if not judged:
        return Row(name, *cells, f"{ratio:.2f}x faster", "")
    return Row(name, *cells, f"{ratio:.2f}x faster", f"at least {goal:.1f}x", ratio >= goal)


@torch.no_grad()
def ffn_row(width: int, activation: str, share: float, rounds: int, judged: bool, profile: bool) -> Row:
    """One FFN."""
    x = torch.randn(BATCH, LENGTH, D)
    block, dense = MoeBlock(described(width, activation)), DenseFfn(activation)
    found = set_share(block, x, share)
    if profile:
        with torch.profiler.profile() as seen:
            block(x)
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=16), file=sys.stderr)
    return row(
        f"FFN, experts of {width}, {activation}", found, *times(rounds, lambda: block(x), lambda: dense(x)), judged
    )


@torch.no_grad()
def model_row(width: int, activation: str, share: float, rounds: int, judged: bool) -> Row:
    """The encoder, from token ids to hidden states."""
    config = BertConfig(hidden_act=activation, attn_implementation="sdpa")
    paths = tuple((f"encoder.layer.{i}.intermediate", f"encoder.layer.{i}.output.dense") for i in range(LAYERS))
    dense = AutoModel.from_config(config).eval()
    wrapped: Any = AutoModel.from_config(wrapped_config(config, [described(width, activation, paths)])).eval()
    ids = torch.randint(1000, config.vocab_size, (BATCH, LENGTH))
    blocks = [module for module in wrapped.modules() if isinstance(module, MoeBlock)]
    assert len(blocks) == LAYERS
    shares: list[float] = []
    hooks = [
        block.register_forward_pre_hook(lambda block, args: shares.append(set_share(block, args[0], share)))
        for block in blocks
    ]
    wrapped(ids)
    for hook in hooks:
        hook.remove()
    found = sum(shares) / len(shares)
    return row(
        f"BERT-base, experts of {width}, {activation}",
        found,
        *times(rounds, lambda: wrapped(ids), lambda: dense(ids)),
        judged,
    )


def main() -> None:
    """Measure, and print the table; ends with 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128], help="neurons of an expert")
    parser.add_argument("--activation", default="gelu")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ffn-only", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for width in sorted(options.widths):
        judged = width == max(options.widths)
        rows.append(ffn_row(width, options.activation, options.share, options.rounds, judged, options.profile))
        if judged and not options.ffn_only:
            rows.append(model_row(width, options.activation, options.share, max(2, options.rounds // 3), judged))
    title = f"Dynamic-k against the dense FFN: d {D}, F {F}, {BATCH} x {LENGTH} tokens, fp32, {options.threads} threads"
    sys.exit(report(title, ("dynamic-k", "dense"), rows))


if __name__ == "__main__":
    main()
