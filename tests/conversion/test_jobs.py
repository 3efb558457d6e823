"""Jobs of all kinds are carried out by one protocol: a third kind is a class and a line in a table."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from import_graph import ROOT, source_files
from safetensors.torch import load_file

import upcycle
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint
from upcycle.checkpoints.output_layout import OutputEntry, Shard, Unit, shards_of
from upcycle.conversion.job import TokensRead
from upcycle.conversion.jobs import JOBS, job_for
from upcycle.errors import UsageError
from upcycle.files.records import read_record
from upcycle.methods.base import AnyMethod
from upcycle.methods.mixing.base import mixing
from upcycle.planning.cost import Plan, files_of
from upcycle.planning.job import method_of
from upcycle.planning.open_sources import open_sources
from upcycle.planning.verification_text import MeasuredText
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import Recipe, parse_recipe
from upcycle.registry import METHODS
from upcycle.verification.verdict import Verification

Pico = Callable[..., Path]


class Shortening(AnyMethod):
    """Leaves the last layer of a dense model out."""

    name = "shortening"
    title = "Shortening"
    paper = None
    kind = "compressing"  # type: ignore[assignment]


@dataclass(frozen=True)
class ShorteningJob:
    """A compressing job, in as few lines as the protocol allows."""

    recipe: Recipe
    method: AnyMethod
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    calibrated: bool = False
    undecided: bool = False
    promise: tuple[str, str] = ("approximate", "a layer is missing")
    family_name: str = "llama"
    working_bytes: int = 0

    @classmethod
    def of_checkpoint(cls, recipe: Recipe, method: AnyMethod, checkpoint: Checkpoint) -> ShorteningJob:
        config = dict(checkpoint.raw_config)
        config["num_hidden_layers"] -= 1
        kept = [n for n in checkpoint.store.specs if f"layers.{config['num_hidden_layers']}." not in n]
        entries = tuple(OutputEntry(name, checkpoint.store.specs[name], Origin(name)) for name in kept)
        return cls(recipe, method, config, tuple(shards_of([Unit("everything", None, entries)], 1 << 30)))

    @classmethod
    def of_configs(cls, recipe: Recipe, method: AnyMethod) -> ShorteningJob:
        raise NotImplementedError

    @property
    def units(self) -> Iterator[Unit]:
        return (unit for shard in self.shards for unit in shard.units)

    @property
    def context(self) -> int:
        return int(self.config["max_position_embeddings"])

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def recipe_text(self) -> str:
        return self.recipe.dump()

    @property
    def record(self) -> dict[str, Any]:
        return {"target": self.family_name}

    def cost(self) -> Plan:
        numbers = sum(entry.spec.elements for unit in self.units for entry in unit.entries)
        sizes = dict.fromkeys(("parameters_dense", "parameters_total", "parameters_active"), numbers)
        sizes |= dict.fromkeys(("bytes_dense", "bytes_output", "peak_memory_bytes"), 4 * numbers)
        sizes |= dict.fromkeys(("flops_per_token_dense", "flops_per_token"), 2 * numbers)
        names = dict.fromkeys(("family", "target"), self.family_name)
        made = {"method": self.method.name, "router": "none", "refit": "none", "kind": self.method.kind}
        promise = {"promise": self.promise[0], "promise_reason": self.promise[1]}
        return Plan([], **names, **made, **promise, **sizes, calibration_tokens=0, shards=files_of(self.shards))

    takes_blueprints: ClassVar[bool] = False

    def given(self, blueprint: Path) -> ShorteningJob:
        raise UsageError("no blueprints here")

    def read(self, checkpoint: Checkpoint, progress: Progress) -> TokensRead:
        return TokensRead()

    def decide(
        self, checkpoint: Checkpoint, tokens: TokensRead, folder: Path, progress: Progress
    ) -> tuple[ShorteningJob, None]:
        return self, None

    def blocks(
        self, unit: Unit, checkpoint: Checkpoint, folder: Path, threads: int
    ) -> Iterator[tuple[OutputEntry, Iterator[torch.Tensor]]]:
        for entry in unit.entries:
            assert entry.origin is not None
            yield entry, checkpoint.blocks(entry.origin, self.recipe.dtype)

    def finish(self, folder: Path) -> list[dict[str, Any]]:
        return self.reports(folder)

    def reports(self, folder: Path) -> list[dict[str, Any]]:
        return [{"layer": self.config["num_hidden_layers"], "kept": False}]

    def verify(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        windows: MeasuredText,
        progress: Progress,
        training: dict[str, Any] | None = None,
    ) -> Verification:
        ids, text, *_ = windows
        numbers = dict.fromkeys(
            ("relative_logit_error", "max_logit_difference", "kl", "top1_agreement", "perplexity_dense", "perplexity"),
            1.0,
        )
        none: dict[str, Any] = dict.fromkeys(("tolerance", "all_experts_error"))
        return Verification(
            "approximate", *self.promise[::-1], **numbers, **none, loss=0.0, loss_dense=0.0, layer_errors=[],
            all_experts_reference="", tokens=ids.numel(), text=text, streamed=False,
        )  # fmt: skip


def test_a_third_kind_of_job_goes_through_the_conversion(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "shortening", f"{__name__}:Shortening")
    monkeypatch.setitem(JOBS, "compressing", ShorteningJob)
    source, out = pico("llama"), tmp_path / "out"
    result = upcycle.convert(str(source), out, method="shortening", tokenizer="none", verification={"tokens": 32})
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    layers = result.layers[0]["layer"]
    assert set(before) - set(after) == {name for name in before if f"layers.{layers}." in name}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert result.verification is not None
    assert result.verification.explanation == "a layer is missing"
    assert read_record(out)["plan"]["kind"] == "compressing"


def lines_that_test_a_jobs_class(text: str) -> list[int]:
    """Lines of ``isinstance`` on a job."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and len(node.args) == 2]
    asked = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "isinstance"]
    kinds = ("Job", "ExpertConversion", "GrowthConversion")
    return [
        call.lineno
        for call in asked
        if any(isinstance(n, ast.Name) and n.id.endswith(kinds) for n in ast.walk(call.args[1]))
    ]


def test_no_source_file_tests_the_class_of_a_job() -> None:
    assert lines_that_test_a_jobs_class("if isinstance(job, (GrowthJob, int)):\n    pass\nisinstance(job, str)") == [1]
    found = {path: lines_that_test_a_jobs_class((ROOT / path).read_text(encoding="utf-8")) for path in source_files()}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_job_changes_no_argument(pico: Pico, branches: Callable[..., list[Path]]) -> None:
    keys = {"sources": list(map(str, branches(2))), "method": "branch_train_mix", "tokenizer": "none"}
    for given in (keys, {"source": str(pico("llama")), "method": "depth_stack", "tokenizer": "none"}):
        recipe = parse_recipe(given, "test")
        method = method_of(recipe)
        checkpoint = open_sources(recipe, method)
        before = deepcopy((recipe, vars(method))), dict(vars(checkpoint))
        job = job_for(recipe, method, checkpoint)
        assert ((recipe, vars(method)), vars(checkpoint)) == before
        assert type(job.method) is type(method)
    assert isinstance(open_sources(parse_recipe(keys, "test"), method_of(parse_recipe(keys, "test"))), MixedCheckpoint)


def test_joining_sources_returns_a_new_mixing_method(branches: Callable[..., list[Path]]) -> None:
    keys = {"sources": list(map(str, branches(2))), "method": "branch_train_mix", "tokenizer": "none"}
    recipe = parse_recipe(keys, "test")
    method = method_of(recipe)
    checkpoint = open_sources(recipe, method)
    assert isinstance(checkpoint, MixedCheckpoint)
    joined = mixing(method.joined(checkpoint.mix, recipe))
    assert joined is not None
    assert joined.members == [0, 1]
    assert checkpoint.rest == joined.rest == (1.0, 1.0, 0.0)
    assert method is not joined
    assert "mix" not in vars(method)
