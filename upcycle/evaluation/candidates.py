"""Makes the candidates of a comparison: conversions that differ in method, router and refit, and cost the same."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from upcycle.calibration.neuron_importance import SHORTEST_PIECE
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.errors import EnvironmentFault, RefusalError, UsageError
from upcycle.evaluation.candidate_walk import Candidate
from upcycle.planning.expert_job import ExpertJob
from upcycle.planning.job import method_of
from upcycle.planning.prepare_experts import prepare_experts
from upcycle.recipe.conversion_recipe import parse_recipe
from upcycle.registry import METHODS, ROUTERS, load

_VARIANTS = {"importance": ["variant=independent", "variant=sharing_inner", "variant=sharing_inter"]}
_NO_EXPERTS = (
    "growth",
    "addition",
    "pruning",
    "compression",
    "narrowing",
    "beside",
)  # kinds of methods that make none of a dense FFN


class CandidateOptions:
    """Makes candidates that cost the same."""

    def __init__(
        self,
        checkpoint: DenseCheckpoint,
        source: str,
        pieces: int,
        layers: str,
        seed: int,
        calibration: str | Sequence[str],
        tokens: int,
        window: int,
    ) -> None:
        self._checkpoint, self._source, self._seed = checkpoint, source, seed
        self._sizes = {"pieces": pieces, "layers": layers}
        self._calibration: dict[str, Any] = {"text": calibration, "tokens": tokens, "window": window}

    def recipe(self, active: float, method: str, router: str, refit: str) -> dict[str, Any]:
        """Return the recipe of one candidate, without its source."""
        name, _, assignments = method.partition(":")
        return {
            "method": name,
            "parameters": dict(part.split("=", 1) for part in assignments.split(";") if part),
            "active": active,
            **self._sizes,
            "shared_unheld": "route",
            "router": router,
            "refit": refit,
            "scale": "sum",
            "calibration": self._calibration,
            "seed": self._seed,
        }

    def candidate(
        self, active: float, method: str, router: str, refit: str, skipped: list[str], baseline: str | None = None
    ) -> Candidate | None:
        """Return a candidate; where the model cannot be split like that, add the reason to ``skipped`` and return None."""
        recipe = self.recipe(active, method, router, refit)
        label = f"{active:g} {method} {router} {refit} {baseline or ''}"
        try:
            job = self._job(recipe)
            if job.method.needs_gradients and self._calibration["tokens"] < SHORTEST_PIECE * job.shape.experts:
                raise UsageError(f"too little calibration text to divide it into {job.shape.experts} kinds")
            if job.method.name == "coactivation_graph":
                import pymetis  # noqa: F401 - only whether it is installed
        except (UsageError, RefusalError, EnvironmentFault, ImportError) as error:
            note = f"{method}: {getattr(error, 'message', 'pymetis is not installed')}"
            if note not in skipped:
                skipped.append(note)
            return None
        return Candidate(job, active, label, baseline)

    def _job(self, recipe: dict[str, Any]) -> Any:
        checkpoint = self._checkpoint
        parsed = parse_recipe({"source": self._source, **recipe}, "compare")
        dense = (checkpoint.family, checkpoint.config, checkpoint.store.specs, checkpoint.has_tokenizer)
        return prepare_experts(ExpertJob, parsed, method_of(parsed), *dense)

    def command(self, candidate: Candidate) -> str:
        """Return the command that converts as a candidate does."""
        recipe = candidate.job.recipe
        layers = recipe.layers if isinstance(recipe.layers, str) else ",".join(map(str, recipe.layers))
        words = ["upcycle", "convert", self._source, "OUT", "--method", recipe.method]
        words += [word for key, value in recipe.parameters.items() for word in ("--param", f"{key}={value}")]
        words += ["--active", f"{candidate.active:g}", "--pieces", str(recipe.pieces), "--layers", layers]
        words += ["--shared-unheld", "route", "--router", recipe.router.name, "--refit", recipe.refit, "--scale", "sum"]
        words += ["--calibration", ",".join(recipe.calibration.texts)]
        return shlex.join(words)


def method_names(names: Sequence[str]) -> list[str]:
    """Return the methods that ``names`` stand for, each with its variants; ``all``: every one that splits.

    Raises:
        UsageError: a name is unknown, or the method makes no experts from a dense FFN.
    """
    if list(names) != ["all"]:
        for name in names:
            if load("method", name.partition(":")[0]).kind in _NO_EXPERTS:
                raise UsageError(
                    f"{name} makes no experts from a dense FFN, so it cannot be compared", hint="--methods all"
                )
        return list(names)
    found = []
    for name in METHODS:
        if load("method", name).kind not in ("copies", *_NO_EXPERTS):
            found += [f"{name}:{variant}" for variant in _VARIANTS.get(name, [])] or [name]
    return found


def router_names(names: Sequence[str]) -> list[str]:
    """Return the routers that ``names`` stand for; ``all``: every calibrated one, and ``cool``.

    Raises:
        UsageError: a name is unknown.
    """
    if list(names) != ["all"]:
        for name in names:
            load("router", name)
        return list(names)
    return [name for name in ROUTERS if load("router", name).calibrated] + ["cool"]


def named_parts(candidate: Candidate) -> tuple[str, str]:
    """Return a candidate's method, with its parameters, and its router."""
    recipe = candidate.job.recipe
    parameters = ";".join(f"{key}={value}" for key, value in recipe.parameters.items())
    return f"{recipe.method}:{parameters}" if parameters else recipe.method, recipe.router.name
