"""The gate's rules, what it compiles, and one kernel compiled for a GPU that is not there."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from upcycle.kernels.gpu.compile_gate import static_report
from upcycle.kernels.gpu.compile_gate.__main__ import stale
from upcycle.kernels.gpu.compile_gate.compile import CompiledKernel, KernelVariant, build
from upcycle.kernels.gpu.compile_gate.rules import faults
from upcycle.kernels.gpu.compile_gate.variants import place_variants, variants
from upcycle.kernels.gpu.tile_table import GPU_KINDS, TileTable, default_table


@pytest.fixture(scope="module")
def shipped() -> list[KernelVariant]:
    return variants(default_table())


def good(variant: KernelVariant) -> CompiledKernel:
    return CompiledKernel(variant, 128, 0, 64 * 1024, {"mma.sync": 8, "wgmma.mma_async": 8, "tcgen05.mma": 8}, 12)


def find(shipped: list[KernelVariant], name: str, kind: str = "sm90", rows: int = 64) -> KernelVariant:
    return next(variant for variant in shipped if (variant.kind, variant.name, variant.tile.m) == (kind, name, rows))


def test_everything_is_compiled_for_every_kind_once(shipped: list[KernelVariant]) -> None:
    assert len(shipped) == len(set(shipped))
    names = {kind: Counter(variant.name for variant in shipped if variant.kind == kind) for kind in GPU_KINDS}
    assert set(names["sm80"]) == set(names["sm90"]) == set(names["sm100"])
    for name in ("up interleaved", "up concatenated", "up plain", "gemm", "gemm hidden first", "down_backward",
                 "down_backward hidden first", "activation_backward interleaved", "activation_backward concatenated",
                 "activation_backward plain", "xty", "xty hidden first", "combine weighted", "combine"):  # fmt: skip
        assert names["sm80"][name], name


def test_every_tile_of_the_table_is_compiled(shipped: list[KernelVariant]) -> None:
    compiled = {(variant.kind, variant.tile) for variant in shipped}
    assert {(kind, tile) for (kind, *_), tile in default_table().entries.items()} == compiled


def test_a_tile_that_changes_is_compiled(shipped: list[KernelVariant]) -> None:
    table = default_table()
    key = ("sm80", 2, "gemm", 64)
    other = replace(table.entries[key], stages=7)
    changed = set(variants(table.replaced({key: other}))) - set(shipped)
    assert {variant.name for variant in changed} == {"gemm", "gemm hidden first"}


def test_what_may_not_be_shipped(shipped: list[KernelVariant]) -> None:
    variant = find(shipped, "up interleaved")
    assert faults(good(variant)) == []
    assert "spill" in faults(replace(good(variant), stack=8))[0]
    assert "228 KiB" in faults(replace(good(variant), shared=228 * 1024))[0]
    assert "100 KiB" in faults(replace(good(find(shipped, "up interleaved", "sm80")), shared=100 * 1024))[0]
    assert "wgmma" in faults(replace(good(variant), tensor_core={"mma.sync": 8}))[0]
    assert "tcgen05" in faults(replace(good(find(shipped, "up interleaved", "sm100")), tensor_core={"mma.sync": 8}))[0]
    assert faults(replace(good(find(shipped, "up interleaved", rows=16)), tensor_core={"mma.sync": 8})) == []
    assert "tensor-core" in faults(replace(good(variant), tensor_core={}))[0]
    assert "asynchronous" in faults(replace(good(variant), async_copies=0))[0]
    sums = next(variant for variant in shipped if variant.name == "combine")
    assert faults(replace(good(sums), tensor_core={}, async_copies=0)) == []


def test_blocks_per_multiprocessor(shipped: list[KernelVariant]) -> None:
    variant = find(shipped, "gemm", "sm80")
    four = replace(variant, tile=replace(variant.tile, warps=4))
    made = replace(good(four), registers=97, shared=16 * 1024)
    assert static_report.blocks_per_sm(made) == 65536 // (104 * 128)
    assert static_report.blocks_per_sm(replace(made, shared=64 * 1024)) == 164 // 65
    assert static_report.blocks_per_sm(replace(made, registers=16, shared=0)) == 2048 // 128


def test_the_report_names_what_it_is(shipped: list[KernelVariant]) -> None:
    text = static_report.report([good(variant) for variant in shipped])
    assert "*estimate*" in text
    assert "Times on a GPU: [kernels_gpu.md](kernels_gpu.md)" in text
    assert text.count("\n| sm") == len(shipped)


def test_one_compilation(shipped: list[KernelVariant]) -> None:
    made = build(find(shipped, "gemm", "sm80", 16))
    assert faults(made) == []
    assert 32 <= made.registers <= 255
    assert made.shared > 0


def test_a_spill_is_seen() -> None:
    """Half a megabyte of accumulators for 128 threads."""
    table = default_table()
    key = ("sm80", 2, "up/plain", 128)
    wide = TileTable({**table.entries, key: replace(table.entries[key], n=256, k=32, warps=4, stages=2)})
    variant = next(variant for variant in place_variants("sm80", 2, 128, wide, "up/plain"))
    assert "spill" in faults(build(variant))[0]


def test_a_saved_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.md"
    text = f"{static_report.compiler()}. 64 registers"
    path.write_text(text)
    assert not stale(path, text)
    assert stale(path, text.replace("64", "65"))
    assert "--write" in capsys.readouterr().err
    path.write_text("Triton 0.1. 99 registers")
    assert not stale(path, text)
    assert "another compiler" in capsys.readouterr().err
