"""Images of every size, and files of images that cannot be read, are gone, or have changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_chats import chats, draw, pictured
from picture_runs import (
    ROUNDING,
    first_step,
    recipe,
    rows_of,
    stock_loss,
)
from safetensors import safe_open
from training_runs import run, steps

from upcycle.errors import UsageError
from upcycle.files.formats.parsing import parse_json
from upcycle.trainers.pictures.pictures import Picture, pictures_of
from upcycle.trainers.run.shown_rows import shown_rows


@pytest.mark.long
@pytest.mark.parametrize("wrapper", ["llava_next", "idefics3"])
def test_images_of_other_sizes_in_models_of_other_classes(wrapper: str, tmp_path: Path) -> None:
    """Tiles, marks around images, and as many tokens as an image's size asks for; two images of unequal sizes in a pass."""
    folder, data = pictured(tmp_path / wrapper, wrapper), chats(tmp_path / "data", 4)
    for number, size in enumerate([(16, 16), (32, 16), (24, 32), (20, 28)]):
        draw(data.parent / "images", f"{number}.png", (200, 40 * number, 30), size)
    expected = stock_loss(folder, data)
    keys: dict[str, Any] = {"length": 256, "global_batch": 4, "micro_batch": 2, "data": {"packing": "alone"}}
    assert first_step(folder, tmp_path, data, {}, **keys)["loss"] == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.long
def test_an_unreadable_image_in_the_middle_of_a_run_is_skipped_and_one_too_many_ends_it(
    llava: Path, data: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(data.parent, mine)
    whole = recipe(llava, tmp_path / "a", mine / data.name, {}, data={"bad_images": 1})
    shown_rows(whole, 1, lambda _: None)  # the data are checked, and kept in the cache
    (mine / "images" / "5.png").write_bytes(b"no image any more")
    _, said = run(whole)
    assert [line for line in said if "5.png" in line and "not learned from (1 of at most 1)" in line], said
    fewer = tmp_path / "fewer.jsonl"
    kept = [
        json.loads(line) | {"image": str(path)} for line, (path, *_) in zip(data.open(), rows_of(data), strict=True)
    ]
    fewer.write_text("".join(json.dumps(row) + "\n" for row in kept if row["id"] != 5))
    rest = stock_loss(llava, fewer)
    assert steps(whole)[0]["loss"] == pytest.approx(rest, rel=ROUNDING)
    (mine / "images" / "6.png").write_bytes(b"nor this")
    with pytest.raises(UsageError, match=r"number 2 in this run, and data.bad_images is 1"):
        run(whole, restart=True)


def test_an_image_that_cannot_be_read_is_found_before_the_first_step(llava: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data.parent, tmp_path / "mine")
    (tmp_path / "mine" / "images" / "2.png").write_bytes(b"no image")
    mine = tmp_path / "mine" / data.name
    with pytest.raises(UsageError, match=r"line 3: the image .*2.png cannot be read: it is no image"):
        run(recipe(llava, tmp_path, mine, {}))
    said: list[str] = []
    (row,) = shown_rows(recipe(llava, tmp_path, mine, {}, data={"broken_lines": "skip"}), 1, said.append)
    assert any("1 rows that cannot be read are left out" in line and "2.png" in line for line in said), said
    assert any("7 images, whose headers were read" in line for line in said), said
    assert row.documents[0][0].text.startswith("User: <image> (x 16)\nWhat is picture")
    assert not row.documents[0][0].learned


def test_an_image_that_is_gone_since_the_data_were_checked_breaks_its_row_as_if_they_had_not_been(
    llava: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data.parent, tmp_path / "mine")
    file = tmp_path / "mine" / data.name
    for choice in ("stop", "skip"):
        shown_rows(recipe(llava, tmp_path, file, {}, data={"broken_lines": choice}), 1, lambda _: None)
    (tmp_path / "mine" / "images" / "6.png").unlink()
    with pytest.raises(UsageError, match=r"line 7: the image .*6.png cannot be read: No such file"):
        run(recipe(llava, tmp_path, file, {}))
    skipping = recipe(llava, tmp_path, file, {}, data={"broken_lines": "skip"})
    _, said = run(skipping)
    assert any("1 rows that cannot be read are left out" in line and "6.png" in line for line in said), said
    assert any("7 images, whose headers were read" in line for line in said), said
    assert not any("not learned from" in line for line in said), said


def test_images_that_came_or_got_another_size_are_read_again(llava: Path, data: Path, tmp_path: Path) -> None:
    """Their file of rows is the same, and its rows were tokenised by what images were before."""
    shutil.copytree(data.parent, tmp_path / "mine")
    images, said = tmp_path / "mine" / "images", []
    (images / "2.png").rename(images / "away")
    (images / "5.png").write_bytes(b"no image")
    mine = recipe(llava, tmp_path, tmp_path / "mine" / data.name, {}, data={"broken_lines": "skip"})
    shown_rows(mine, 1, said.append)
    assert any("6 images, whose headers were read" in line for line in said), said
    (images / "away").rename(images / "2.png")
    draw(images, "4.png", (9, 9, 9), (8, 16))
    shown_rows(mine, 1, said.append)
    assert any("7 images, whose headers were read" in line for line in said), said
    cached = [parse_json(file.metadata()["pictures"], "index") for file in indices(tmp_path / "cache")]
    assert ["4.png", 8, 16] in [[Path(path).name, *size] for shard in cached for ((path, *size),) in shard]
    run(mine)
    assert (tmp_path / "run" / "log.jsonl").exists()


def indices(cache: Path) -> list[Any]:
    """The indices of all tokenised shards."""
    return [safe_open(path, framework="numpy") for path in cache.rglob("*.safetensors")]


def test_of_many_sizes_of_images_only_some_are_remembered(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, made = pictures_of(llava), []
    assert pictures

    def processed(_: str, images: list[Any]) -> dict[str, torch.Tensor]:
        made.append(images[0].size)
        return {"input_ids": torch.zeros(1, 1)}

    monkeypatch.setattr(pictures, "_processed", processed)
    for width in [*range(1, 1001), 1000]:
        pictures.ids(Picture("", width, 1))
    assert len(made) == 1000  # the last again was remembered
    pictures.ids(Picture("", 1, 1))
    assert made[-1] == (1, 1)
