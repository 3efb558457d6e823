"""SmolLM2-135M into a Mixtral of four copies, by upcycle and by mergekit-moe: time, peak memory, and the same bits.

Both read the same dense bfloat16 folder and write top-2 of 4 experts with a random router and the tokenizer, each in a
process of its own, in turn. upcycle does not verify here, since mergekit has no such step; it does hash what it writes
and waits for the disk (fsync), which mergekit does not.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import UPCYCLE, Cost, Row, alternate, memory_row, report, run, spread_row, time_row
from smollm2 import cache_folder

MERGEKIT = ("torch==2.13.0", "mergekit==0.1.5")
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
    mergekit = mergekit_program(work / "mergekit-environment")
    # In a process of its own: it may need torch, see measure.py.
    smollm2 = [sys.executable, str(Path(__file__).resolve().parents[1] / "smollm2.py")]
    made = subprocess.run(smollm2, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    dense = Path(made.stdout.splitlines()[-1])
    with tempfile.TemporaryDirectory(dir=work) as folder:
        rows = compare(dense, mergekit, Path(folder), arguments.rounds)
    title = f"SmolLM2-135M x {EXPERTS} -> Mixtral, bfloat16, medians of {arguments.rounds} runs each"
    return report(title, ("upcycle", MERGEKIT[-1].replace("==", " ")), rows)


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


def mergekit_program(environment: Path) -> Path:
    """``mergekit-moe`` in a virtual environment of its own, installed when it is not there yet."""
    ready = environment / "ready"
    wanted = "\n".join(MERGEKIT)
    if not ready.exists() or ready.read_text(encoding="utf-8") != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        for requirement in MERGEKIT:
            pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", requirement]
            subprocess.run(pip, check=True, stdout=sys.stderr)
        ready.write_text(wanted, encoding="utf-8")
    return environment / "bin" / "mergekit-moe"


def merge_config(dense: Path) -> str:
    """mergekit's recipe: the same model as base and as every expert."""
    lines = [f"base_model: {dense}", "gate_mode: random", "dtype: bfloat16", f"experts_per_token: {TOP_K}", "experts:"]
    return "\n".join(lines + [f"  - source_model: {dense}"] * EXPERTS) + "\n"


def difference_rows(ours: Path, theirs: Path) -> list[Row]:
    """Count the tensors whose bits differ; of the routers, random on both sides, only shape and dtype must agree."""
    import torch
    from safetensors.torch import load_file

    a, b = (_fused(load_file(folder / "model.safetensors")) for folder in (ours, theirs))
    differing: dict[bool, list[str]] = {True: [], False: []}
    total = dict.fromkeys(differing, 0)
    for name in sorted(a.keys() | b.keys()):
        is_expert = ".experts." in name
        total[is_expert] += 1
        same = name in a and name in b and a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        if same and not name.endswith("mlp.gate.weight"):
            same = torch.equal(a[name].view(torch.int16), b[name].view(torch.int16))
        if not same:
            print(f"differs: {name}", file=sys.stderr)
            differing[is_expert].append(name)
    return [
        Row(f"{kind} tensors that differ", "", "", f"{len(names)} of {total[is_expert]}", "none", not names)
        for kind, (is_expert, names) in zip(("expert", "other"), differing.items(), strict=True)
    ]


def _fused(tensors: dict[str, Any]) -> dict[str, Any]:
    """All experts of a layer in one tensor, as transformers 5 keeps them in memory and mergekit writes them."""
    import torch

    renamed = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in tensors.items()}
    for first in [name for name in renamed if name.endswith(".experts.0.w1.weight")]:
        prefix = first.removesuffix(".0.w1.weight")
        w1, w2, w3 = ([renamed.pop(f"{prefix}.{e}.{w}.weight") for e in range(EXPERTS)] for w in ("w1", "w2", "w3"))
        renamed[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
        renamed[f"{prefix}.down_proj"] = torch.stack(w2)
    return renamed


if __name__ == "__main__":
    sys.exit(main())
