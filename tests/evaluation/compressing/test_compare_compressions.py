"""The comparison measures what the recommended command writes, in a temporary folder that is gone afterwards."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.calibration.compressing import moe_walk
from upcycle.cli.main import cli
from upcycle.errors import EnvironmentFault, RefusalError, UsageError
from upcycle.evaluation.compressing import compare_compressions as lead
from upcycle.evaluation.compressing.compare_compressions import compare_compressions, is_moe
from upcycle.evaluation.compressing.cut_measures import cut_texts
from upcycle.progress import Progress
from upcycle.recipe.recipe_parts import CalibrationRecipe
from upcycle.registry import METHODS, load

Models = Callable[..., Path]
SMALL: dict[str, Any] = {"calibration_tokens": 512, "window": 32, "tokens": 128, "timed": False}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files, to see what is left in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before the model runs."""

    def never(*given: Any) -> None:
        raise AssertionError("a layer was run")

    monkeypatch.setattr(moe_walk.MoeWalk, "__init__", never)


def ours(temporary: Path) -> list[Path]:
    """What upcycle has there; torch keeps a folder of its own."""
    return sorted(temporary.glob("upcycle-*"))


class Listener(Progress):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def tell(self, message: str) -> None:
        self.told.append(message)


@pytest.mark.long
def test_numbers_are_those_of_the_model_that_the_command_writes(
    pico_moe: Models, tmp_path: Path, temporary: Path
) -> None:
    source, listener = pico_moe("mixtral"), Listener()
    found = compare_compressions(str(source), compress=["reap"], keep=[0.5], progress=listener, **SMALL)
    assert ours(temporary) == []
    assert [(one.method, one.refit) for one in sorted(found.results, key=lambda one: (one.method, one.refit))] == [
        (method, refit) for method in ("random_experts", "reap") for refit in ("down", "none")
    ]
    (best,) = found.recommended
    assert best.method == "reap"
    assert best.command is not None
    arguments = best.command.replace("OUT", str(tmp_path / "out")).split()[1:]
    result = CliRunner().invoke(cli, [*arguments, "--no-verify", "-q"])
    assert result.exit_code == 0, result.output

    texts = cut_texts(CalibrationRecipe(text="demo"), (), 128, 32, 128, load_tokenizer(source))
    ratios = {}
    models = [
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).eval() for one in (source, tmp_path / "out")
    ]
    for name, ids in texts.domains.items():
        with torch.no_grad():
            before, after = (
                cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() for model in models
            )
        assert found.uncut[name] == pytest.approx(math.exp(before), rel=1e-4)
        assert best.perplexity[name] == pytest.approx(math.exp(after), rel=1e-4)
        ratios[name] = after - before
    assert found.unseen == ["everyday"]
    seen, unseen = (ratios["code"] + ratios["prose"]) / 2, ratios["everyday"]
    assert best.ratio == pytest.approx(math.exp(seen), rel=1e-4)
    assert best.unseen_ratio == pytest.approx(math.exp(unseen), rel=1e-4)
    assert best.quality == pytest.approx(math.exp((seen + unseen) / 2), rel=1e-4)
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert best.bytes == pytest.approx(weights, rel=0.2)  # and a header
    assert best.size_ratio == pytest.approx(weights / (source / "model.safetensors").stat().st_size, rel=0.05)
    assert (best.experts, best.top_k, best.expert_width) == (2, 2, 48)
    assert len(listener.told) == 2
    assert "4 compressions of" in listener.told[0]
    assert "will take about" in listener.told[1]
    assert "timing" not in listener.told[1]


@pytest.mark.slow
def test_all_methods_at_every_size(pico_moe: Models) -> None:
    found = compare_compressions(str(pico_moe("mixtral")), keep=[0.75, 0.5], **SMALL)
    rows = {(one.keep, one.method, one.refit) for one in found.results}
    half = {"lower_top_k", "block_drop"}  # of two experts per token, or two layers
    fills = {"sparse_experts"}  # of which a refit would fill the zeros, and half of whose weights stay
    every = {name for name in METHODS if load("method", name).kind == "compression" and load("method", name).removes}
    assert rows == {
        (keep, method, refit)
        for method in every - {"layer_drop"}  # every layer of this architecture has experts
        for keep in ((0.5,) if method in half | fills else (0.75, 0.5))
        for refit in (("none",) if method in fills else ("none", "down"))
    }
    assert {line.split(":")[0] for line in found.skipped} == {"layer_drop", *half, *fills}
    assert {one.keep for one in found.recommended} == {0.75, 0.5}
    assert not any(one.baseline for one in found.recommended)


@pytest.mark.long
def test_what_cannot_be_is_left_out_with_its_reason(pico_moe: Models) -> None:
    methods = ["lower_top_k", "slim:score=leverage"]
    found = compare_compressions(str(pico_moe("mixtral")), compress=methods, keep=[0.75], **SMALL)
    (reason,) = found.skipped  # three quarters of two experts per token are two
    assert reason.startswith("lower_top_k: keep 0.75 of 2 experts")
    assert {one.method for one in found.results} == {"slim:score=leverage", "random_experts"}
    (best,) = found.recommended
    assert best.command is not None
    assert "--method slim --param score=leverage --keep 0.75" in best.command


@pytest.mark.long
def test_candidates_are_written_one_at_a_time(
    pico_moe: Models, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[int] = []
    real = lead.run_recipe

    def watched(recipe: Any, out: Path) -> Any:
        there.append(len(list(temporary.rglob("config.json"))))
        return real(recipe, out)

    monkeypatch.setattr(lead, "run_recipe", watched)
    compare_compressions(str(pico_moe("mixtral")), compress=["frequency"], keep=[0.5], **SMALL)
    assert there == [0, 0, 0, 0]


@pytest.mark.long
def test_an_interrupted_comparison_leaves_nothing(pico_moe: Models, temporary: Path) -> None:
    class Impatient(Progress):
        def __init__(self) -> None:
            self.comparing = False

        @contextmanager
        def phase(self, title: str, total: int) -> Any:
            self.comparing = title == "comparing compressions"
            yield

        def advance(self, steps: int = 1) -> None:
            if self.comparing:
                assert ours(temporary)
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_compressions(str(pico_moe("mixtral")), compress=["reap"], keep=[0.5], progress=Impatient(), **SMALL)
    assert ours(temporary) == []


@pytest.mark.long
@pytest.mark.usefixtures("no_walk")
def test_room_on_the_disk_is_checked_before_any_work(pico_moe: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(EnvironmentFault, match=r"needs .* which has 1 KB free"):
        compare_compressions(str(pico_moe("mixtral")), **SMALL)


@pytest.mark.long
def test_as_much_is_on_the_disk_as_was_said(pico_moe: Models, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    monkeypatch.setattr(lead, "_check_disk", said.append)
    most = 0
    real = lead.folder_model

    def watched(folder: Path, streamed: bool) -> Any:
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in temporary.glob("upcycle-*/**/*") if path.is_file()))
        return real(folder, streamed)

    monkeypatch.setattr(lead, "folder_model", watched)
    compare_compressions(str(pico_moe("qwen3_moe")), compress=["naee"], keep=[0.75], **SMALL)
    tokenizer = (pico_moe("qwen3_moe") / "tokenizer.json").stat().st_size
    assert most < said[0] + 2 * tokenizer < 3 * most  # which is not counted, as small files are not


@pytest.mark.usefixtures("no_walk")
def test_what_is_refused(pico: Callable[[str], Path], pico_moe: Models) -> None:
    moe = str(pico_moe("mixtral"))
    for changes, message in (
        ({"keep": [1.0]}, "keep is a fraction between 0 and 1, got 1"),
        ({"keep": [0.0]}, "got 0"),
        ({"keep": []}, "nothing is kept"),
        ({"keep": [0.25]}, "no method can keep 0.25 of this model"),
        ({"compress": ["sparse_upcycling"]}, "sparse_upcycling does not compress"),
        ({"compress": ["raep"]}, "unknown method 'raep'"),
        ({"calibration": "self"}, "of self nothing is"),
        ({"faster": 1.5}, "a goal needs times"),
        ({"faster": 1.5, "within": 1.1}, "two goals"),
    ):
        settings = {"compress": ["reap"], **SMALL, **changes}
        with pytest.raises(UsageError, match=message):
            compare_compressions(moe, **settings)
    with pytest.raises(UsageError) as caught:
        compare_compressions(moe, **{**SMALL, "compress": ["raep"]})
    assert "did you mean 'reap'" in caught.value.hint and "sparse_upcycling" not in caught.value.hint
    with pytest.raises(RefusalError, match="is a dense 'llama' model"):
        compare_compressions(str(pico("llama")), **SMALL)


def test_a_moe_is_told_from_a_dense_model(pico: Callable[[str], Path], pico_moe: Models) -> None:
    assert is_moe(str(pico_moe("mixtral")))
    assert is_moe(str(pico_moe("granitemoe", True)))
    assert not is_moe(str(pico("llama")))
    assert not is_moe("demo")
    assert upcycle.compare_compressions is compare_compressions


@pytest.mark.long
def test_speed_is_measured_of_every_shape(pico_moe: Models) -> None:
    settings = {**SMALL, "timed": True}
    found = compare_compressions(str(pico_moe("mixtral")), compress=["lower_top_k"], keep=[0.5], **settings)
    assert found.timing is not None
    assert found.timing["prefill_seconds"] > 0
    for one in found.results:
        assert one.speeds is not None
        assert one.speed is not None
        assert set(one.speeds) == {"grouped_mm", "upcycle"}
        assert all(value > 0 for parts in one.speeds.values() for value in parts.values())
