"""Checkouts of this working tree as git makes them, with links and without, and environments to install them in."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINKED = ("configs", "kernels", "splitters", "trainers")  # folders beside upcycle/ that are packages inside of it
ELSEWHERE = (
    "upcycle.verification.engines.workers."  # run in the Python of an inference engine, which has other packages
)


def make_checkout(folder: Path, links: bool) -> list[str]:
    """Let git write what is here now, uncommitted changes included, to ``folder``.

    Args:
        folder: is made.
        links: make links of links; else small text files, as git does where ``core.symlinks`` is false.

    Returns:
        The paths of all files, from the root, without the links.
    """

    def git(*arguments: str, **variables: str) -> str:
        environment = {**os.environ, **variables}
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout

    folder.mkdir(parents=True)
    # An index and new objects of its own: the repository stays as it is.
    objects = folder.with_name(f"{folder.name}.objects")
    objects.mkdir()
    apart = {
        "GIT_INDEX_FILE": str(folder.with_name(f"{folder.name}.index")),
        "GIT_OBJECT_DIRECTORY": str(objects),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(ROOT / git("rev-parse", "--git-path", "objects").strip()),
    }
    git("add", "--all", **apart)
    flag = f"core.symlinks={str(links).lower()}"
    git("-c", flag, "checkout-index", "--all", f"--prefix={folder}/", **apart)
    staged = (line.split(maxsplit=3) for line in git("ls-files", "--stage", **apart).splitlines())
    return [path for mode, _, _, path in staged if mode != "120000"]


def packaged(files: list[str]) -> dict[str, str]:
    """What an installation must hold: the path of every file of the packages there, and its path in the checkout."""
    inside = {path: path for path in files if path.startswith("upcycle/")}
    return inside | {f"upcycle/{path}": path for path in files if path.split("/")[0] in LINKED}


def module_names(installed: dict[str, str]) -> dict[str, str]:
    """The import names among :func:`packaged`, and their paths in the checkout."""
    return {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): source
        for path, source in installed.items()
        if path.endswith(".py")
    }


def build(checkout: Path, kind: str, out: Path, mode: str | None = None) -> Path:
    """The only file in ``out`` once what pip calls has built a ``wheel``, an ``sdist`` or an ``editable`` wheel there.

    Args:
        checkout: what is built; setuptools leaves ``build`` and ``upcycle.egg-info`` there.
        kind: one of these three.
        out: is made.
        mode: setuptools' ``editable_mode``.
    """
    settings = {"editable_mode": mode} if mode else {}
    out.mkdir(parents=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r}, {settings!r})"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (built,) = out.iterdir()
    return built


class Environment:
    """A virtual environment that has everything which this one has, except for what ``.pth`` files add to it: upcycle.

    Args:
        folder: is made.
    """

    def __init__(self, folder: Path) -> None:
        venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
        places = {"base": str(folder), "platbase": str(folder)}
        self.packages = Path(sysconfig.get_path("purelib", vars=places))
        self.python = Path(sysconfig.get_path("scripts", vars=places)) / "python"
        others = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
        (self.packages / "others.pth").write_text("\n".join(others), encoding="utf-8")

    def run(self, *arguments: str, cwd: Path, given: str = "") -> str:
        """Standard output of its Python with these arguments and ``given`` as its input; a failure is an assertion."""
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(
            [str(self.python), "-P", *arguments],
            cwd=cwd,
            env=environment,
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout
