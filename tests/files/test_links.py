"""What a link in a folder of somebody else's points at is copied nowhere, and published by nobody."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from upcycle import convert
from upcycle.checkpoints.tokenizer_files import check_companions, copy_files
from upcycle.errors import CheckpointError
from upcycle.files.links import copy_inside, inside

Pico = Callable[[str], Path]
SECRET = "s3cret"


@pytest.fixture
def source(pico: Pico, tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(SECRET)
    return Path(shutil.copytree(pico("llama"), tmp_path / "models" / "m"))


@pytest.mark.parametrize(
    "name", ["NOTICE", "NOTICE.txt", "LICENSE", "chat_template.jinja", "tokenizer.model", "generation_config.json"]
)
@pytest.mark.parametrize("way", ["straight", "through another link", "through a folder"])
def test_a_link_out_of_the_source_is_refused_before_anything_is_done(
    name: str, way: str, source: Path, tmp_path: Path
) -> None:
    (source / name).unlink(missing_ok=True)
    if way == "straight":
        (source / name).symlink_to("../../home/token")
    elif way == "through another link":
        (source / "a").symlink_to("../../home/token")
        (source / name).symlink_to("a")
    else:
        (source / "folder").symlink_to("../../home")
        (source / name).symlink_to("folder/token")
    with pytest.raises(CheckpointError, match="leaves its folder") as refused:
        check_companions(source, tokenizer=True)
    assert name in refused.value.message
    (tmp_path / "copy").mkdir()
    with pytest.raises(CheckpointError, match="leaves its folder"):
        copy_files(source, tmp_path / "copy", tokenizer=True)
    assert not any(SECRET in path.read_text() for path in (tmp_path / "copy").glob(name))


def test_convert_refuses_it_at_once_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    (source / "NOTICE").symlink_to("../../home/token")
    with pytest.raises(CheckpointError, match="NOTICE"):
        convert(str(source), tmp_path / "out", experts=2)
    assert not list(tmp_path.glob("out*"))


def test_links_of_the_folders_own_are_followed(source: Path, tmp_path: Path) -> None:
    (source / "terms").write_text("terms")
    (source / "LICENSE").symlink_to("terms")
    (tmp_path / "other").symlink_to(source)  # the user's own link to the whole
    for folder in (source, tmp_path / "other"):
        target = tmp_path / "copies" / folder.name
        target.mkdir(parents=True)
        copy_files(folder, target, tokenizer=True)
        assert (target / "LICENSE").read_text() == "terms"


def test_the_hubs_cache(tmp_path: Path) -> None:
    """Every file there is a link to a blob of the same repository; those of another one are not its own."""
    cache = tmp_path / "hub" / "models--a--b"
    for repository in (cache, tmp_path / "hub" / "models--c--d"):
        (repository / "blobs").mkdir(parents=True)
        (repository / "blobs" / "0123").write_text("blob")
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "LICENSE").symlink_to("../../blobs/0123")
    (snapshot / "NOTICE").symlink_to("../../../models--c--d/blobs/0123")
    copy_inside(snapshot / "LICENSE", snapshot, tmp_path / "LICENSE")
    assert (tmp_path / "LICENSE").read_text() == "blob"
    with pytest.raises(CheckpointError, match="leaves its folder"):
        inside(snapshot / "NOTICE", snapshot)
    outside = tmp_path / "models" / "blobs"  # beside a folder of another name there are no blobs
    outside.mkdir(parents=True)
    (outside / "0123").write_text(SECRET)
    (tmp_path / "models" / "all" / "m").mkdir(parents=True)
    (tmp_path / "models" / "all" / "m" / "LICENSE").symlink_to("../../blobs/0123")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        inside(tmp_path / "models" / "all" / "m" / "LICENSE", tmp_path / "models" / "all" / "m")


def test_nothing_else_copies_files() -> None:
    """Whatever is copied out of a folder goes through the one function that looks at links."""
    root = Path(__file__).parents[2]
    copies = re.compile(r"shutil\.(copy\w*|move)\(|write_bytes\([^)]*\.read_bytes\(\)")
    found = {
        f"{path.relative_to(root)}: {line.strip()}"
        for folder in ("upcycle", "trainers", "splitters", "kernels")
        for path in (root / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if copies.search(line) and "symlinks=True" not in line and "follow_symlinks=False" not in line  # links as links
    }
    # What a run copies into its checkpoints lies in a folder that it made itself of files that were copied by that function.
    assert found == {
        "upcycle/files/links.py: shutil.copyfile(inside(path, folder), destination)",
        "trainers/checkpoints/write.py: shutil.copytree(small, folder)",
    }
