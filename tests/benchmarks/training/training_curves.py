"""Training runs side by side, their recipes as ``upcycle train`` takes them, their validation curves, a plot.

Every run has one thread, a few run at a time in a process each: so small a model does not use more. A run that is there is
continued, or only read.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml

from upcycle.architectures.stock import load_tokenizer
from upcycle.models.load import load_model
from upcycle.trainers.data.batches import open_validation
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.recipe.training_recipe import parse_train_recipe
from upcycle.trainers.run.loop import train
from upcycle.trainers.run.step_reports import read_log
from upcycle.trainers.run.validation import validate

_PLACES = ("--work", "--out", "--plot", "--jobs", "--rows")
PIECE = 800  # characters of held-out text, about a row of 256 tokens
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")


@dataclass(frozen=True)
class Curve:
    """Validation losses in nats per token by tokens trained on: ``points[tokens][domain]``."""

    points: Mapping[int, Mapping[str, float]]

    def losses(self, domain: str | None = None) -> list[tuple[int, float]]:
        """One domain's, or the mean of all domains."""
        found = sorted(self.points.items())
        return [(tokens, fmean(by.values()) if domain is None else by[domain]) for tokens, by in found]

    def tokens_to(self, loss: float) -> float | None:
        """Tokens until the mean loss is first reached, between measurements linearly; ``None``: never."""
        points = self.losses()
        for (before, above), (after, below) in pairwise(points):
            if below <= loss:
                return before + (after - before) * max(0.0, above - loss) / max(1e-12, above - below)
        return None


def write_domains(folder: Path, texts: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, Any]:
    """Documents to train on and held-out ones of every domain as files: the ``data`` of a recipe, in equal parts.

    Held-out documents are cut into pieces, in an order that tells nothing of them: the few thousand tokens that are validated on
    are from many documents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    domains: dict[str, Any] = {}
    for domain, (training, held_out) in texts.items():
        pieces = [text[at : at + PIECE] for text in held_out for at in range(0, len(text) - PIECE // 2, PIECE)]
        pieces.sort(key=lambda piece: hashlib.sha256(piece.encode()).digest())
        paths = []
        for side, documents in (("train", training), ("held-out", pieces)):
            path = folder / f"{domain}-{side}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
            paths.append(str(path))
        domains[domain] = {"text": paths[0], "validation": paths[1], "weight": 1 / len(texts)}
    return {"domains": domains, "cache": str(folder / "tokens")}


def run_recipe(
    model: str | Path,
    data: Mapping[str, Any],
    stage: Mapping[str, Any],
    shape: tuple[int, int],
    *,
    validated: int,
    saved: int = 1000,
    export: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A training run of one stage.

    Args:
        model: where it starts.
        data: what :func:`write_domains` returned.
        stage: see :func:`cosine`.
        shape: tokens in a row, and rows in a step.
        validated: every how many steps.
        saved: likewise.
        export: whether the trained model is written, too.
        more: other keys.
    """
    length, batch = shape
    return {
        "model": str(model),
        "data": {**data, "validation": {"tokens": 4096}},
        "length": length,
        "global_batch": batch,
        "micro_batch": batch,
        "stages": dict(stage),
        "saving": {"every": saved, "keep": 1, "export": export},
        "log": {"validation": validated},
        **more,
    }


def cosine(steps: int, rate: float, warmup: int = 10, **more: Any) -> dict[str, Any]:
    """A stage whose learning rate rises for one part in ``warmup`` of its steps, and falls to a tenth."""
    schedule = {"kind": "cosine", "warmup": max(1, steps // warmup), "floor": 0.1}
    return {"steps": steps, "learning_rate": rate, "schedule": schedule, **more}


def trained(recipes: Mapping[str, Mapping[str, Any]], work: Path, jobs: int) -> dict[str, Curve]:
    """Run every recipe to its end, ``jobs`` at a time, in ``work/NAME``, and read its curve.

    Raises:
        UpcycleError: a run failed.
    """
    work.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        curves = pool.map(_run, recipes, recipes.values(), [work] * len(recipes))
        return dict(zip(recipes, curves, strict=True))


def _run(name: str, recipe: Mapping[str, Any], work: Path) -> Curve:
    output, finished = work / name, work / f"{name}.finished"
    told = yaml.safe_dump({**recipe, "output": str(output)}, sort_keys=False)
    started = time.perf_counter()
    if not (finished.exists() and finished.read_text(encoding="utf-8") == told):
        train({**recipe, "output": str(output)})
        finished.write_text(told, encoding="utf-8")
    curve = read_curve(output)
    print(
        f"{name}: {curve.losses()[-1][1]:.4f} nats, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True
    )
    return curve


def read_curve(run: Path) -> Curve:
    """What a run of ``upcycle train`` has logged of its validations."""
    points: dict[int, dict[str, float]] = {}
    for line in read_log(run / "log.jsonl"):
        if line["kind"] == "validation":
            losses = {key.partition("/")[2]: value for key, value in line.items() if key.startswith("validation/")}
            points[line["tokens"]] = losses
    return Curve(points)


def command(benchmark: str, arguments: Sequence[str]) -> str:
    """How a table is made again: the command that made it, without what only says where things are kept."""
    kept, skip = [], False
    for argument in arguments:
        if not (skip or argument in _PLACES):
            kept.append(shlex.quote(argument))
        skip = argument in _PLACES
    return " ".join(["python -P", f"tests/benchmarks/{benchmark}", *kept])


def write_page(path: Path, title: str, benchmark: str, text: str) -> None:
    """A benchmark's output as a page that says which command, this one, prints it."""
    made_by = command(benchmark, sys.argv[1:])
    path.write_text(f"# {title}\n\n`{made_by}` prints:\n\n{text}", encoding="utf-8")


def plot(
    path: Path,
    title: str,
    panels: Sequence[str | None],
    curves: Mapping[str, Sequence[Curve]],
    lines: Mapping[str, float] | None = None,
) -> None:
    """Draw the loss over tokens as PNG, a panel per domain (``None``: their mean); of several seeds the mean, and the range shaded."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot
    from PIL import Image

    figure, row = pyplot.subplots(
        1, len(panels), figsize=(1 + 4.2 * len(panels), 3.6), dpi=96, layout="constrained", squeeze=False
    )
    for axes, domain in zip(row[0], panels, strict=True):
        for color, (name, seeds) in zip(COLORS, curves.items(), strict=False):
            found = [each.losses(domain) for each in seeds]
            tokens = [at / 1000 for at, _ in found[0]]
            columns = list(zip(*([loss for _, loss in each] for each in found), strict=True))
            axes.plot(tokens, [fmean(column) for column in columns], label=name, linewidth=1.3, color=color)
            if len(seeds) > 1:
                axes.fill_between(
                    tokens, [*map(min, columns)], [*map(max, columns)], color=color, alpha=0.2, linewidth=0
                )
        for name, loss in (lines or {}).items():
            axes.axhline(loss, color="black", linewidth=0.8, linestyle=":", label=name)
        axes.set(
            xlabel="thousand tokens", ylabel="validation loss, nats per token", title=domain or "mean of the domains"
        )
    row[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.canvas.draw()
    # A palette keeps the picture under 60 KB; it has few colours.
    drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    drawn.quantize(64, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


def validation_loss(model: Path, recipe: Mapping[str, Any]) -> dict[str, float]:
    """A model's loss on every domain's held-out text, as a run of ``recipe`` measures it."""
    told = parse_train_recipe({**recipe, "model": str(model), "output": "unused"}, "recipe")
    batches = open_validation(told.data, load_tokenizer(model), length=told.length)
    device = torch.device("cpu")
    return validate(
        load_model(model, torch.float32, device, experts="auto", training=True), batches, Ranks(0, 1, device)
    )
