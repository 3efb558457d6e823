"""Every way of installing brings every module and all data, from a checkout without symbolic links, too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkouts import ELSEWHERE, LINKED, Environment, build, make_checkout, module_names, packaged


@dataclass(frozen=True)
class Checkout:
    """A checkout, and what must come of it."""

    folder: Path
    links: bool
    installed: dict[str, str]  # path in an installation -> path in the checkout


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(False, id="without-links"),
        pytest.param(True, id="with-links", marks=pytest.mark.long),
    ],
)
def checkout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    folder = tmp_path_factory.mktemp("checkout") / "upcycle"
    return Checkout(folder, request.param, packaged(make_checkout(folder, links=request.param)))


def contents(wheel: Path) -> set[str]:
    """Names in a wheel, without what describes it."""
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if not name.split("/")[0].endswith(".dist-info")}


def test_a_checkout_without_links_has_small_files_in_their_place(checkout: Checkout) -> None:
    for name in LINKED:
        link = checkout.folder / "upcycle" / name
        assert link.is_symlink() == checkout.links
        assert checkout.links or link.read_text() == f"../{name}"
    assert len(checkout.installed) > 300


@pytest.mark.long
def test_wheel_and_sdist_hold_every_file_and_no_other(checkout: Checkout, tmp_path: Path) -> None:
    wheel = build(checkout.folder, "wheel", tmp_path / "wheel")
    assert contents(wheel) == set(checkout.installed)
    assert wheel.stat().st_size < 10_000_000
    with tarfile.open(build(checkout.folder, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {*checkout.installed.values(), "LICENSE", "README.md"} <= held
    if not checkout.links:  # what is built of an archive does not depend on where the archive was built
        assert contents(build(unpacked, "wheel", tmp_path / "again")) == set(checkout.installed)


def installed_editable(checkout: Checkout, folder: Path, mode: str | None) -> Environment:
    environment = Environment(folder / "environment")
    with zipfile.ZipFile(build(checkout.folder, "editable", folder / "editable", mode)) as wheel:
        wheel.extractall(environment.packages)
    return environment


@pytest.mark.parametrize("mode", [None, *(pytest.param(mode, marks=pytest.mark.long) for mode in ("strict", "compat"))])
def test_an_editable_installation_is_the_checkout(checkout: Checkout, tmp_path: Path, mode: str | None) -> None:
    environment = installed_editable(checkout, tmp_path, mode)
    names = module_names(checkout.installed)
    code = (
        "import json, sys; from importlib.util import find_spec; "
        "specs = {name: find_spec(name) for name in json.load(sys.stdin)}; "
        "print(json.dumps({name: spec and spec.origin for name, spec in specs.items()}))"
    )
    found = json.loads(environment.run("-c", code, cwd=tmp_path, given=json.dumps(list(names))))
    assert [name for name in names if found[name] is None] == []
    elsewhere = [name for name, source in names.items() if not (checkout.folder / source).samefile(found[name])]
    assert elsewhere == []
    listed = json.loads(environment.run("-m", "upcycle.cli.main", "list", "recipes", "--json", cwd=tmp_path))
    assert len(listed["recipes"]) > 15


def test_what_was_edited_is_what_runs(checkout: Checkout, tmp_path: Path) -> None:
    environment = installed_editable(checkout, tmp_path, None)
    added = checkout.folder / "splitters" / "added.py"
    added.write_text("WORD = 'new'\n")
    try:
        code = "from upcycle.splitters.added import WORD; print(WORD)"
        assert environment.run("-c", code, cwd=tmp_path) == "new\n"
    finally:
        added.unlink()


def use(environment: Environment, checkout: Checkout, folder: Path) -> None:
    """Import every module there is, and convert the embedded model."""
    names = [name for name in module_names(checkout.installed) if not name.startswith(ELSEWHERE)]
    code = "import json, sys; from importlib import import_module; list(map(import_module, json.load(sys.stdin)))"
    environment.run("-c", code, cwd=folder, given=json.dumps(names))
    run = ("-m", "upcycle.cli.main")
    assert "random_split" in environment.run(*run, "list", "methods", cwd=folder)
    environment.run(*run, "convert", "demo", "out", "--experts", "2", "--verify-tokens", "64", "--quiet", cwd=folder)
    assert (folder / "out" / "upcycle.json").is_file()


@pytest.mark.long
@pytest.mark.parametrize("editable", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "editable"])
def test_pip_installs_a_checkout_that_works(checkout: Checkout, tmp_path: Path, editable: bool) -> None:
    if checkout.links:
        pytest.skip("its installations hold the same files, and the tests themselves run from an editable one")
    environment = Environment(tmp_path / "environment")
    source = tmp_path / "checkout"
    shutil.copytree(checkout.folder, source, symlinks=True)
    how = ["--editable", str(source)] if editable else [str(source)]
    pip = [sys.executable, "-P", "-m", "pip", "--python", str(environment.python), "install", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", *how], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if not editable:
        shutil.rmtree(source)
    use(environment, checkout, tmp_path)
