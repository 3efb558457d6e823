"""SmolLM2-135M into a Mixtral of four copies, by upcycle and by mergekit-moe: time, peak memory, and the same bits.

Both read the same dense bfloat16 folder and write top-2 of 4 experts with a random router and the tokenizer, each in a
process of its own, in turn. upcycle does not verify here, since mergekit has no such step; it does hash what it writes
and waits for the disk (fsync), which mergekit does not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

from measure import UPCYCLE, Cost, Row, alternate, memory_row, report, run, spread_row, time_row
from mergekit_moe import TITLE, difference_rows, program, smollm2_folder
from smollm2 import cache_folder

EXPERTS, TOP_K = 4, 2
MOST_TIME, MOST_MEMORY = 0.6, 0.5
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


def main() -> int:
    """Measure, compare, print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for mergekit and the outputs (default: the cache)")
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each side (default: 5)")
    arguments = parser.parse_args()
    work = (arguments.work or cache_folder() / "benchmarks").absolute()
    work.mkdir(parents=True, exist_ok=True)
    mergekit, dense = program(work / "mergekit-environment"), smollm2_folder()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        rows = compare(dense, mergekit, Path(folder), arguments.rounds)
    title = f"SmolLM2-135M x {EXPERTS} -> Mixtral, bfloat16, medians of {arguments.rounds} runs each"
    return report(title, ("upcycle", TITLE), rows)


def compare(dense: Path, mergekit: Path, work: Path, rounds: int) -> list[Row]:
    """Run both sides in turn below ``work`` and compare costs and outputs."""
    ours, theirs = work / "by-upcycle", work / "by-mergekit"
    config = work / "mergekit.yml"
    config.write_text(merge_config(dense), encoding="utf-8")

    def by_upcycle() -> Cost:
        shutil.rmtree(ours, ignore_errors=True)
        shape = ["--experts", str(EXPERTS), "--top-k", str(TOP_K), "--router", "random"]
        command: list[str | Path] = [UPCYCLE, "convert", dense, ours, "--method", "sparse_upcycling", *shape]
        return run([*command, "--no-verify", "--quiet"], _OFFLINE)

    def by_mergekit() -> Cost:
        shutil.rmtree(theirs, ignore_errors=True)
        return run([mergekit, config, theirs], _OFFLINE)

    by_upcycle(), by_mergekit()  # a first run compiles bytecode and fills the page cache
    costs = alternate(rounds, by_upcycle, by_mergekit)
    return [
        time_row("wall time", *costs, MOST_TIME),
        memory_row("peak memory", *costs, MOST_MEMORY),
        spread_row(*costs),
        *difference_rows(ours, theirs),
    ]


def merge_config(dense: Path) -> str:
    """mergekit's recipe: the same model as base and as every expert."""
    lines = [f"base_model: {dense}", "gate_mode: random", "dtype: bfloat16", f"experts_per_token: {TOP_K}", "experts:"]
    return "\n".join(lines + [f"  - source_model: {dense}"] * EXPERTS) + "\n"


if __name__ == "__main__":
    sys.exit(main())
