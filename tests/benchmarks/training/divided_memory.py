"""Models that are larger than the memory of a rank are trained on two ranks of this machine.

Random Mixtrals take two steps of two rows in fp32. Every rank may allocate so much and no more (``ulimit -d``): a share of the
training state, which is the weights and, of those that train, gradients, the optimizer's fp32 weights, and AdamW's two states.
In the first runs only routers train, so that the state is little more than the weights, and a rank may allocate less than
these take; in the last ones everything trains. Under DeepSpeed's ZeRO 3 two ranks must end, with the losses of one rank without a
limit, to 1e-5. With the same limit, stage 1, where every rank loads the whole model, and one rank must run out of memory.

The peak of a rank is what it allocated and touched, without the files of libraries. Beside it is what `plan train` says, which does
not know the process itself: what a rank holds that trains almost nothing is printed first.

    python -P tests/benchmarks/training/divided_memory.py --out docs/measured/divided_memory.md

It needs memory for twice the state and disk for three times the weights.
"""

from __future__ import annotations

import argparse
import json
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

HIDDEN, WIDTH, EXPERTS, HEADS = 512, 1024, 4, 8
LAYER = 3 * EXPERTS * HIDDEN * WIDTH + 4 * HIDDEN * HIDDEN  # elements; norms and routers are small
STATE = 5  # fp32 numbers for a weight that trains: itself, its gradient, the optimizer's weight and its two states
MOST = 1e-5  # between losses
SMALL = {
    "reduce_bucket_size": 5_000_000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 10_000,
    "stage3_max_reuse_distance": 10_000,
    "stage3_param_persistence_threshold": 10_000,
    "sub_group_size": 5_000_000,
}


def write_model(folder: Path, gigabytes: float) -> int:
    """Write a model in bfloat16, one layer in memory at a time; returns its number of weights."""
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
        num_hidden_layers=max(1, round(gigabytes * 1e9 / 4 / LAYER)),
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
    return sum(shape.numel() for shape in shapes.values())


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, the most that a rank held of its own, its losses, the plan's bytes, the end of what it said."""

    code: int
    peak: int
    losses: list[float]
    planned: float
    said: str

    @property
    def how(self) -> str:
        """For the table."""
        if not self.code:
            return "trained"
        return "out of memory" if "out of memory" in self.said else "failed otherwise"


def train(model: Path, work: Path, cap: int, ranks: int, zero: int, what: str) -> Ended:
    """Train on ranks, each of which may allocate ``cap`` bytes; 0: as many as it wants."""
    from training_runs import COMMAND, losses, recipe_for

    from upcycle.trainers.forecast.plan_training import plan_training

    stage: dict[str, Any] = {"train": [what], "steps": 2, "losses": {}, "learning_rate": 1e-4}
    settings = {key: size for key, size in SMALL.items() if zero == 3 or key == "reduce_bucket_size"}
    keys: dict[str, Any] = {
        "zero": {"stage": zero, "settings": settings if zero else {}},
        "activation_checkpointing": True,
        "global_batch": 2,
        "micro_batch": 1,
        "stage": stage,
        "saving": {"every": 100, "export": False},
        "data": {"validation": {"fraction": 0}},
    }
    recipe = recipe_for(model, work / "run", **keys)
    path = work / "run.yaml"
    path.write_text(recipe.dump())
    own = plan_training(recipe, str(ranks)).own
    limit = f"ulimit -d {cap // 1024} && " if cap else ""
    with subprocess.Popen(
        ["bash", "-c", f'{limit}exec "$@"', "bash", *COMMAND, str(path), "--nproc", str(ranks)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        peaks: list[int] = [0]
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, done, peaks))
        watcher.start()
        try:
            assert process.stderr is not None
            said = process.stderr.read()
            code = process.wait()
        finally:
            done.set()
            watcher.join()
    found = [] if code else losses(recipe)
    shutil.rmtree(work / "run")
    return Ended(code, max(peaks), found, own.memory.total if own else 0.0, said.strip()[-3000:])


def _watch(pid: int, done: threading.Event, peaks: list[int]) -> None:
    """Keep the largest anonymous memory of any process of a tree: a rank's own, without the libraries' files."""
    while not done.wait(0.02):
        try:
            tree = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        except psutil.Error:
            continue
        for one in tree:
            try:
                lines = Path(f"/proc/{one}/status").read_text(encoding="ascii").splitlines()
            except OSError:  # it ended
                continue
            peaks += [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
        peaks[:] = [max(peaks)]


def main() -> int:
    """Print the table; returns 1 if a run ended otherwise than it should, or with other losses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of the weights of which routers train, in fp32")
    parser.add_argument("--all", type=float, default=0.6, help="gigabytes of those that all train")
    parser.add_argument("--share", type=float, default=0.95, help="of the training state that a rank may allocate")
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    good, said = True, []

    def say(line: str) -> None:
        said.append(line)
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_model(work / "little", 0.01)
        little = train(work / "little", work, 0, 2, 3, "router")
        process = little.peak - little.planned
        say(f"A rank that trains almost nothing holds {process / 1e9:.2f} GB: Python, libraries, text.\n")
        say("| trains | weights | state | run | a rank may allocate | ended | losses | peak of a rank | plan |")
        say("|---|---:|---:|---|---:|---|---|---:|---:|")
        for what, size, refused in (("router", told.gigabytes, (2, 1)), ("all", told.all, (1, 0))):
            model = work / what
            weights = 4 * write_model(model, size)
            state = weights * (STATE if what == "all" else 1)
            found = []
            for ranks, zero, limited in ((2, 3, True), (*refused, True), (1, 0, False)):
                cap = int(told.share * state) if limited else 0
                run = train(model, work, cap, ranks, zero, what)
                cells = (
                    what,
                    f"{weights / 1e9:.2f} GB",
                    f"{state / 1e9:.2f} GB",
                    f"ZeRO {zero}, {ranks} ranks" if ranks > 1 else "one rank",
                    f"{cap / 1e9:.2f} GB" if cap else "no limit",
                    run.how,
                    ", ".join(f"{loss:.6f}" for loss in run.losses) or "-",
                    f"{run.peak / 1e9:.2f} GB",
                    f"{run.planned / 1e9:.2f} GB",
                )
                say(f"| {' | '.join(cells)} |")
                if run.how != ("out of memory" if limited and zero < 3 else "trained"):
                    good = False
                    print(run.said, file=sys.stderr)
                found += [run.losses] if run.losses else []
            far = max((abs(a / b - 1) for a, b in zip(found[0], found[-1], strict=True)), default=1.0)
            good &= len(found) == 2 and far <= MOST
            shutil.rmtree(model)
    if told.out:
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        from training_curves import write_page

        write_page(
            told.out,
            "Training a model that is larger than a rank's memory",
            "training/divided_memory.py",
            "\n".join(said) + "\n",
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
