"""How small QMoE's codec makes ternary experts, and how fast it decodes them.

Matrices of 64 MB in bfloat16 are drawn with 85%, 90% and 95% of zeros; the experts of a MoE (``--model``, default: the demo model as
one) are rounded as ``upcycle compress --method qmoe --refit none`` rounds them. Bits per weight count everything that is stored:
codes, the number of codes of every row, and two scales per row.

The decoder's speed is the bytes of bfloat16 that it writes per second of CPU time, by one thread, into memory that was written to
before; beside it a copy of the same bytes by the same thread (torch's ``copy_``), in turns. The least time of each counts.

    python -P tests/benchmarks/compressing/qmoe_codec.py --out docs/measured/qmoe_codec.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "support")]

import torch
from measure import Row, report

import upcycle
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.ffn.rounding.ternary import nearest_ternary
from upcycle.methods.compressing.qmoe_codec.codes import decode_ternary, encode_ternary

ROWS, COLUMNS, ROUNDS = 16384, 2048, 15
MOST_BITS, LEAST_SPEED, ZEROS = 1.0, 0.25, 0.85


@dataclass(frozen=True)
class Measured:
    """One matrix: the share of zeros, bits per weight, bytes per second of the decoder and of a copy."""

    name: str
    zeros: float
    bits: float
    decoded: float
    copied: float


def drawn(zeros: float) -> torch.Tensor:
    """A ternary matrix, bfloat16."""
    draw = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (ROWS, COLUMNS), generator=draw) * 2 - 1
    kept = torch.rand(ROWS, COLUMNS, generator=draw) >= zeros
    scale = 0.01 + 0.05 * torch.rand(ROWS, 1, generator=draw)
    return torch.where(kept, signs * scale, torch.zeros(())).bfloat16()


def experts(model: Path | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices of all experts of a MoE, rounded; those of one shape one below another."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            model = Path(folder) / "moe"
            upcycle.convert("demo", model, method="sparse_upcycling", experts=8, verification={"enabled": False})
        checkpoint = MoeCheckpoint.open(str(model))
        found: dict[tuple[str, int], list[torch.Tensor]] = {}
        for layer in checkpoint.model.moe_layers:
            for expert in range(checkpoint.model.experts):
                for part, matrix in checkpoint.matrices(layer, expert).items():
                    found.setdefault((part, matrix.shape[1]), []).append(nearest_ternary(matrix.bfloat16()))
    for (part, _), matrices in found.items():
        yield f"{model.name}, {part}", torch.cat(matrices)


def least(do: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
    """The least seconds of CPU time that each of two takes, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for side, run in zip(times, (do, other), strict=True):
            started = time.thread_time()
            run()
            side.append(time.thread_time() - started)
    return min(times[0]), min(times[1])


def measured(name: str, matrix: torch.Tensor) -> Measured:
    """Encode, decode, compare, and time."""
    coded = encode_ternary(matrix)
    assert coded is not None
    out, copy = torch.empty_like(matrix), torch.empty_like(matrix)
    assert torch.equal(decode_ternary(coded, out=out).view(torch.int16), matrix.view(torch.int16))
    decoding, copying = least(lambda: decode_ternary(coded, out=out), lambda: copy.copy_(matrix))
    size = matrix.numel() * matrix.element_size()
    return Measured(name, (matrix == 0).double().mean().item(), coded.bits_per_weight, size / decoding, size / copying)


def table(found: list[Measured]) -> str:
    """Markdown."""
    lines = ["| weights | zeros | bits per weight | decoded | copied | |", "|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {one.name} | {one.zeros:.1%} | {one.bits:.3f} | {one.decoded / 1e9:.1f} GB/s | {one.copied / 1e9:.1f} GB/s "
        f"| {one.decoded / one.copied:.2f}x |"
        for one in found
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a MoE's folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measured(f"drawn, {zeros:.0%} zeros", drawn(zeros)) for zeros in (0.85, 0.9, 0.95)]
    found += [measured(name, matrix) for name, matrix in experts(options.model)]
    page = table(found)
    print(page)
    if options.out:
        options.out.write_text(page, encoding="utf-8")
    rows = []
    for one in found:
        if one.zeros >= ZEROS - 0.001:
            bits, speed = one.bits, one.decoded / one.copied
            rows.append(Row(f"{one.name}: bits", f"{bits:.3f}", "16", "", f"below {MOST_BITS}", bits < MOST_BITS))
            rows.append(
                Row(
                    f"{one.name}: decoder, copy",
                    f"{one.decoded / 1e9:.1f} GB/s",
                    f"{one.copied / 1e9:.1f} GB/s",
                    f"{speed:.2f}x",
                    f"at least {LEAST_SPEED}x",
                    speed >= LEAST_SPEED,
                )
            )
    return report("ternary experts", ("coded", "bfloat16"), rows)


if __name__ == "__main__":
    sys.exit(main())
