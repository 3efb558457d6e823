"""Compiles every shipped tile for every kind of GPU, without one, and inspects the machine code.

``python -m upcycle.kernels.gpu.compile_gate`` compiles (two processes; Triton keeps what it compiled), checks that nothing
spills, that shared memory suffices, that tensor cores and asynchronous copies are used, and prints the static report.
``--write FILE`` saves it; ``--check FILE`` fails if that file holds another report. Nothing here is timed: times in the report
are estimates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from upcycle.errors import EnvironmentFault, UpcycleError
from upcycle.kernels.gpu.compile_gate.candidates import choose, first_guess
from upcycle.kernels.gpu.compile_gate.compile import CompiledKernel, KernelVariant, build
from upcycle.kernels.gpu.compile_gate.rules import faults
from upcycle.kernels.gpu.compile_gate.static_report import compiler, report
from upcycle.kernels.gpu.compile_gate.variants import variants
from upcycle.kernels.gpu.tile_table import GPU_KINDS, TileTable, default_table
from upcycle.kernels.layout.devices import interpreted


def compile_all(todo: Sequence[KernelVariant], processes: int) -> list[CompiledKernel]:
    """Compile in several processes, in the order given."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(build, todo))


def choose_all(path: Path, processes: int) -> int:
    """Choose every tile and save the table; returns 1 if no tile is fit for some place."""
    keys = list(first_guess())
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        chosen = dict(zip(keys, pool.map(choose, keys), strict=True))
    for key, tile in chosen.items():
        if tile is None:
            print(f"error: no candidate passes: {key}", file=sys.stderr)
    TileTable({key: tile for key, tile in chosen.items() if tile is not None}).save(path)
    return int(None in chosen.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gate; returns 0 if every tile may be shipped."""
    parser = argparse.ArgumentParser(
        prog="python -m upcycle.kernels.gpu.compile_gate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kind", choices=GPU_KINDS, action="append", help="only this kind of GPU")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", type=Path, help="save the report in this file")
    parser.add_argument("--check", type=Path, help="fail unless this file is the report")
    parser.add_argument("--choose", type=Path, help="choose the tiles anew, and save the table in this file")
    options = parser.parse_args(arguments)
    if interpreted():
        raise EnvironmentFault("TRITON_INTERPRET is 1: nothing can be compiled", hint="unset TRITON_INTERPRET")
    if options.choose:
        return choose_all(options.choose, options.processes)
    table = default_table()
    todo = [variant for variant in variants(table) if variant.kind in (options.kind or GPU_KINDS)]
    results = compile_all(todo, options.processes)
    wrong = [f"{result.variant.title}: {fault}" for result in results for fault in faults(result)]
    text = report(results)
    print(text)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    print(f"{len(results)} kernels compiled, {len(wrong)} faults", file=sys.stderr)
    if options.write and not wrong:
        options.write.write_text(text)
    return 1 if wrong or (options.check and stale(options.check, text)) else 0


def stale(path: Path, text: str) -> bool:
    """Whether a saved report differs from ``text`` although the same compiler made it; others may use other registers."""
    saved = path.read_text()
    if saved == text:
        return False
    line = compiler()
    if line not in saved:
        print(f"note: {path} was made by another compiler than {line}", file=sys.stderr)
        return False
    print(f"error: {path} is not what this prints", file=sys.stderr)
    print(f"\nhint: python -P -m upcycle.kernels.gpu.compile_gate --write {path}", file=sys.stderr)
    return True


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UpcycleError as error:
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
