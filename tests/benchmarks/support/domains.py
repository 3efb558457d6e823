"""Unlike kinds of real text, split by document into a part to calibrate on and a part to measure on.

``documentation``: Python's language reference (``pydoc_data.topics``); ``code``: the standard library's sources;
``science``: SciPy's docstrings, mathematics and statistics in English. These three are calibrated on. ``library`` is other code,
scikit-learn's without its docstrings, which the demo model has not seen either (``mixing_quality.py``). ``news`` is only measured
on, as text unlike all that was calibrated on: 300 news mails of the Australian Broadcasting Corporation (Lee, Pincombe and
Welsh 2005), which the gensim 4.3.3 wheel carries. A document's name decides by its SHA-256 which part it is in: one in six is
measured on.
"""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

from smollm2 import cache_folder

WHEEL = "gensim==4.3.3"
_NEWS = "gensim/test/test_data/lee_background.cor"
_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "ensurepip", "encodings", "tkinter"}
DOMAINS = ("documentation", "code", "science")
FOREIGN = "news"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def texts(domains: Sequence[str] = DOMAINS) -> tuple[list[Path], list[Path]]:
    """Files to calibrate on and files to measure on, one of each per domain; made when they are not in the cache."""
    folder = cache_folder() / f"domains-{sys.version_info[0]}.{sys.version_info[1]}"
    folder.mkdir(exist_ok=True)
    found: tuple[list[Path], list[Path]] = ([], [])
    for domain in domains:
        paths = [folder / f"{domain}.{part}.txt" for part in ("calibration", "evaluation")]
        if not all(path.exists() for path in paths):
            for path, documents in zip(paths, parted(domain), strict=True):
                path.write_text("\n\n".join(documents), encoding="utf-8")
        for part, path in zip(found, paths, strict=True):
            part.append(path)
    return found


def parted(domain: str) -> tuple[list[str], list[str]]:
    """A domain's documents to calibrate or train on, and those to measure on; in an order that tells nothing of them."""
    parts: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for name, text in _documents(domain):
        key = hashlib.sha256(f"{domain}/{name}".encode()).hexdigest()
        parts[int(key, 16) % 6 == 0].append((key, text))
    calibration, evaluation = ([text for _, text in sorted(part)] for part in parts)
    return calibration, evaluation


def _documents(domain: str) -> Iterator[tuple[str, str]]:
    if domain == "documentation":
        from pydoc_data.topics import topics

        yield from topics.items()
    elif domain == "code":
        library = Path(sysconfig.get_paths()["stdlib"])
        for path in sorted(library.rglob("*.py")):
            name = path.relative_to(library)
            if not _SKIPPED & set(name.parts):
                yield str(name), path.read_text(encoding="utf-8", errors="ignore")
    elif domain == "science":
        for name, path in _modules("scipy"):
            yield name, _docstrings(path)
    elif domain == "library":
        for name, path in _modules("sklearn"):
            yield name, _bare_code(path)
    else:
        yield from _news()


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    folder = Path(str(find_spec(package).origin)).parent  # type: ignore[union-attr]
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if not _SKIPPED & set(name.parts):
            yield str(name), path


def _bare_code(path: Path) -> str:
    """A module without docstrings and comments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _docstrings(path: Path) -> str:
    """Every docstring of a module, in order; each once, since modules pass functions on."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, _DOCUMENTED))
    return "\n\n".join(dict.fromkeys(filter(None, map(ast.get_docstring, nodes))))


def _news() -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory(dir=cache_folder()) as downloads:
        # The text is the same in every wheel: take one that exists, whatever runs this.
        platform = ["--platform", "manylinux2014_x86_64", "--python-version", "3.11", "--only-binary", ":all:"]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            *platform,
            "--dest",
            downloads,
            WHEEL,
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            lines = archive.read(_NEWS).decode().splitlines()
    yield from ((str(number), line) for number, line in enumerate(lines) if line.strip())


if __name__ == "__main__":
    for part in texts((*DOMAINS, FOREIGN)):
        print(*part, sep="\n")
