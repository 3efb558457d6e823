"""What is started imports nothing from the folder where it is started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from upcycle.hardware import child_processes
from upcycle.hardware.child_processes import run_module, run_script, safe_environment

ROOT = Path(__file__).parents[2]
TRAP = "import pathlib; pathlib.Path(__file__).with_name('RAN').touch(); raise SystemExit(9)\n"


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """A folder with modules that a process might import by mistake."""
    for name in ("json", "runpy", "upcycle", "torch", "deepspeed", "answering", "sitecustomize", "usercustomize"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    return tmp_path


def said(command: list[str], folder: Path, **environment: str) -> str:
    # None of the variables that would make it safe by themselves.
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=folder, env={**plain, **environment}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "RAN").exists()
    return done.stdout


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 0)])
def test_modules(version: tuple[int, int, int], downloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_processes.sys, "version_info", version)
    command = run_module("json.tool")
    assert ("-P" in command) == (version >= (3, 11))
    (downloaded / "given").write_text("[1]")
    assert json.loads(said([*command, "given"], downloaded)) == [1]


def test_scripts_find_what_lies_beside_them_and_nothing_where_they_run(downloaded: Path, tmp_path: Path) -> None:
    (own := tmp_path / "own").mkdir()
    (own / "beside.py").write_text("import json\nword = json.dumps('found')\n")
    (own / "script.py").write_text("import sys\nimport beside\nprint(beside.word, __name__, sys.argv[1:])\n")
    command = [*run_script(own / "script.py", sys.executable), "a"]
    assert said(command, downloaded) == "\"found\" __main__ ['a']\n"
    assert said(command, downloaded, **{child_processes.SAFE_PATH_VARIABLE: "1"}) == "\"found\" __main__ ['a']\n"


def test_what_they_start_themselves_is_safe_too(downloaded: Path) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no PYTHONSAFEPATH")
    inner = f"import subprocess, sys; subprocess.run([{sys.executable!r}, '-c', 'import json'], check=True)"
    assert safe_environment({})[child_processes.SAFE_PATH_VARIABLE] == "1"
    said([sys.executable, "-P", "-c", inner], downloaded, **safe_environment({}))


def test_everything_that_starts_python_does_it_so() -> None:
    """Commands are made in one module, and none is given another place to import from."""
    asks = re.compile(r"sys\.executable|\"-m\"|PYTHONPATH|os\.chdir|multiprocessing|sys\.path")
    allowed = {
        "upcycle/hardware/child_processes.py": {"sys.executable", '"-m"', "sys.path"},
        "upcycle/verification/engines/verify_with.py": {"sys.executable"},  # the engine's, which run_script starts
        "upcycle/publishing/gguf.py": {"sys.executable"},  # likewise, of llama.cpp's converter
        "upcycle/cli/shared/options.py": {'"-m"'},  # of --method
        "upcycle/verification/engines/workers/llama_cpp_worker.py": {'"-m"'},  # of llama-server's --model
        "kernels/gpu/compile_gate/__main__.py": {"multiprocessing"},  # its processes have this one's sys.path
        "upcycle/cli/host_ranks.py": {"os.chdir"},  # the ranks' folder; their commands are of child_processes.py
    }
    found = {
        (str(path.relative_to(ROOT)), word)
        for folder in ("upcycle", "kernels", "trainers", "splitters")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for word in asks.findall(path.read_text(encoding="utf-8"))
    }
    assert {(name, word) for name, word in found if word not in allowed.get(name, set())} == set()
