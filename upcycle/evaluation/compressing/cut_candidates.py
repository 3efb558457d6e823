"""Makes the candidates of a comparison of compressions: methods, how much they keep, with and without the refit."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.conversion.compress_conversion import CompressConversion
from upcycle.errors import RefusalError, UsageError
from upcycle.methods.compressing.base import WRAPPED, CutSizes
from upcycle.planning.job import method_of
from upcycle.recipe.conversion_recipe import Recipe, parse_recipe
from upcycle.recipe.recipe_parts import CalibrationRecipe
from upcycle.registry import METHODS, load, suggestion

BASELINE = "random_experts"
REFITS = ("none", "down")


@dataclass(frozen=True)
class CutCandidate:
    """Holds one way to compress a MoE.

    Attributes:
        method: its name, with parameters as the user gave them (``slim:score=leverage``).
        keep: the part that is kept.
        refit: ``down`` or ``none``.
        job: what it would write, planned without observations.
    """

    method: str
    keep: float
    refit: str
    job: CompressConversion

    @property
    def baseline(self) -> bool:
        """Whether it is what any method has to beat."""
        return self.method.partition(":")[0] == BASELINE

    @property
    def sizes(self) -> CutSizes:
        """The experts, experts per token and neurons of an expert that it leaves."""
        job = self.job
        return (job.compression.like if job.wraps else job.compression.sizes)(job.moe, job.keep)


class CutOptions:
    """Makes candidates that read the same text.

    Args:
        checkpoint: the MoE.
        source: its name, as the user gave it.
        calibration: the texts.
        tokens: calibration tokens.
        window: tokens per window.
        seed: of random choices.
    """

    def __init__(
        self, checkpoint: MoeCheckpoint, source: str, calibration: Sequence[str], tokens: int, window: int, seed: int
    ) -> None:
        self._checkpoint, self._source, self._seed = checkpoint, source, seed
        self._calibration: dict[str, Any] = {"text": list(calibration), "tokens": tokens, "window": window}
        self._refused: dict[str, list[str]] = {}

    def recipe(self, method: str, keep: float, refit: str, observations: Path | None = None) -> Recipe:
        """Return the recipe of one candidate; with ``observations``, nothing is observed again."""
        name, _, assignments = method.partition(":")
        content = {
            "source": self._source,
            "method": name,
            "parameters": dict(part.split("=", 1) for part in assignments.split(";") if "=" in part),
            "keep": keep,
            "refit": refit,
            "calibration": self._calibration,
            "seed": self._seed,
            "verification": {"enabled": False},
        }
        if load("method", name).wrapped:
            content["target"] = WRAPPED
        reads = observations is not None and load("method", name).observes
        return parse_recipe({**content, **({"observations": str(observations)} if reads else {})}, "compare")

    def candidate(self, method: str, keep: float, refit: str) -> CutCandidate | None:
        """Return a candidate; where the model cannot be cut like that, remember the reason and return None."""
        try:
            recipe = self.recipe(method, keep, refit)
            job = CompressConversion.of_checkpoint(recipe, method_of(recipe), self._checkpoint)
        except (UsageError, RefusalError) as error:
            names = self._refused.setdefault(error.message, [])
            if method not in names:
                names.append(method)
            return None
        return CutCandidate(method, keep, refit, job)

    @property
    def skipped(self) -> list[str]:
        """What could not be made, and why: one line for each reason."""
        return [f"{', '.join(names)}: {reason}" for reason, names in self._refused.items()]

    def command(self, candidate: CutCandidate) -> str:
        """Return the command that compresses as a candidate does."""
        recipe, usual = candidate.job.recipe, CalibrationRecipe()
        words = ["upcycle", "compress", self._source, "OUT", "--method", recipe.method]
        words += [word for key, value in recipe.parameters.items() for word in ("--param", f"{key}={value}")]
        words += ["--target", recipe.target] if candidate.job.wraps else []
        words += ["--keep", f"{candidate.keep:g}", "--refit", candidate.refit]
        words += ["--calibration", ",".join(recipe.calibration.texts)]
        words += ["--calibration-tokens", str(recipe.calibration.tokens)]
        if recipe.calibration.window != usual.window:
            words += ["--set", f"calibration.window={recipe.calibration.window}"]
        if self._seed:
            words += ["--seed", str(self._seed)]
        return shlex.join(words)


def compression_names(names: Sequence[str]) -> list[str]:
    """Return the methods that ``names`` stand for, and the baseline; ``all``: every one that compresses a MoE.

    Raises:
        UsageError: a name is unknown, or the method does not compress a MoE.
    """
    every = [name for name in METHODS if load("method", name).kind == "compression" and load("method", name).removes]
    if list(names) == ["all"]:
        return every
    for name in names:
        plain = name.partition(":")[0]
        if plain not in METHODS:
            raise UsageError(f"unknown method '{plain}'", hint=suggestion(plain, every))
        if plain not in every:
            raise UsageError(
                f"{name} does not compress a Mixture-of-Experts", hint=f"--compress all, or some of: {', '.join(every)}"
            )
    return list(dict.fromkeys([*names, BASELINE]))
