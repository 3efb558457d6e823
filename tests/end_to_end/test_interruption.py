"""kill -9, Ctrl-C and two at once, on a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.errors import UsageError

# Stops a conversion behind a number of units, so that a signal finds it there however busy the machine is. Ctrl-C is given back to it:
# a suite in the background of a script ignores SIGINT, and its children inherit that.
STOPPING = """
import os, signal, sys, time
from upcycle.cli.main import main
from upcycle.checkpoints.shard_writer import ShardWriter
signal.signal(signal.SIGINT, signal.default_int_handler)
finish, left = ShardWriter.finish, [int(os.environ["STOP_BEHIND"])]
def stopping(*arguments):
    finish(*arguments)
    left[0] -= 1
    if not left[0]:
        time.sleep(600)
ShardWriter.finish = stopping
main(sys.argv[1:])
"""
FLAGS = ["--method", "random_split", "--top-k", "4", "--max-shard-size", "600KB", "--no-verify", "--quiet"]
KEYS = {"method": "random_split", "top_k": 4, "max_shard_size": "600KB", "verification": {"enabled": False}}


def start(dense: Path, out: Path, stop_behind: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "STOP_BEHIND": str(stop_behind)}
    command = [sys.executable, "-P", "-c", STOPPING, "convert", str(dense), str(out), *FLAGS]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_units(out: Path, count: int) -> None:
    journal = out.with_name(out.name + ".partial") / "journal.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if journal.exists() and len(journal.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the conversion did not start")


def equal(one: Path, two: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in two.iterdir()) and all(
        (one / name).read_bytes() == (two / name).read_bytes() for name in names
    )


@pytest.mark.long
@pytest.mark.parametrize("units", [1, 3])
def test_killed_then_resumed_is_byte_equal(units: int, pico: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(pico("llama"), out, units)
    wait_for_units(out, units)
    process.kill()
    process.wait()
    assert not out.exists()
    result = upcycle.convert(str(pico("llama")), out, **KEYS)
    assert result.resumed
    upcycle.convert(str(pico("llama")), tmp_path / "whole", **KEYS)
    assert equal(out, tmp_path / "whole")


@pytest.mark.long
def test_resuming_does_not_convert_finished_layers_again(
    pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upcycle.checkpoints.output_layout import Unit
    from upcycle.checkpoints.shard_writer import ShardWriter

    out = tmp_path / "out"
    process = start(pico("llama"), out, 3)
    wait_for_units(out, 3)
    process.kill()
    process.wait()
    finish, written = ShardWriter.finish, []

    def spy(writer: ShardWriter, unit: Unit) -> None:
        written.append(unit.name)
        finish(writer, unit)

    monkeypatch.setattr(ShardWriter, "finish", spy)
    upcycle.convert(str(pico("llama")), out, **KEYS)
    assert written == ["layer 2", "final norm"]


@pytest.mark.long
def test_ctrl_c_ends_with_130_and_says_how_to_go_on(pico: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(pico("llama"), out, 1)
    wait_for_units(out, 1)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to continue" in message
    assert "Traceback" not in message
    assert not out.exists()


@pytest.mark.long
def test_a_second_process_is_turned_away(pico: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(pico("llama"), out, 1)
    wait_for_units(out, 1)
    journal = out.with_name("out.partial") / "journal.jsonl"
    before = journal.read_text()
    second = start(pico("llama"), out, 1)
    _, message = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "another process is writing" in message
    assert journal.read_text() == before
    first.kill()
    first.wait()


@pytest.mark.long
def test_a_changed_source_is_not_resumed(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(dense, out, 1)
    wait_for_units(out, 1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    tensors = load_file(dense / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="unfinished conversion of another"):
        upcycle.convert(str(dense), out, **KEYS)
