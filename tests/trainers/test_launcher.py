"""Ranks are started with what they need, signals are handed on, and a failed one decides the exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from upcycle.errors import UsageError
from upcycle.trainers import launcher


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What ranks run in place of upcycle."""
    monkeypatch.setattr(launcher, "_MODULE", "rank_script")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return tmp_path / "rank_script.py"


def test_every_rank_gets_its_place_and_the_arguments(script: Path, tmp_path: Path) -> None:
    script.write_text(
        "import os, pathlib, sys\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')\n"
        "text = ' '.join([*(os.environ[name] for name in names), *sys.argv[1:]])\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(text)\n"
    )
    assert launcher.launch([str(tmp_path), "train"], 3) == 0
    for rank in range(3):
        assert (tmp_path / str(rank)).read_text() == f"{rank} {rank} 3 127.0.0.1 {tmp_path} train"


def test_the_exit_code_is_that_of_the_rank_that_failed(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_AFTER_FAILURE", 0.2)
    script.write_text("import os, sys, time\nsys.exit(4) if os.environ['RANK'] == '1' else time.sleep(60)\n")
    assert launcher.launch([], 2) == 4


def test_a_rank_ended_by_a_signal_fails_like_in_a_shell(script: Path) -> None:
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert launcher.launch([], 1) == 137


def test_signals_are_handed_on(script: Path, tmp_path: Path) -> None:
    script.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "if os.environ['RANK'] == '0': time.sleep(0.3); os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60); sys.exit(9)\n"
    )
    assert launcher.launch([], 2) == 0


def test_host_files(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    hosts = tmp_path / "hosts"
    hosts.write_text("worker-1 slots=8\nworker-2 slots=8\n")
    command = launcher.hosts_command(["train", "r.yaml"], hosts, 4)
    assert command[0] == sys.executable
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert command[command.index("--hostfile") + 1] == str(hosts)
    assert command[command.index("--num_gpus") + 1] == "4"
    assert command[-3:] == ["upcycle.cli.main", "train", "r.yaml"]
    hosts.write_text("worker-1\n")
    with pytest.raises(UsageError, match="cannot read 'worker-1'"):
        launcher.launch_hosts([], hosts, None)
    with pytest.raises(UsageError, match="no such host file"):
        launcher.launch_hosts([], tmp_path / "none", None)
