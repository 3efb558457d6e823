"""Distilling from distributions on disk: the same losses as from the running parent, and no stale ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from file_limits import files_of_at_most
from safetensors.torch import load_file, save_file
from training_runs import losses, recipe_for, run, steps

pytest.importorskip("deepspeed")

import upcycle
from upcycle.errors import CheckpointError, EnvironmentFault, UsageError
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.distillation import frozen_shards
from upcycle.trainers.distillation.logit_cache import LogitCache, joined_rows, parent_identity, prepare_cache
from upcycle.trainers.distillation.truncated_logits import TopLogits
from upcycle.trainers.recipe.training_recipe import TrainRecipe
from upcycle.trainers.run import stage as stages

Model = Callable[..., Path]


@pytest.fixture(scope="module")
def student(pico: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense parent of its own, and a sparse split of it."""
    folder = tmp_path_factory.mktemp("student")
    parent = Path(shutil.copytree(pico("llama"), folder / "dense"))
    split = {"method": "random_split", "experts": 4, "top_k": 2, "router": "random"}
    upcycle.convert(str(parent), folder / "moe", **split, verification={"enabled": False})
    return parent, folder / "moe"


def distilled(student: tuple[Path, Path], folder: Path, name: str, **keys: Any) -> TrainRecipe:
    stage = {"distillation": keys, "steps": 3, "losses": {}}
    return recipe_for(student[1], folder, stage=stage, output=str(folder / name))


@pytest.mark.long
def test_a_whole_cache_gives_the_losses_of_the_running_parent(student: Any, tmp_path: Path) -> None:
    live = distilled(student, tmp_path, "live")
    everything = {"cache": str(tmp_path / "kept"), "top_p": 1.0, "most": 4096}
    kept = distilled(student, tmp_path, "first", **everything)
    run(live)
    run(kept)
    assert losses(kept) == pytest.approx(losses(live), rel=1e-5)
    assert [line["loss/kl"] for line in steps(kept)] == pytest.approx(
        [line["loss/kl"] for line in steps(live)], rel=1e-4
    )


@pytest.mark.long
def test_a_second_run_reads_what_the_first_wrote_without_the_parent(
    student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    own = stages.load_model

    def load(folder: Path, *arguments: Any, **options: Any) -> Any:
        loaded.append(folder)
        return own(folder, *arguments, **options)

    monkeypatch.setattr(stages, "load_model", load)
    monkeypatch.setattr(frozen_shards, "load_model", load)
    first = distilled(student, tmp_path, "first", cache=str(tmp_path / "kept"))
    run(first)
    assert student[0] in loaded
    loaded.clear()
    again = distilled(student, tmp_path, "again", cache=str(tmp_path / "kept"))
    again = again.model_copy(update={"micro_batch": 4})
    run(again)
    assert loaded == [student[1]]
    assert losses(again) == pytest.approx(losses(first), rel=1e-5)
    assert not list((tmp_path / "kept").rglob("*.partial"))


@pytest.mark.long
def test_what_is_cut_off_only_lowers_the_divergence(student: Any, tmp_path: Path) -> None:
    """Merging the tail into one outcome gives a lower bound; the first step, before weights differ, shows it."""
    live, cut = (
        distilled(student, tmp_path, "live"),
        distilled(student, tmp_path, "cut", cache=str(tmp_path / "c"), most=4),
    )
    run(live)
    run(cut)
    assert steps(cut)[0]["loss"] == pytest.approx(steps(live)[0]["loss"], rel=1e-6)
    assert 0 < steps(cut)[0]["loss/kl"] < steps(live)[0]["loss/kl"]


@pytest.mark.long
def test_a_stale_cache_is_refused(student: Any, tmp_path: Path) -> None:
    cache = str(tmp_path / "kept")
    run(distilled(student, tmp_path, "first", cache=cache))
    with pytest.raises(UsageError, match=r"was made with another top_p: 0\.95 instead of 0\.5") as error:
        run(distilled(student, tmp_path, "other", cache=cache, top_p=0.5))
    assert "choose another folder" in str(error.value.hint)
    changed = Path(shutil.copytree(student[0], tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"][0] += 1  # as many bytes under the same names
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="was made with another parent"):
        run(distilled(student, tmp_path, "third", cache=cache, parent=str(changed)))
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        run(distilled(student, tmp_path, "fourth", cache=str(full)))


def test_settings_that_a_cache_cannot_hold_are_refused(student: Any, tmp_path: Path) -> None:
    for keys, message in (
        ({"hidden": 1.0}, "hidden needs the running parent"),
        ({"temperature": 2.0}, "temperature 1"),
    ):
        with pytest.raises(UsageError, match=message):
            distilled(student, tmp_path, "x", cache="c", **keys)


def rows(count: int, length: int = 6, seed: int = 0) -> PackedBatch:
    ids = torch.randint(50, (count, length), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(length).expand(count, -1)
    return PackedBatch(ids, torch.ones_like(ids, dtype=torch.bool), positions, ("d",) * count)


def test_rows_are_found_again_in_any_order(tmp_path: Path) -> None:
    prepare_cache(tmp_path / "c", {"format": 1})
    table = torch.randn(50, 50, generator=torch.Generator().manual_seed(1)) * 3
    asked: list[int] = []

    def model(batch: PackedBatch) -> torch.Tensor:
        asked.append(len(batch.ids))
        return table[batch.ids]

    batch = rows(3)
    cache = LogitCache(tmp_path / "c", 0.9, 8)
    first = cache.targets(batch, model)
    order = torch.tensor([2, 0, 1])
    turned = PackedBatch(batch.ids[order], batch.mask[order], batch.positions[order], batch.domains)
    second = cache.targets(turned, model)
    assert asked == [1, 1, 1]
    assert (cache.read, cache.written) == (3, 3)
    wanted = TopLogits.of(table[batch.ids][:, :-1], 0.9, 8)
    for found, places in ((first, torch.arange(3)), (second, order)):
        student = torch.randn(3, 5, 50, generator=torch.Generator().manual_seed(2))
        expected = wanted.kl(student[places.argsort()])[places]
        assert torch.allclose(found.kl(student), expected, atol=1e-6)
    elsewhere = PackedBatch(batch.ids, batch.mask, batch.positions + 1, batch.domains)
    cache.targets(elsewhere, model)
    assert len(asked) == 6  # the same tokens at other positions are another row


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    prepare_cache(tmp_path / "c", {"format": 1})
    with pytest.raises(EnvironmentFault, match=r"cannot write .*\.safetensors: File too large"), files_of_at_most(64):
        LogitCache(tmp_path / "c", 0.9, 8).targets(rows(1), lambda batch: torch.zeros(1, 6, 50))
    assert not [path for path in (tmp_path / "c").rglob("*") if path.is_file() and path.name != "cache.json"]


def test_rows_with_fewer_tokens_are_padded_when_joined() -> None:
    sharp, flat = torch.zeros(1, 2, 9), torch.zeros(1, 2, 9)
    sharp[..., 3] = 40
    one, other = TopLogits.of(sharp, 0.9, 9), TopLogits.of(flat, 0.9, 9)
    assert one.tokens.shape[1] < other.tokens.shape[1]
    student = torch.randn(2, 2, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        joined_rows([one, other]).kl(student), torch.cat([one.kl(student[:1]), other.kl(student[1:])])
    )


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    prepare_cache(tmp_path / "c", {"format": 1})
    cache, batch = LogitCache(tmp_path / "c", 0.9, 8), rows(1)
    cache.targets(batch, lambda row: torch.zeros(1, 6, 50))
    (path,) = (tmp_path / "c").glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="holds no cached logits"):
        cache.targets(batch, lambda row: torch.zeros(1, 6, 50))


def test_the_identity_covers_every_byte_of_the_weights(student: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(student[0], tmp_path / "copy"))
    same = parent_identity(student[0], "float32", 0.9, 8)
    assert parent_identity(copy, "float32", 0.9, 8) == same
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert parent_identity(copy, "float32", 0.9, 8)["parent"] != same["parent"]
