"""``upcycle tune-kernels`` without a GPU, and its arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from upcycle.cli.main import main

SHAPE = ["--hidden", "64", "--width", "32", "--experts", "4", "--top-k", "2"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["tune-kernels", *arguments])
    return int(ended.value.code or 0)


def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(str(tmp_path / "tiles.json"), *SHAPE) == 4
    error = capsys.readouterr().err
    assert "CUDA device" in error or "Triton is not installed" in error
    assert "hint:" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "8,x"], "--tokens takes numbers"),
        (["--tokens", "0"], "--tokens takes numbers"),
        (["--top-k", "5"], "--top-k is 5, but --experts only 4"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "tiles.json"), *SHAPE, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "nowhere" / "tiles.json"), *SHAPE) == 2
    assert "no such folder" in capsys.readouterr().err
