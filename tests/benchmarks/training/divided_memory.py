"""A model that is larger than the memory of a rank is trained on two ranks, each of which may allocate less than its weights take.

A random Mixtral (``--gigabytes`` of fp32 weights, by default 3, stored in bfloat16) trains its routers for two steps on two ranks of
this machine. Every process may allocate ``--share`` of the bytes of these (``ulimit -d``; by default 0.95). Under ZeRO's stage 3, the
weights are divided while they are read, and the run ends; under stage 1 every rank loads all of them, and it must not. The same model
is then its own teacher, under twice the limit, and divided alike. Prints the peak of every rank against the weights, and passes
when every run ended as it should.

    python -P tests/benchmarks/training/divided_memory.py

It needs twice the gigabytes of memory and of disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

HIDDEN, WIDTH, EXPERTS, HEADS = 1024, 1792, 4, 16
LAYER = 3 * EXPERTS * HIDDEN * WIDTH + 4 * HIDDEN * HIDDEN  # elements; norms and routers are small
SMALL = dict.fromkeys(
    (
        "reduce_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
    ),
    10_000,
)


def write_model(folder: Path, gigabytes: float) -> int:
    """Write the model, one layer in memory at a time; returns the bytes of its weights in fp32."""
    import json

    import torch
    from safetensors.torch import save_file
    from transformers import MixtralConfig

    from upcycle.architectures.stock import empty_model
    from upcycle.files.locate import DEMO_FOLDER

    folder.mkdir()
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=max(2, round(gigabytes * 1e9 / 4 / LAYER)),
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_local_experts=EXPERTS,
        architectures=["MixtralForCausalLM"],
    )
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / "model" / name, folder / name)
    shapes = {name: value.shape for name, value in empty_model(config.to_dict(), "the model").state_dict().items()}
    by_file: dict[str, list[str]] = {}
    for name in shapes:
        place = name.split(".")[2] if ".layers." in name else "outside"
        by_file.setdefault(f"model-{place}.safetensors", []).append(name)
    draw = torch.Generator().manual_seed(0)
    for file, names in by_file.items():
        tensors = {}
        for name in names:
            value = torch.empty(shapes[name], dtype=torch.bfloat16)
            tensors[name] = value.fill_(1) if "norm" in name else value.normal_(0, 0.02, generator=draw)
        save_file(tensors, folder / file, {"format": "pt"})
    weights = {name: file for file, names in by_file.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return 4 * sum(shape.numel() for shape in shapes.values())


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, the largest resident set of each rank in bytes, and the end of what it said."""

    code: int
    peaks: list[int]
    said: str


def train(model: Path, work: Path, name: str, cap: int, zero: int, teacher: bool) -> Ended:
    """Train on two ranks, each of which may allocate ``cap`` bytes."""
    from training_runs import COMMAND, recipe_for

    stage: dict[str, Any] = {"train": ["router"], "steps": 2, "losses": {}}
    if teacher:
        stage["distillation"] = {"parent": str(model), "logits": 1.0}
    settings = {key: size for key, size in SMALL.items() if zero == 3 or not key.startswith("stage3")}
    keys = {
        "zero": {"stage": zero, "settings": settings},
        "activation_checkpointing": True,
        "global_batch": 2,
        "micro_batch": 1,
        "stage": stage,
    }
    recipe = recipe_for(model, work / name, **keys)
    path = work / f"{name}.yaml"
    path.write_text(recipe.dump())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "2"}
    with subprocess.Popen(
        ["bash", "-c", f'ulimit -d {cap // 1024} && exec "$@"', "bash", *COMMAND, str(path), "--nproc", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        peaks: dict[int, int] = {}
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, done, peaks))
        watcher.start()
        assert process.stderr is not None
        said = process.stderr.read()
        code = process.wait()
        done.set()
        watcher.join()
    shutil.rmtree(work / name)
    return Ended(code, sorted(peaks.values(), reverse=True)[:2], said.strip()[-600:])


def _watch(pid: int, done: threading.Event, peaks: dict[int, int]) -> None:
    while not done.wait(0.1):
        try:
            children = psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            continue
        for child in children:
            try:
                lines = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii").splitlines()
            except OSError:
                continue
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")}
            peaks[child.pid] = max(peaks.get(child.pid, 0), sizes.get("VmHWM", 0))


def main() -> int:
    """Print the table; returns 1 if a run ended otherwise than it should."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--share", type=float, default=0.95)
    told = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        weights = write_model(work / "model", told.gigabytes)
        cap = int(told.share * weights)
        print(
            f"weights {weights / 1e9:.2f} GB in fp32; a process may allocate {cap / 1e9:.2f} GB, twice that with the teacher\n"
        )
        print("| run on two ranks | weights | limit of a rank | ended | peak of a rank | of the weights |")
        print("|---|---|---|---|---|---|")
        for name, zero, teacher, ends in (
            ("ZeRO 3", 3, False, True),
            ("ZeRO 1", 1, False, False),
            ("ZeRO 3, with a teacher as large", 3, True, True),
        ):
            times = 2 if teacher else 1
            ended = train(work / "model", work, f"zero-{zero}-{times}", times * cap, zero, teacher)
            peak = max(ended.peaks, default=0)
            how = "trained" if ended.code == 0 else f"no (exit code {ended.code})"
            cells = (f"{times * weights / 1e9:.2f} GB", f"{times * cap / 1e9:.2f} GB", how, f"{peak / 1e9:.2f} GB")
            print(f"| {name} | {' | '.join(cells)} | {peak / weights / times:.0%} |", flush=True)
            if (ended.code == 0) != ends:
                good = False
                print(ended.said, file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
