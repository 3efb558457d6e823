"""The gate without a GPU: every shipped tile is compiled for every kind of GPU, and its machine code is looked at.

``python -m upcycle.kernels.aot`` compiles (two processes; Triton keeps what it compiled), checks that nothing spills, that
shared memory suffices, that tensor cores and asynchronous copies are used, and prints the static report; ``--write FILE`` saves
it. This says nothing about time: what is derived from it is an estimate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from upcycle.errors import UpcycleError
from upcycle.kernels import triton_experts
from upcycle.kernels.aot_compile import Build, Job, build, job_of
from upcycle.kernels.experts import ExpertWeights, Gradients
from upcycle.kernels.routing import Routing
from upcycle.kernels.candidates import candidates
from upcycle.kernels.tiles import FAMILIES, KINDS, SIZES, Tile, TileTable, default_table
from upcycle.kernels.triton_launch import recorded

# Shared memory one block can have. The first table is also used on sm_86, sm_89 and sm_120, which have 99 KiB.
SHARED_LIMIT = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}
_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_HIDDEN, _WIDTH, _EXPERTS, _TOP_K = 2048, 768, 8, 2


def jobs(table: TileTable) -> list[Job]:
    """Everything that the table's tiles are compiled to, each once: training in every layout that has kernels of its own."""
    found: dict[Job, None] = {}
    for kind, size, rows in sorted({(kind, size, rows) for kind, size, _, rows in table}):
        for weights in _layouts(_DTYPES[size]):
            found.update(dict.fromkeys(training_jobs(kind, weights, rows, table)))
    return list(found)


def training_jobs(kind: str, weights: ExpertWeights, rows: int, table: TileTable, family: str = "") -> Iterator[Job]:
    """What one forward and backward pass with so many rows per expert launches."""
    routing = meta_routing(rows * weights.num_experts // _TOP_K, weights.num_experts, _TOP_K)
    x = torch.empty(routing.tokens, weights.hidden, dtype=weights.up.dtype, device="meta")
    scores = torch.empty(routing.slots, device="meta")
    with recorded(kind) as launches:
        _, z = triton_experts.forward(x, weights, routing, scores, True, table)
        everything = Gradients(x=x, up=weights.up, down=weights.down, scores=scores)
        triton_experts.backward(x, x, weights, routing, scores, z, everything, table=table)
    for launch in launches:
        if not family or launch.family == family:
            yield job_of(launch, kind)


def meta_routing(tokens: int, experts: int, top_k: int) -> Routing:
    """Shapes of a routing without values."""

    def empty(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    slots = tokens * top_k
    return Routing(empty(slots), empty(slots), empty(slots), empty(experts + 1, torch.int64), None, tokens, top_k)


def _layouts(dtype: torch.dtype) -> Iterator[ExpertWeights]:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    widths = (_WIDTH,) * _EXPERTS
    rows = _WIDTH * _EXPERTS
    yield ExpertWeights(empty(2 * rows, _HIDDEN), empty(rows, _HIDDEN), interleaved=True, widths=widths)
    if dtype == torch.float32:
        return
    yield ExpertWeights(empty(_EXPERTS, 2 * _WIDTH, _HIDDEN), empty(_EXPERTS, _HIDDEN, _WIDTH))
    yield ExpertWeights(empty(rows, _HIDDEN), empty(rows, _HIDDEN), activation="relu2", gated=False, widths=widths)


def faults(result: Build) -> list[str]:
    """What keeps a tile from being shipped."""
    found, job = [], result.job
    if result.stack:
        found.append(f"{result.stack} bytes of stack: registers spill")
    if result.shared > SHARED_LIMIT[job.kind]:
        found.append(f"{result.shared / 1024:.0f} KiB of shared memory, above {SHARED_LIMIT[job.kind] // 1024}")
    if job.kernel != "combine_kernel":
        if not result.tensor_core:
            found.append("no tensor-core instruction")
        if not result.async_copies:
            found.append("no asynchronous copy")
    return found


def compile_all(todo: Sequence[Job], processes: int = 2) -> list[Build]:
    """Compile in several processes, longest first where that is known."""
    if processes == 1:
        return [build(job) for job in todo]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(build, todo))


def choose(key: tuple[str, int, str, int]) -> tuple[tuple[str, int, str, int], Tile | None]:
    """The first candidate for a place in the table that may be shipped, in all layouts; ``None``: there is none."""
    kind, size, family, rows = key
    table = first_guess()
    for tile in candidates(size, family)[rows]:
        tried = table.replaced({key: tile})
        layouts = _layouts(_DTYPES[size])
        todo = {job for weights in layouts for job in training_jobs(kind, weights, rows, tried, family)}
        if all(not faults(build(job)) for job in sorted(todo, key=str)):
            return key, tile
    return key, None


def choose_all(path: Path, processes: int) -> int:
    """Choose every tile; 1 if a place has none."""
    keys = list(first_guess())
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        chosen = dict(pool.map(choose, keys))
    missing = [key for key, tile in chosen.items() if tile is None]
    for key in missing:
        print(f"error: no candidate passes: {key}", file=sys.stderr)
    TileTable({key: tile for key, tile in chosen.items() if tile is not None}).save(path)
    return 1 if missing else 0


def first_guess() -> TileTable:
    """The first candidates, which need not pass."""
    return TileTable(
        {
            (kind, size, family, rows): tiles[0]
            for kind in KINDS
            for size in SIZES
            for family in FAMILIES
            for rows, tiles in candidates(size, family).items()
        }
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The gate; 0 if every tile may be shipped."""
    from upcycle.kernels.static_report import report

    parser = argparse.ArgumentParser(prog="python -m upcycle.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind of GPU")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", type=Path, help="save the report in this file")
    parser.add_argument("--choose", type=Path, help="choose the tiles anew, and save the table in this file")
    options = parser.parse_args(arguments)
    if options.choose:
        return choose_all(options.choose, options.processes)
    table = default_table()
    todo = [job for job in jobs(table) if job.kind in (options.kind or KINDS)]
    results = compile_all(todo, options.processes)
    wrong = [f"{result.job.title}: {fault}" for result in results for fault in faults(result)]
    text = report(results)
    print(text)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    print(f"{len(results)} kernels compiled, {len(wrong)} faults", file=sys.stderr)
    if options.write and not wrong:
        options.write.write_text(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UpcycleError as error:
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
