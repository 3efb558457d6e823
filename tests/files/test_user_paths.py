"""Homes that are not there, and caches that cannot be written."""

import os
import pwd
import re
import tempfile
from pathlib import Path

import pytest

import upcycle
from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files.user_paths import cache_folder, user_path
from upcycle.trainers.data import open_domain
from upcycle.trainers.recipe.data_recipe import DataRecipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Any user's id in a container: no variable says where a home is, and no list of users does. Gives the temporary folder."""

    def unknown(_: object) -> None:
        raise KeyError("no such user")

    for variable in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_names_with_a_tilde(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_path("~/model") == Path("~/model")
    assert user_path("~nobody/model") == Path("~nobody/model")
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/model") == Path("/home/me/model")
    with pytest.raises(UsageError, match="~nobody/model"):
        upcycle.plan("~nobody/model", experts=4)


def test_a_cache_is_found_or_there_is_none(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == homeless / f"upcycle-{os.getuid()}"
    (homeless / f"upcycle-{os.getuid()}").chmod(0o777)  # made by somebody else, or open to all
    assert cache_folder() is None
    with pytest.raises(EnvironmentFault, match="there is no folder for tokenised text"):
        open_domain.token_cache_folder(DataRecipe(domains={"text": "demo"}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(homeless / "cache"))
    assert cache_folder() == homeless / "cache" / "upcycle"
    (homeless / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(homeless / "file"))
    assert cache_folder() is None


def test_a_conversion_needs_no_home(homeless: Path) -> None:
    result = upcycle.convert("demo", homeless / "out", experts=2, verification={"tokens": 64})
    assert result.verification


def test_nothing_else_looks_for_homes() -> None:
    asks = re.compile(r"Path\.home\(|\.expanduser\(\)|expanduser\(")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("upcycle", "kernels", "trainers", "splitters")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name not in ("user_paths.py", "private_text.py")  # the latter must know what to look for
        for line in path.read_text(encoding="utf-8").splitlines()
        if asks.search(line)
    ]
    assert not found
