"""``upcycle observe`` and ``upcycle compress``: what they print, and what they refuse before any work."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from upcycle.calibration.compressing import moe_walk
from upcycle.cli.main import main
from upcycle.methods.compressing.observations import Observations

pytestmark = pytest.mark.one_in(3)  # the other cases are long

Models = Callable[..., Path]
TEXT = ("--calibration", "demo", "--calibration-tokens", "512")


class Result(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def run(*arguments: Any) -> Result:
    """Run a command as the shell does, errors turned into messages."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return Result(int(stopped.value.code or 0), out.getvalue(), err.getvalue())


def refused(message: str, hint: str, *arguments: Any, code: int = 2) -> None:
    result = run(*arguments)
    said = " ".join(result.stderr.split())
    assert re.search(message, said), said
    assert hint in said.partition("hint:")[2], said
    assert result.exit_code == code
    assert not result.stdout


@pytest.fixture
def no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before the model runs."""

    def never(*given: Any) -> None:
        raise AssertionError("a layer was run")

    monkeypatch.setattr(moe_walk.MoeWalk, "__init__", never)


@pytest.fixture
def seen(pico_moe: Models, tmp_path: Path) -> Path:
    path = tmp_path / "seen.safetensors"
    assert run("observe", pico_moe("mixtral"), path, *TEXT, "--quiet").exit_code == 0
    return path


def test_observe_once_cut_many(pico_moe: Models, seen: Path, tmp_path: Path) -> None:
    for method, keep in (("reap", 0.75), ("hc_smoe", 0.5)):
        out = tmp_path / method
        keys = ("--method", method, "--keep", keep, "--observations", seen, "--refit", "none")
        result = run("compress", pico_moe("mixtral"), out, *keys, "--set", "verification.tokens=64", "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["plan"]["calibration_tokens"] == 0
        assert json.loads((out / "config.json").read_text())["num_local_experts"] == 4 * keep


def test_observe_says_what_it_saw(pico_moe: Models, tmp_path: Path) -> None:
    out = tmp_path / "seen.safetensors"
    result = run("observe", pico_moe("qwen2_moe"), out, *TEXT)
    assert result.exit_code == 0, result.stderr
    assert "4 in 1 layers, top-2, on 512 tokens" in " ".join(result.stdout.split())
    assert f"--observations {out}" in " ".join(result.stdout.split())
    told = json.loads(run("observe", pico_moe("qwen2_moe"), out, *TEXT, "--overwrite", "--json").stdout)
    observed = Observations.read(out)
    few = int((observed.layers[1].load < 32).sum())
    assert told["layers"] == [{"layer": 1, "unused": 0, "few": few}]
    assert observed.text["tokens"] == 512


def test_compress_defaults_to_naee_and_says_what_is_left(pico_moe: Models, tmp_path: Path) -> None:
    result = run("compress", pico_moe("mixtral"), tmp_path / "out", "--keep", 0.75, *TEXT, "--dry-run")
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert "mixtral by naee: 3 experts from 4, top-2" in said
    assert not (tmp_path / "out").exists()


def test_unused_experts_are_counted_and_the_result_is_finite(
    pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router that never chooses the last expert."""
    import shutil

    source = shutil.copytree(pico_moe("dots1"), tmp_path / "idle")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[3] = -100.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = tmp_path / "seen.safetensors"
    result = run("observe", source, out, *TEXT)
    assert "2 experts were chosen by fewer than 32 tokens of the text, 2 of them by none" in " ".join(
        result.stderr.split()
    )
    assert "2 experts; 2 saw fewer than 32 tokens" in " ".join(result.stdout.split())
    for method in ("reap", "frequency", "m_smoe", "hc_smoe", "naee"):
        keys = ("--method", method, "--keep", 0.75, "--observations", out, "--refit", "none", "--no-verify")
        result = run("compress", source, tmp_path / method, *keys)
        assert result.exit_code == 0, result.stderr
        assert "2 of them by none" in " ".join(result.stderr.split())
        written = load_file(tmp_path / method / "model.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in written.values())
        cut = json.loads((tmp_path / method / "compression.json").read_text())["experts"]
        if method == "reap":
            assert all(3 not in layer["rows"] for layer in cut.values())


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ((*TEXT,), "naee needs to know how many experts are kept", "--keep 0.75"),
        (("--keep", 0, *TEXT), "keep", "greater than 0"),
        (("--keep", 1.5, *TEXT), "keep", ""),
        (("--keep", 0.25, *TEXT), "keep 0.25 of 4 experts leaves 1, and every token chooses 2", "--keep 0.5 or more"),
        (("--keep", 0.9, *TEXT), "keep 0.9 of 4 experts rounds to all of them", "--keep 0.75 leaves one out"),
        (("--keep", 0.5), "method naee looks at activations and needs calibration text", "--calibration"),
        (("--method", "qmoe", "--refit", "blocks", *TEXT), "refit: blocks trains experts", "--refit down or none"),
        (("--keep", 0.5, "--refit", "scale", *TEXT), "refit: scale is of splits", "--refit down, blocks or none"),
        (("--keep", 0.5, "--method", "random_split", *TEXT), "random_split does not compress", "--method naee"),
        (("--keep", 0.5, "--method", "expert_upcycling"), "expert_upcycling does not compress", "upcycle convert"),
        (("--keep", 0.5, "--method", "repa", *TEXT), "repa", "reap"),
        (
            ("--keep", 0.5, "--observations", "nowhere.safetensors", "--refit", "none"),
            "nowhere.safetensors is not there",
            "observe",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(
    arguments: tuple[Any, ...], message: str, hint: str, pico_moe: Models, tmp_path: Path, no_walk: None
) -> None:
    result = run("compress", pico_moe("mixtral"), tmp_path / "out", *arguments)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2, said
    assert message in said
    assert hint in said
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("name", "arguments", "message", "hint"),
    [
        (
            "mixtral",
            TEXT,
            "to_dense needs to know how many neurons the FFN of every layer has",
            "--width 96 is as many",
        ),
        (
            "mixtral",
            ("--width", 200, *TEXT),
            "width 200 is larger than there are neurons: 4 experts of 48, are 192",
            "192",
        ),
        ("dots1", ("--width", 81, *TEXT), "4 experts of 16, and 16 shared, are 80", "--width 80"),
        ("mixtral", ("--width", 64, "--keep", 0.5, *TEXT), "keep and width both say", "leave one"),
        ("mixtral", ("--width", 0, *TEXT), "width", "greater than or equal to 1"),
        (
            "mixtral",
            ("--width", 64),
            "method to_dense looks at activations and needs calibration text",
            "--calibration",
        ),
        (
            "olmoe",
            ("--width", 64, *TEXT),
            "no dense architecture known here has the block of this 'olmoe' model",
            "naee",
        ),
        ("mixtral", ("--width", 64, "--target", "lama", *TEXT), "unknown dense family 'lama'", "did you mean 'llama'"),
        (
            "mixtral",
            ("--width", 64, "--target", "qwen3", *TEXT),
            "is no 'qwen3' model",
            "of mixtral these can be: llama",
        ),
        (
            "mixtral",
            ("--width", 64, "--param", "gather=average", *TEXT),
            "the average of the experts has 48",
            "--width 48",
        ),
        ("mixtral", ("--width", 66, "--param", "gather=top_kg", *TEXT), "66 cannot be divided among 4", "--width 64"),
        ("mixtral", ("--width", 64, "--param", "gather=all", *TEXT), "gather", "neurons"),
        (
            "mixtral",
            ("--width", 64, "--refit", "scale", *TEXT),
            "refit: scale is of splits",
            "--refit down, blocks or none",
        ),
        ("mixtral", ("--width", 64, "--experts", 2, *TEXT), "--experts", ""),
    ],
)
def test_what_no_dense_model_can_be_made_of_is_refused(
    name: str, arguments: tuple[Any, ...], message: str, hint: str, pico_moe: Models, tmp_path: Path, no_walk: None
) -> None:
    result = run("compress", pico_moe(name), tmp_path / "out", "--method", "to_dense", *arguments)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2, said
    assert message in said
    assert hint in said
    assert not list(tmp_path.glob("out*"))


def test_the_plan_of_a_dense_model_says_both_architectures(pico_moe: Models, tmp_path: Path) -> None:
    result = run(
        "compress", pico_moe("mixtral"), tmp_path / "out", "--method", "to_dense", "--keep", 0.5, *TEXT, "--dry-run"
    )
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert "mixtral by to_dense: llama, FFNs of 96 neurons from 4 experts of 48 (50%)" in said
    assert "approximate: one FFN of 96 neurons runs for every token, in the place of 4 experts, top-2" in said


@pytest.mark.parametrize("verb", ["observe", "compress"])
def test_a_dense_model_is_refused(verb: str, pico: Models, tmp_path: Path, no_walk: None) -> None:
    more = ("--keep", 0.5) if verb == "compress" else ()
    result = run(verb, pico("llama"), tmp_path / "out", *TEXT, *more)
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2, said
    assert "llama" in said
    assert "upcycle convert" in said.partition("hint:")[2]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("verb", ["observe", "compress"])
def test_quantised_weights_are_refused(verb: str, pico_moe: Models, tmp_path: Path, no_walk: None) -> None:
    import shutil

    source = shutil.copytree(pico_moe("mixtral"), tmp_path / "int8")
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.0.w1.weight"))
    quantised = {name: tensors[name].to(torch.int8), f"{name}.absmax": torch.ones(1)}
    save_file({**tensors, **quantised}, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    more = ("--keep", 0.5) if verb == "compress" else ()
    result = run(verb, source, tmp_path / "out", *TEXT, *more)
    assert result.exit_code == 2
    assert "bitsandbytes" in result.stderr
    assert "hint:" in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_observations_of_other_weights_are_refused(pico_moe: Models, seen: Path, tmp_path: Path, no_walk: None) -> None:
    keys = ("--keep", 0.5, "--observations", seen, "--refit", "none")
    refused(
        "observations: .*seen.safetensors is of other weights than",
        "upcycle observe",
        *("compress", pico_moe("olmoe"), tmp_path / "out", *keys),
    )
    assert not list(tmp_path.glob("out*"))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _header_only(path: Path) -> None:
    path.write_bytes(b"{}")


def _without(field: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with safe_open(path, "pt") as file:
            about = file.metadata()
        tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(field)}
        save_file(tensors, path, about)

    return damage


def _nan(path: Path) -> None:
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    tensors["1.sample_gram"][0] = float("nan")
    save_file(tensors, path, about)


def _about(path: Path) -> None:
    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file(load_file(path), path, {**about, "text": "["})


def _other(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("damage", "message", "code"),
    [
        (_truncate, "not a whole safetensors file", 1),
        (_header_only, "not a whole safetensors file", 1),
        (_without("1.load"), "layer 1 is not whole", 1),
        (_nan, "'1.sample_gram' is not finite", 1),
        (_about, "what it says of itself is damaged", 1),
        (_other, "holds no observations of this version", 2),
    ],
)
def test_damaged_observations_are_refused(
    damage: Callable[[Path], None], message: str, code: int, pico_moe: Models, seen: Path, tmp_path: Path
) -> None:
    damage(seen)
    keys = ("--keep", 0.5, "--observations", seen, "--refit", "none")
    refused(message, "upcycle observe", "compress", pico_moe("mixtral"), tmp_path / "out", *keys, code=code)
    assert not (tmp_path / "out").exists()


def test_observe_writes_over_nothing_else(pico_moe: Models, seen: Path, tmp_path: Path, no_walk: None) -> None:
    model = pico_moe("mixtral")
    refused("is there already", "--overwrite", "observe", model, seen, *TEXT)
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    result = run("observe", model, other, *TEXT, "--overwrite")
    assert result.exit_code == 1
    assert "not a whole safetensors file" in " ".join(result.stderr.split())
    assert other.read_text() == "mine"
    refused("is a folder, and observations are one file", "seen.safetensors", "observe", model, tmp_path, *TEXT)
    refused("is no folder", "make it first", "observe", model, tmp_path / "no" / "seen.safetensors", *TEXT)


def test_observe_refuses_a_folder_that_cannot_be_written_to(
    pico_moe: Models, tmp_path: Path, no_walk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    refused("cannot be written to", "another folder", "observe", pico_moe("mixtral"), tmp_path / "a", *TEXT, code=4)


def test_observe_says_that_the_disk_is_full(pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("upcycle.methods.compressing.observations_file.ObservationsWriter.write", full)
    refused(
        "the disk is full while writing",
        "free some space",
        "observe",
        pico_moe("mixtral"),
        tmp_path / "a",
        *TEXT,
        code=4,
    )
    assert not any(path.name.startswith(("a", ".a")) for path in tmp_path.iterdir())


@pytest.mark.parametrize("texts", [1, 2])
def test_text_of_one_kind_is_warned_of(texts: int, pico_moe: Models, tmp_path: Path) -> None:
    files = []
    for i in range(texts):
        files.append(tmp_path / f"kind{i}.txt")
        files[-1].write_text("\n".join(f"Line {i} {j} of a text of its own kind." for j in range(400)))
    keys = ("--keep", 0.75, "--calibration", ",".join(map(str, files)), "--calibration-tokens", 512, "--json")
    result = run("compress", pico_moe("mixtral"), tmp_path / "out", *keys, "--dry-run")
    assert result.exit_code == 0, result.stderr
    warnings = json.loads(result.stdout)["warnings"]
    told = [warning for warning in warnings if "one text alone" in warning and "35 of 70" in warning]
    assert len(told) == (texts == 1)
    assert any("cuts hurt text of other kinds" in warning for warning in warnings)


def test_a_recipe_that_names_no_source_takes_one(pico_moe: Models, tmp_path: Path) -> None:
    result = run("compress", "compress_75", tmp_path / "out", "--source", pico_moe("mixtral"), "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["method"] == "naee"
