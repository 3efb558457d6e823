"""Which images are found, in which mode they are read, and which of them are held out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from encoder_cases import image_folder
from PIL import Image

from upcycle.errors import UsageError
from upcycle.images.files import class_of, image_files, spread
from upcycle.images.sources import read_images
from upcycle.recipe.recipe_parts import CalibrationRecipe


def recipe(*folders: Path) -> CalibrationRecipe:
    return CalibrationRecipe(text=[str(folder) for folder in folders])


def test_images_are_found_in_the_order_of_their_names(tmp_path: Path) -> None:
    image_folder(tmp_path, each=3)
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    Image.new("RGB", (4, 4)).save(tmp_path / "top.JPG", format="JPEG")
    found = image_files(tmp_path)
    names = [f"class_{label}/{i:03d}.png" for label in range(2) for i in range(3)]
    assert [item.name for item in found] == [*names, "top.JPG"]
    assert [class_of(item) for item in found[2:4]] == ["class_0", "class_1"]
    assert class_of(found[-1]) == ""
    assert [item.name for item in spread(found, 3)] == [found[i].name for i in (0, 2, 4)]


def test_an_image_is_read_upright_in_the_mode_of_the_model(tmp_path: Path) -> None:
    image = Image.new("RGBA", (6, 2), (10, 20, 30, 0))
    image.putpixel((0, 0), (200, 100, 50, 255))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / "a.png", exif=turned)
    (item,) = image_files(tmp_path)
    colour = item.read(3)
    assert (colour.mode, colour.size, colour.getpixel((1, 0))) == ("RGB", (2, 6), (200, 100, 50))
    assert item.read(1).mode == "L"


def test_copies_of_an_image_are_on_one_side(tmp_path: Path) -> None:
    first = image_folder(tmp_path / "a", each=30)
    shutil.copytree(first, tmp_path / "b")
    parts = read_images(recipe(first, tmp_path / "b"), 1000)
    sides = [{item.sha256 for item in side} for side in (parts.read, parts.held_out)]
    assert not sides[0] & sides[1]
    assert len(parts.read) + len(parts.held_out) == 120
    assert len(parts.read) == 2 * len(sides[0])
    assert 0 < len(parts.held_out) < 40
    assert parts.how == f"{len(parts.held_out)} of 120 images"
    fewer = read_images(recipe(first, tmp_path / "b"), 20)
    assert len(fewer.read) <= 20
    assert {item.sha256 for item in fewer.held_out} <= sides[1]


def test_a_few_images_leave_one_to_measure_on(tmp_path: Path) -> None:
    two = image_folder(tmp_path / "two", classes=2, each=1)
    parts = read_images(recipe(two), 10)
    assert (len(parts.read), len(parts.held_out)) == (1, 1)
    one = image_folder(tmp_path / "one", classes=1, each=1)
    with pytest.raises(UsageError, match="one image is too few"):
        read_images(recipe(one), 10)


def test_the_hash_of_all_depends_on_every_image(tmp_path: Path) -> None:
    images = image_folder(tmp_path, each=8)
    before = read_images(recipe(images), 100)
    pixels = torch.zeros(12, 10, 3, dtype=torch.uint8).numpy()
    path = before.read[3].path
    assert path is not None
    Image.fromarray(pixels, "RGB").save(path)
    assert read_images(recipe(images), 100).sha256 != before.sha256
