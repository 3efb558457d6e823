"""Steps of training: ``upcycle train`` against the Hugging Face ``Trainer`` on the same model, batches, optimizer and dtype.

The model is SmolLM2-135M as a Mixtral of 4 copied experts, 2 per token, of the first ``--layers`` decoder layers (with all 30,
three contenders do not fit into memory side by side). ``Trainer`` runs with ``experts_implementation`` ``eager`` and
``grouped_mm``; the better one counts (``batched_mm`` copies experts' weights for every token: 11 GB per layer of 512 tokens).
All train every weight in fp32 with torch's fused AdamW, clipped at norm 1, on the same packed rows with the same position ids,
without auxiliary losses; ours has ``keep_memory: true``, counts the experts' loads and logs every step; theirs logs nothing. With
``--dtype bfloat16``, for CPUs that multiply it natively, weights and the optimizer stay fp32 and both compute in bfloat16: ours by
its recipe's ``dtype``, ``Trainer`` by ``bf16=True``. Each
contender is a process of its own with one thread; they take one step at a time in turns, and processor time is what is measured,
so that it matters little what else runs. A step is the whole iteration, the next batch included; the table has medians.

The profile is ours: what forward, backward, clipping with the optimizer's step, and the loop around them take of an iteration; then
the operators of one step by their own time. Passes when ours has 1.1 times the tokens per second, and the loop takes less than 3%.

    python -P tests/benchmarks/training/train_speed.py
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

THEIRS = ("eager", "grouped_mm")
LEAST, MOST_OVERHEAD = 1.1, 0.03
PARTS = ("forward", "backward", "optimizer")


def converted(layers: int, work: Path) -> Path:
    """The first layers of SmolLM2, converted."""
    import torch
    from smollm2 import dense_folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import upcycle
    from upcycle.architectures.stock import quiet_transformers

    dense, out = work / f"dense-{layers}", work / f"moe-{layers}"
    if not out.exists():
        with quiet_transformers():
            cut = AutoModelForCausalLM.from_pretrained(dense_folder(), num_hidden_layers=layers, dtype=torch.bfloat16)
        cut.save_pretrained(dense)
        AutoTokenizer.from_pretrained(dense_folder()).save_pretrained(dense)
        upcycle.convert(str(dense), out, experts=4, top_k=2, verification={"enabled": False})
    return out


def recipe(model: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Ours."""
    return {
        "model": str(model),
        "output": str(work / "run"),
        "data": {"domains": {"demo": "demo"}, "validation": {"fraction": 0}, "cache": str(work / "tokens")},
        "length": options.length,
        "global_batch": options.rows,
        "micro_batch": options.rows,
        "stages": {"steps": options.steps + 2, "learning_rate": 1e-5, "schedule": {"kind": "constant"}},
        "keep_memory": True,
        "dtype": options.dtype,
        "saving": {"export": False},
    }


class Turn:
    """Ends an iteration: says what it took, and waits until it is this process's turn again."""

    def __init__(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.begun = 0.0

    def __call__(self, *_: object, **__: object) -> None:
        seconds = time.process_time() - self.begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        print(json.dumps({"seconds": seconds, "peak": peak, **self.parts}), file=sys.stderr, flush=True)
        if sys.stdin.readline().strip() != "go":
            sys.exit(0)
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.begun = time.process_time()

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work``, whose time is that of ``part``."""

        def run(*arguments: Any, **named: Any) -> Any:
            begun = time.process_time()
            try:
                return work(*arguments, **named)
            finally:
                self.parts[part] += time.process_time() - begun

        return run


def ours(told: dict[str, Any], profiled: bool) -> None:
    """A worker that trains by the loop of ``upcycle train``."""
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    from upcycle.trainers.run.loop import train
    from upcycle.trainers.run.step import Stepper

    turn = Turn()
    for part, owner, name in (
        ("forward", Stepper, "_losses"),
        ("backward", DeepSpeedEngine, "backward"),
        ("optimizer", Stepper, "_clip_undivided"),
        ("optimizer", DeepSpeedEngine, "step"),
    ):
        setattr(owner, name, turn.timed(part, getattr(owner, name)))

    def say(line: str) -> None:
        if line.startswith("train "):
            turn()

    if not profiled:
        train(told, say, restart=True)
        return
    step = Stepper.step

    def traced(self: Any, engine: Any, batches: Any, progress: float) -> Any:
        if progress == 0:
            return step(self, engine, batches, progress)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            step(self, engine, batches, progress)
        print(operators(trace.key_averages()))
        sys.exit(0)

    Stepper.step = traced  # type: ignore[method-assign]
    train(told, restart=True)


def operators(events: Any) -> str:
    """The operators that took most of a step, with their share."""
    total = sum(event.self_cpu_time_total for event in events)
    ranked = sorted(events, key=lambda event: -event.self_cpu_time_total)[:10]
    return "\n".join(f"{event.self_cpu_time_total / total:6.1%}  {event.count:5} x  {event.key}" for event in ranked)


def theirs(told: dict[str, Any], experts: str, work: Path) -> None:
    """A worker that trains by ``Trainer``, on the batches that the recipe's stream gives."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from upcycle.architectures.stock import load_tokenizer
    from upcycle.trainers.data.batches import open_stream
    from upcycle.trainers.recipe.training_recipe import parse_train_recipe

    own = parse_train_recipe(told, "recipe")
    steps, model = own.steps_of(own.stages[0]), Path(own.model)
    stream = open_stream(
        own.data,
        load_tokenizer(model),
        length=own.length,
        micro_batch=own.micro_batch,
        rank=0,
        world_size=1,
        seed=own.seed,
    )
    rows = []
    for batch in (stream.next_batch() for _ in range(steps)):
        labels = batch.ids.masked_fill(~batch.mask, -100)
        rows += [
            {"input_ids": ids, "labels": each, "position_ids": positions}
            for ids, each, positions in zip(batch.ids, labels, batch.positions, strict=True)
        ]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation=experts)
    loaded.config.use_cache = False
    turn = Turn()

    class Gate(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            turn()

    arguments = TrainingArguments(
        output_dir=str(work / experts),
        per_device_train_batch_size=own.micro_batch,
        max_steps=steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=own.dtype == "bfloat16",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=loaded, args=arguments, train_dataset=rows, callbacks=[Gate()])
    trainer._get_train_sampler = lambda *_: None  # type: ignore[method-assign]  # in the stream's order
    trainer.train()


class Worker:
    """A contender's process."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        command = [sys.executable, "-P", __file__, *arguments, "--worker", name]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.name, self.steps = name, list[dict[str, float]]()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads},
        )
        self._wait()

    def step(self, counts: bool) -> None:
        """Let it take one step."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        found = self._wait()
        if counts:
            self.steps.append(found)

    def end(self) -> None:
        """It need not go on."""
        self._process.kill()
        self._process.wait()

    def _wait(self) -> dict[str, float]:
        lines = []
        assert self._process.stderr
        for line in self._process.stderr:
            if line.startswith('{"seconds"'):
                found: dict[str, float] = json.loads(line)
                return found
            lines.append(line)
        raise RuntimeError(f"{self.name} ended:\n{''.join(lines[-30:])}")

    def typical(self, part: str = "seconds") -> float:
        """Median seconds."""
        return median(each[part] for each in self.steps)


def measured(workers: list[Worker], steps: int) -> None:
    """Everybody's steps in turns; each one's first, which allocates, does not count."""
    for number in range(steps + 1):
        for worker in workers:
            worker.step(counts=number > 0)
            if number:
                print(f"{worker.name}: {worker.steps[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    for worker in workers:
        worker.end()


def main() -> int:
    """Measure and print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="decoder layers of 30")
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=5, help="steps of each that are timed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="that both compute in")
    parser.add_argument("--against", nargs="+", choices=THEIRS, default=list(THEIRS))
    parser.add_argument(
        "--work", type=Path, help="keep the model and the results here: they are added to the next call's"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        told = recipe(work / f"moe-{options.layers}", work, options)
        if options.worker in ("upcycle", "profile"):
            ours(told, options.worker == "profile")
            return 0
        if options.worker:
            theirs(told, options.worker, work)
            return 0
        return compared(work, options)


def compared(work: Path, options: argparse.Namespace) -> int:
    """Start the workers, and print what they found."""
    from measure import Row, mega, report

    converted(options.layers, work)
    shared = [f"--{name}={getattr(options, name)}" for name in ("layers", "rows", "length", "steps", "dtype", "work")]
    shared[-1] = f"--work={work}"
    workers = [Worker(name, shared) for name in ("upcycle", *options.against)]
    kept = work / f"steps-{options.layers}-{options.rows}-{options.length}-{options.dtype}.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    measured(workers, options.steps)
    for worker in workers:
        worker.steps += before.get(worker.name, [])
    kept.write_text(json.dumps(before | {worker.name: worker.steps for worker in workers}))
    own, others = workers[0], workers[1:]
    best = min(others, key=lambda worker: worker.typical())
    tokens = options.rows * options.length

    def row(other: Worker, least: float | None) -> Row:
        ratio = other.typical() / own.typical()
        cells = [f"{tokens / worker.typical():,.0f} tokens/s" for worker in (own, other)]
        target = f"at least {least:.2f}x" if least else ""
        return Row(f"Trainer, {other.name}", *cells, f"{ratio:.2f}x", target, ratio >= least if least else None)

    rows = [row(other, LEAST if other is best else None) for other in others]
    peaks = own.typical("peak"), best.typical("peak")
    rows.append(Row(f"peak memory ({best.name})", *map(mega, peaks), f"{peaks[0] / peaks[1]:.2f}x", ""))
    parts = {part: median(step[part] / step["seconds"] for step in own.steps) for part in PARTS}
    rest = median(1 - sum(step[part] for part in PARTS) / step["seconds"] for step in own.steps)
    rows += [Row(f"  {part}", f"{share:.1%}", "", "", "") for part, share in parts.items()]
    rows.append(Row("  the loop", f"{rest:.1%}", "", "", f"below {MOST_OVERHEAD:.0%}", rest < MOST_OVERHEAD))
    title = f"{options.layers} layers, {options.rows} x {options.length} tokens in {options.dtype}, medians of {len(own.steps)} steps"
    code = report(title, ("upcycle", "Trainer"), rows)
    command = [sys.executable, "-P", __file__, *shared, "--worker", "profile"]
    print("\none step of ours by operator:")
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    print("\n".join(line for line in done.stdout.splitlines() if "% " in line))
    return code


if __name__ == "__main__":
    sys.exit(main())
