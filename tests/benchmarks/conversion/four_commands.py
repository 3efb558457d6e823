"""Runs four commands and prints a hash of every weight that they write: before and after a change that must change nothing.

    python tests/benchmarks/conversion/four_commands.py --command .venv/bin/upcycle --out before
    python tests/benchmarks/conversion/four_commands.py --command .venv/bin/upcycle --out after --same-as before

A conversion by copies, a calibrated split, a mix of two sources and a training run of four steps, all of the demo model.
Ends with 1 where a byte differs. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

COMMANDS = {
    "copies": ["convert", "demo", "{out}/copies", "--experts", "4", "--top-k", "2", "--param", "noise=0.01"],
    "split": ["convert", "split_50", "{out}/split", "--source", "demo"],
    "mix": [
        *("convert", "demo", "{out}/mix", "--method", "symphony", "--sources", "demo,{out}/perturbed"),
        *("--calibration", "prose,code", "--param", "chunks=2"),
    ],
    "train": [
        *("train", "heal_split", "--model", "{out}/split", "--output", "{out}/train", "--set", "data=prose"),
        *("--set", "length=128", "--set", "global_batch=4", "--set", "micro_batch=2"),
        *("--set", "stages.0.tokens=2048", "--set", "stages.0.schedule.warmup=1"),
    ],
}


def perturbed(out: Path) -> None:
    """Write a second source: the demo model, every number of which is multiplied by its own ``1 + 0.1 N(0, 1)``."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    from upcycle.files.locate import DEMO_FOLDER

    folder = out / "perturbed"
    shutil.copytree(DEMO_FOLDER / "model", folder)
    rng = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    for name in sorted(tensors):
        tensor = tensors[name]
        tensors[name] = (tensor.float() * (1 + 0.1 * torch.randn(tensor.shape, generator=rng))).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every safetensors file below ``out``, by its path there."""
    files = sorted(out.rglob("*.safetensors"))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", default="upcycle", help="the upcycle command to run")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for what is made")
    parser.add_argument("--same-as", type=Path, help="what an earlier run made")
    asked = parser.parse_args()
    out = asked.out.absolute()
    out.mkdir(parents=True)
    perturbed(out)
    for name, words in COMMANDS.items():
        command = [asked.command, *(word.format(out=out) for word in words)]
        print(f"{name}: {' '.join(words)}", flush=True)
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    made = hashes(out)
    before = hashes(asked.same_as) if asked.same_as else made
    for path, digest in made.items():
        print(f"{digest[:16]}  {'' if before.get(path) == digest else 'DIFFERS  '}{path}")
    return int(before != made)


if __name__ == "__main__":
    sys.exit(main())
