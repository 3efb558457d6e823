"""Ranks are started with what they need, signals are handed on, and a failed one decides the exit code; here and on hosts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.trainers.distributed import hosts, launcher

SSH = """#!/bin/bash
while [[ $1 == -* ]]; do case $1 in -o|-p) shift 2;; *) shift;; esac; done
host=$1; shift
[ "$host" = unreachable ] && exit 255
exec bash -c "$*"
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What ranks run in place of upcycle, on this machine and on hosts."""
    monkeypatch.setattr(launcher, "_MODULE", "rank_script")
    agent = (
        "from upcycle.cli import host_ranks",
        "from upcycle.trainers.distributed import launcher",
        "launcher._MODULE = 'rank_script'",
        "raise SystemExit(host_ranks.main())",
    )
    (tmp_path / "agent_script.py").write_text("\n".join(agent))
    monkeypatch.setattr(hosts, "AGENT", "agent_script")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return tmp_path / "rank_script.py"


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for ssh: runs the command here."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def hostfile(folder: Path, *lines: str) -> Path:
    path = folder / "hosts"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


PLACES = (
    "import os, pathlib, sys\n"
    "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')\n"
    "text = ' '.join([*(os.environ[name] for name in names), *sys.argv[1:]])\n"
    "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(text)\n"
)


def test_every_rank_gets_its_place_and_the_arguments(script: Path, tmp_path: Path) -> None:
    script.write_text(PLACES)
    assert launcher.launch_ranks([str(tmp_path), "a b"], 3) == 0
    for rank in range(3):
        assert (tmp_path / str(rank)).read_text() == f"{rank} {rank} 3 {tmp_path} a b"


TELLS = (
    "import os\n"
    "from upcycle.cli.main import _failed\n"
    "from upcycle.errors import UsageError\n"
    "own = 'disk of rank ' + os.environ['RANK'] if 'own' in os.sys.argv else 'wrong key'\n"
    "raise SystemExit(_failed(UsageError(own, hint='mend it'), ['--json']))\n"
)


def test_an_error_that_all_ranks_have_is_printed_once(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script.write_text(TELLS)
    assert launcher.launch_ranks([], 2) == 2
    out, err = capfd.readouterr()
    assert (err.count("error: wrong key"), err.count("hint: mend it"), out.count('"error"')) == (1, 1, 1)
    assert launcher.launch_ranks(["own"], 2) == 2
    err = capfd.readouterr().err
    assert all(f"error: disk of rank {rank}" in err for rank in (0, 1))
    assert launcher.launch_ranks([], 2) == 2  # of another launch
    assert capfd.readouterr().err.count("error: wrong key") == 1


def test_hosts_get_their_ranks_the_folder_and_the_environment(
    script: Path, ssh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write_text(PLACES + "pathlib.Path(sys.argv[1], 'more').write_text(os.environ['HF_SECRET'] + os.getcwd())\n")
    monkeypatch.setenv("HF_SECRET", "s3cret ")
    monkeypatch.chdir(tmp_path)
    path = hostfile(tmp_path, "# two machines", "one slots=1", "", "two  slots=2  # large")
    assert hosts.launch_hosts([str(tmp_path), "a 'b'"], path, None) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [
        f"{place} 3 {tmp_path} a 'b'" for place in ("0 0", "1 0", "2 1")
    ]
    assert (tmp_path / "more").read_text() == f"s3cret {tmp_path}"


@pytest.mark.long
def test_the_exit_code_is_that_of_the_rank_that_failed(
    script: Path, ssh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_AFTER_FAILURE", 0.2)
    script.write_text("import os, sys, time\nsys.exit(4) if os.environ['RANK'] == '1' else time.sleep(60)\n")
    assert launcher.launch_ranks([], 2) == 4
    assert hosts.launch_hosts([], hostfile(tmp_path, "one slots=1", "two slots=1"), None) == 4


def test_a_rank_ended_by_a_signal_fails_like_in_a_shell(script: Path) -> None:
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert launcher.launch_ranks([], 1) == 137


SAVES = (  # says that it runs, and saves when it is told to
    "import os, pathlib, signal, sys, time\n"
    "folder, rank = pathlib.Path(sys.argv[1]), os.environ['RANK']\n"
    "def save(number, _):\n"
    "    (folder / f'saved-{rank}').write_text(signal.Signals(number).name)\n"
    "    sys.exit(130)\n"
    "for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1'): signal.signal(getattr(signal, name), save)\n"
    "(folder / f'runs-{rank}').write_text(str(os.getpid()))\n"
    "time.sleep(60); sys.exit(9)\n"
)
STUBBORN = SAVES.replace("    sys.exit(130)\n", "")
START = (
    "import sys; from pathlib import Path; from upcycle.trainers.distributed import hosts, launcher\n"
    "launcher._MODULE, hosts.AGENT = 'rank_script', 'agent_script'\n"
    "a, b = sys.argv[1:]\n"
    "sys.exit(launcher.launch_ranks([a], 2) if b == 'nproc' else hosts.launch_hosts([a], Path(b), None))\n"
)


def until(*paths: Path) -> None:
    end = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < end, [path.name for path in paths if not path.exists()]
        time.sleep(0.02)


def start(way: str, folder: Path) -> subprocess.Popen[bytes]:
    """Two ranks, running."""
    where = {
        "nproc": "nproc",
        "here": str(hostfile(folder, "localhost slots=2")),
        "ssh": str(hostfile(folder, "one slots=1", "two slots=1")),
    }[way]
    process = subprocess.Popen([sys.executable, "-P", "-c", START, str(folder), where])
    until(folder / "runs-0", folder / "runs-1")
    return process


def gone(folder: Path) -> bool:
    return not any(Path("/proc", (folder / f"runs-{rank}").read_text()).exists() for rank in (0, 1))


@pytest.mark.parametrize("way", ["nproc", pytest.param("here", marks=pytest.mark.long), "ssh"])
@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(n, marks=pytest.mark.long) for n in ("SIGINT", "SIGHUP", "SIGUSR1"))]
)
def test_signals_are_handed_on_and_ranks_waited_for(
    script: Path, ssh: None, tmp_path: Path, way: str, name: str
) -> None:
    script.write_text(SAVES)
    process = start(way, tmp_path)
    process.send_signal(signal.Signals[name])
    assert process.wait(60) == 130
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [name, name]
    assert gone(tmp_path)


@pytest.mark.parametrize("way", ["nproc", pytest.param("ssh", marks=pytest.mark.long)])
def test_a_second_signal_ends_ranks_that_do_not_end(script: Path, ssh: None, tmp_path: Path, way: str) -> None:
    script.write_text(STUBBORN)
    process = start(way, tmp_path)
    process.terminate()
    until(tmp_path / "saved-0", tmp_path / "saved-1")
    time.sleep(launcher.TOGETHER)
    process.terminate()
    assert process.wait(60) == 130
    assert gone(tmp_path)


def test_a_launcher_that_is_killed_takes_the_ranks_of_other_machines_with_it(
    script: Path, ssh: None, tmp_path: Path
) -> None:
    script.write_text(SAVES)
    process = start("ssh", tmp_path)
    process.kill()
    until(tmp_path / "saved-0", tmp_path / "saved-1")
    assert (tmp_path / "saved-0").read_text() == "SIGTERM"
    process.wait()


def test_a_rank_notices_that_its_launcher_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from upcycle.trainers.distributed.signals import LAUNCHER, Stopped, StopSignals

    monkeypatch.setenv(LAUNCHER, str(os.getppid() + 1))  # whoever started this process, it was not that one
    with pytest.raises(Stopped, match="SIGTERM"), StopSignals(lambda _: None):
        time.sleep(10)
    assert threading.current_thread() is threading.main_thread()


WAITS = (
    "import sys, time; from upcycle.trainers.distributed.signals import StopSignals\n"
    "with StopSignals(lambda text: print(text, flush=True)) as signals, signals.steps():\n"
    "    print('runs', flush=True)\n"
    "    for _ in range(600): time.sleep(0.1)\n"
)


@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_a_step_that_does_not_end(second: str) -> None:
    process = subprocess.Popen([sys.executable, "-P", "-c", WAITS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "runs\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline().startswith("SIGTERM: finishing and saving the current step")
    process.send_signal(signal.SIGINT)  # so soon after: the same event, passed on by somebody
    time.sleep(launcher.TOGETHER)
    assert process.poll() is None
    process.send_signal(signal.Signals[second])
    assert process.wait(10) == 130
    process.stdout.close()


@pytest.mark.parametrize(
    ("lines", "nproc", "message"),
    [
        (["worker-1"], None, "cannot read 'worker-1' in line 1"),
        (["a slots=2", "b slots=none"], None, "cannot read 'b slots=none' in line 2"),
        (["-oProxyCommand=x slots=2"], None, "is not the name of a machine"),
        (["a slots=1", "a slots=1"], None, "'a' is listed twice"),
        (["a slots=1"], 2, "a has slots=1, and --nproc is 2"),
        (["# nothing"], None, "lists no machine"),
    ],
)
def test_host_files_that_cannot_be_used(tmp_path: Path, lines: list[str], nproc: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        hosts.read_hosts(hostfile(tmp_path, *lines), nproc)
    with pytest.raises(UsageError, match="no such host file"):
        hosts.read_hosts(tmp_path / "none", nproc)


def test_a_machine_that_cannot_be_reached_is_named(
    script: Path, ssh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_AFTER_FAILURE", 0.2)
    script.write_text("import time; time.sleep(60)\n")
    with pytest.raises(EnvironmentFault, match="ssh connection to unreachable"):
        hosts.launch_hosts([], hostfile(tmp_path, "localhost slots=1", "unreachable slots=1"), None)
    with pytest.raises(EnvironmentFault, match="the address of unreachable"):
        hosts.launch_hosts([], hostfile(tmp_path, "unreachable slots=1"), None)
