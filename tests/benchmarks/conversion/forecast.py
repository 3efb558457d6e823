"""Forecast against measured: how long conversions of the demo model and of SmolLM2-135M take, phase by phase.

    python -P tests/benchmarks/conversion/forecast.py [--smollm2 FOLDER] [--tokens N] [--out docs/measured/forecast.md]

With one thread (``OMP_NUM_THREADS=1``), both are the process's own time, which other programs do not lengthen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from upcycle.conversion.convert import run_recipe
from upcycle.evaluation.forecast.forecast import forecast, timed_job
from upcycle.hardware.clocks import clock
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import Recipe, parse_recipe, read_recipe
from upcycle.recipe.shipped_recipes import shipped

SMOLLM2 = Path.home() / ".cache" / "upcycle-tests" / "SmolLM2-135M-Instruct"
RECIPES = ("split_50", "split_25", "mixtral-4x")
ALLOWED = 0.30
ABOUT = (  # the head of the page
    "# Forecasts of conversions",
    "",
    "What `upcycle plan` says a conversion takes, beside what it took, and how long it took to say so: "
    "`OMP_NUM_THREADS=1 python -P tests/benchmarks/conversion/forecast.py --out docs/measured/forecast.md`.",
    "",
)


class Phases(Progress):
    """Adds up what every phase takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._now = clock()

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[title] = self.seconds.get(title, 0.0) + self._now() - start


def measured(recipe: Recipe) -> tuple[float, dict[str, float]]:
    """Return the seconds of a conversion, and those of its phases."""
    phases, now = Phases(), clock()
    with TemporaryDirectory() as folder:
        start = now()
        run_recipe(recipe, Path(folder) / "out", progress=phases)
        return now() - start, phases.seconds


def recipe_of(name: str, source: str, tokens: int | None) -> Recipe:
    """Return a shipped recipe for a model, on so many calibration tokens."""
    content: dict[str, Any] = {**read_recipe(shipped("convert")[name]), "source": source}
    if tokens and "calibration" in content:
        content["calibration"] = {**content["calibration"], "tokens": tokens}
        content["parameters"] = {**content["parameters"], "tokens": tokens // 2}
        content["router"] = {**content["router"], "parameters": {"tokens": tokens}}
    return parse_recipe(content, name)


def main() -> None:
    """Print a row per conversion, and fail where one is off by more than is allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", type=Path, default=SMOLLM2)
    parser.add_argument("--tokens", type=int, help="of calibration  [default: the recipes']")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--models", nargs="+", default=["demo", "SmolLM2-135M"])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    sources = {"demo": "demo", "SmolLM2-135M": str(asked.smollm2)}
    threads = torch.get_num_threads()
    lines = ["| model | recipe | forecast | measured | off by | to forecast |", "|---|---|---|---|---|---|"]
    worst = 0.0
    measured(recipe_of("mixtral-4x", "demo", None))  # in a first conversion, libraries are loaded
    for model in asked.models:
        for name in asked.recipes:
            recipe, now = recipe_of(name, sources[model], asked.tokens), clock()
            start = now()
            found = forecast(*timed_job(recipe))
            took = now() - start
            seconds, phases = measured(recipe)
            off = found.seconds / seconds - 1
            worst = max(worst, abs(off))
            told = f"{found.seconds:.1f} s | {seconds:.1f} s | {off:+.0%} | {took:.1f} s"
            lines.append(f"| {model} | `{name}` | {told} |")
            sys.stdout.write(lines[-1] + "\n")
            for title in {**found.phases, **phases}:
                sys.stdout.write(f"  {title}: {found.phases.get(title, 0.0):.2f} of {phases.get(title, 0.0):.2f}\n")
            sys.stdout.flush()
    lines += ["", f"- {threads} thread{'s' * (threads != 1)}, {clock().__name__}, torch {torch.__version__}"]
    lines += [f"- calibration tokens: {asked.tokens or 'as the recipes say, or as many as the texts hold'}"]
    lines += [f"- worst: {worst:.0%} (allowed: {ALLOWED:.0%})"]
    sys.stdout.write("\n".join(lines) + "\n")
    if asked.out:
        asked.out.write_text("\n".join([*ABOUT, *lines]) + "\n", encoding="utf-8")
    sys.exit(worst > ALLOWED)


if __name__ == "__main__":
    main()
