"""Nothing that only POSIX systems have is needed to import a module or to convert a model."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkouts import ELSEWHERE, ROOT, module_names, packaged

# The standard library's modules that Windows lacks.
POSIX = (
    "crypt",
    "fcntl",
    "grp",
    "nis",
    "pty",
    "pwd",
    "readline",
    "resource",
    "spwd",
    "syslog",
    "termios",
    "tty",
)
# Functions and signals that it lacks, of those that the libraries which are imported before do not need themselves.
NAMES = {
    "os": (
        "chown",
        "fchmod",
        "getegid",
        "geteuid",
        "getgid",
        "getpgid",
        "getuid",
        "killpg",
        "mkfifo",
        "pathconf",
        "setsid",
    ),
    "signal": ("SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm"),
}
PROGRAM = """
import importlib, json, sys
import psutil  # on Linux it needs resource itself
asked = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(asked["posix"]))  # importing one is an ImportError now
import safetensors.torch, sklearn.cluster, torch, transformers.modeling_utils
for module, names in asked["names"].items():
    for name in names:
        delattr(sys.modules[module], name)
for name in asked["modules"]:
    importlib.import_module(name)
import upcycle
done = upcycle.convert("demo", asked["out"], experts=2, verification={"tokens": 64})
print(done.verification.verdict, done.peak_memory_bytes > 1e8)
"""


def names() -> dict[str, str]:
    """Import names of all modules that run in this Python, and their files."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = module_names(packaged(listing.splitlines()))
    return {name: path for name, path in found.items() if not name.startswith(ELSEWHERE)}


def imported_at_once(body: list[ast.stmt]) -> Iterator[str]:
    """Modules that are imported when a module is: not inside functions."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported_at_once([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def test_no_module_of_posix_is_imported_with_ours() -> None:
    text = "if True:\n    import fcntl\ndef f():\n    import pwd\n"
    assert list(imported_at_once(ast.parse(text).body)) == ["fcntl"]
    found = {
        path: module
        for path in names().values()
        for module in imported_at_once(ast.parse((ROOT / path).read_text(encoding="utf-8")).body)
        if module in POSIX
    }
    assert found == {}


@pytest.mark.long
def test_a_system_without_them_imports_all_and_converts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = {"posix": POSIX, "names": NAMES, "modules": list(names()), "out": str(out)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["exact", "True"]
    assert (out / "upcycle.json").is_file()
    assert not [path.name for path in tmp_path.iterdir() if path != out]
