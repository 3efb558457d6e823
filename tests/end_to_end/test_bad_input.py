"""Every bad input gives one clear error with the documented exit code, and leaves nothing half-written or lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.cli.main import main
from upcycle.files.formats.tensor_files import INDEX, SINGLE

FAIL, USAGE, ENVIRONMENT = 1, 2, 4
Damage = Callable[[Path], None]


def config(**changes: Any) -> Damage:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return apply


def poison(value: float) -> Damage:
    return weights(lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1).__setitem__(7, value))


def bias(name: str, size: int) -> Damage:
    return weights(lambda t: t.__setitem__(f"model.layers.0.{name}.bias", torch.zeros(size)))


def only_pickle(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: len(content) // 2])


def flip(folder: Path) -> None:
    content = bytearray((folder / SINGLE).read_bytes())
    content[8] ^= 0x10  # the header's opening brace
    (folder / SINGLE).write_bytes(content)


def index(mapping: dict[str, str]) -> Damage:
    return lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": mapping})) and None


def only_index(mapping: dict[str, str]) -> Damage:
    def damage(folder: Path) -> None:
        index(mapping)(folder)
        (folder / SINGLE).unlink()

    return damage


def damages(*several: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for each in several:
            each(folder)

    return damage


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


CASES: dict[str, tuple[Damage, list[str], int, list[str]]] = {
    # name: (damage, extra arguments, exit code, what the message must say)
    "pickle only": (only_pickle, [], FAIL, ["only pickle weights", "pytorch_model.bin", "hint:"]),
    "truncated shard": (cut, [], FAIL, ["model.safetensors is damaged", "download"]),
    "flipped bit": (flip, [], FAIL, ["model.safetensors is damaged", "header is not valid"]),
    "shard missing": (only_index({"a": "gone.safetensors"}), [], FAIL, ["gone.safetensors, which is missing"]),
    "index leaves its folder": (index({"a": "../x.safetensors"}), [], FAIL, ["points outside its folder"]),
    "NaN": (poison(float("nan")), [], FAIL, ["'model.layers.1.mlp.up_proj.weight' holds NaN"]),
    "Inf": (poison(float("inf")), [], FAIL, ["'model.layers.1.mlp.up_proj.weight' holds Inf"]),
    "wrong shape": (config(intermediate_size=104), [], FAIL, ["has shape [96, 32], config.json says [104, 32]"]),
    "missing tensor": (weights(lambda t: t.pop("model.norm.weight")), [], FAIL, ["'model.norm.weight' is missing"]),
    "undeclared bias": (bias("self_attn.q_proj", 32), [], FAIL, ["q_proj.bias' is not part of a llama model"]),
    "no config": (lambda f: (f / "config.json").unlink(), [], FAIL, ["config.json is missing"]),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{") and None, [], FAIL, ["config.json is not JSON"]),
    "no model_type": (config(model_type=None), [], FAIL, ["has no 'model_type'"]),
    "bitnet": (config(model_type="bitnet"), [], USAGE, ["'bitnet' model", "norms inside its FFN"]),
    "already a MoE": (config(model_type="mixtral"), [], USAGE, ["is a Mixture-of-Experts already"]),
    "NoPE layers": (config(no_rope_layers=[1, 0, 1]), [], USAGE, ["NoPE"]),
    "quantized": (
        damages(
            config(quantization_config={"quant_method": "gptq"}),
            weights(lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": t.pop("model.layers.0.mlp.up_proj.weight").int()})),
        ), [], USAGE, ["quantized (gptq)", "up_proj.qweight"],
    ),
    "int8": (
        weights(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].char()})), [], USAGE,
        ["quantized", "'model.norm.weight' is int8"],
    ),
    "tokenizer missing": (no_tokenizer, [], USAGE, ["has no tokenizer", "--tokenizer none"]),
    "K > E": (lambda f: None, ["--experts", "4", "--top-k", "5"], USAGE, ["top_k is 5", "only 4 experts"]),
    "E does not divide F": (
        lambda f: None, ["--method", "random_split", "--experts", "7"], USAGE, ["do not divide into 7", "--pad"],
    ),
    "unknown method": (lambda f: None, ["--method", "randm_split"], USAGE, ["did you mean 'random_split'"]),
    "unknown router": (lambda f: None, ["--router", "coool"], USAGE, ["did you mean 'cool'"]),
    "unknown target": (lambda f: None, ["--target", "mixtrall"], USAGE, ["did you mean 'mixtral'"]),
    "unknown recipe key": (lambda f: None, ["--set", "exprts=4"], USAGE, ["unknown key 'exprts'", "did you mean 'experts'"]),
    "wrong type": (lambda f: None, ["--set", "experts=many"], USAGE, ["key 'experts'", "'many'"]),
    "scale of zero": (lambda f: None, ["--scale", "0"], USAGE, ["key 'scale'", "positive number", "got 0"]),
    "scale that is no number": (lambda f: None, ["--scale", "nan"], USAGE, ["key 'scale'", "positive number"]),
    "negative scale": (lambda f: None, ["--scale", "-1"], USAGE, ["key 'scale'", "positive number"]),
    "unreadable value": (lambda f: None, ["--set", "experts=["], USAGE, ["cannot read the value in 'experts=['"]),
    "size is no number": (config(hidden_size="big"), [], FAIL, ["'hidden_size' must be a positive integer, got 'big'"]),
    "no heads": (config(num_attention_heads=0), [], FAIL, ["'num_attention_heads' must be a positive integer, got 0"]),
    "unknown parameter": (lambda f: None, ["--router-param", "sdt=1"], USAGE, ["unknown key 'sdt'", "did you mean 'std'"]),
    "parameter for none": (
        lambda f: None, ["-m", "random_split", "--param", "x=1"], USAGE, ["unknown key 'x'", "takes no parameters"],
    ),
    "assignment without =": (lambda f: None, ["--param", "x"], USAGE, ["--param takes NAME=VALUE"]),
    "zero router": (
        lambda f: None, ["--method", "random_split", "--top-k", "4", "--router", "zero"], USAGE, ["the others never learn"],
    ),
    "sum of copies": (lambda f: None, ["--scale", "sum"], USAGE, ["averaged, not summed"]),
    "shared copies": (lambda f: None, ["--shared", "1"], USAGE, ["no shared experts"]),
    "revision of a folder": (lambda f: None, ["--revision", "main"], USAGE, ["only applies to a hub id"]),
}  # fmt: skip


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(caught.value.code or 0), captured.err


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, arguments, code, parts = CASES[name]
    damage(dense)
    found, message = run(["convert", str(dense), str(tmp_path / "out"), *arguments], capsys)
    assert message.count("error: ") == 1
    for part in parts:
        assert part in message
    assert found == code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "arguments", "message", "hint"),
    [
        (
            {"attention_bias": True},
            ["--target", "mixtral"],
            "biases on the q, k and v projections, a bias on the attention output",
            "granitemoe",
        ),
        ({"mlp_bias": True}, ["--target", "mixtral"], "cannot hold biases in the FFN", "gpt_oss"),
    ],
)
def test_llama_with_biases(
    changes: dict[str, bool],
    arguments: list[str],
    message: str,
    hint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = {
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    LlamaForCausalLM(LlamaConfig(**tiny, **changes)).save_pretrained(tmp_path / "dense")
    command = ["convert", str(tmp_path / "dense"), str(tmp_path / "out"), "--tokenizer", "none"]
    found, text = run([*command, *arguments], capsys)
    assert found == USAGE
    assert message in text
    assert hint in text


def test_windows_a_target_cannot_hold(
    pico: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(pico("qwen2-windows")), str(tmp_path / "out"), "--target", "mixtral"]
    found, message = run(arguments, capsys)
    assert found == USAGE
    assert "sliding windows on some layers only" in message
    assert "--target qwen2_moe" in message


@pytest.mark.parametrize("source", ["no/such/folder", "./nowhere", "nothing", "missing.gguf", "missing.yaml"])
def test_missing_path(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, message = run(["convert", source, str(tmp_path / "out")], capsys)
    assert found == USAGE
    assert source.removeprefix("./") in message


@pytest.mark.parametrize("words", ["verify", "card", "report", "evaluate", "export OUT", "push me/moe --dry-run"])
def test_a_folder_that_is_not_there_is_said_to_be_missing(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *others = words.replace("OUT", str(tmp_path / "out")).split()
    found, message = run([verb, str(tmp_path / "nothing"), *others], capsys)
    assert found == USAGE
    assert "no such f" in message
    assert list(tmp_path.iterdir()) == []


def test_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    found, message = run(["convert", "org/model", str(tmp_path / "out")], capsys)
    assert found == ENVIRONMENT
    assert "HF_HUB_OFFLINE is set" in message
    assert "hf download org/model" in message


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        ("RepositoryNotFoundError", USAGE, "no hub repository is called org/model"),
        ("GatedRepoError", USAGE, "accept its licence"),
        ("RevisionNotFoundError", USAGE, "has no revision 'v9'"),
        ("LocalEntryNotFoundError", ENVIRONMENT, "the hub cannot be reached"),
    ],
)
def test_hub_answers(
    error: str,
    code: int,
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import httpx2
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)
    request = httpx2.Request("GET", "https://hub")
    made = kind("no") if error.startswith("Local") else kind("no", response=httpx2.Response(404, request=request))

    def refuse(*_: Any, **__: Any) -> str:
        raise made

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    found, message = run(["convert", "org/model", str(tmp_path / "out"), "--revision", "v9"], capsys)
    assert found == code
    assert part in message


def test_out_that_is_not_empty(pico: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("keep me")
    found, message = run(["convert", str(pico("llama")), str(tmp_path)], capsys)
    assert found == USAGE
    assert "upcycle did not write what is in it (mine)" in message
    assert "--overwrite" not in message
    assert (tmp_path / "mine").read_text() == "keep me"


@pytest.mark.parametrize("out", ["dense", "."])
def test_an_out_that_would_replace_its_source(
    out: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in dense.iterdir())
    found, message = run(["convert", str(dense), str(tmp_path / out), "--overwrite"], capsys)
    assert found == USAGE
    assert "upcycle did not write what is in it" in message
    assert sorted(path.name for path in dense.iterdir()) == before


def test_a_text_to_verify_on_is_looked_at_first(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, message = run(["convert", str(dense), str(tmp_path / "out"), "--verify-text", "none.txt"], capsys)
    assert found == USAGE
    assert "no such text file: none.txt" in message
    assert not (tmp_path / "out.partial").exists()


def test_read_only_out(
    pico: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:  # permissions do not bind root; the system call's answer is what matters
        make = Path.mkdir

        def refuse(path: Path, *told: Any, **named: Any) -> None:
            if tmp_path in path.parents:
                raise PermissionError(13, "Permission denied")
            make(path, *told, **named)

        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        tmp_path.chmod(0o500)
    found, message = run(["convert", str(pico("llama")), str(tmp_path / "out")], capsys)
    assert found == ENVIRONMENT
    assert "cannot write" in message
    assert "Permission denied" in message


def test_a_disk_that_is_too_small_is_refused_before_writing(
    pico: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    found, message = run(["convert", str(pico("llama")), str(tmp_path / "out")], capsys)
    assert found == ENVIRONMENT
    assert "the conversion needs" in message


@pytest.mark.long
def test_a_disk_that_fills_up_ends_cleanly_and_resumes(
    pico: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from upcycle.checkpoints.shard_writer import ShardWriter

    arguments = {"experts": 4, "verification": {"tokens": 64}}
    upcycle.convert(str(pico("llama")), tmp_path / "whole", **arguments)
    write, left = ShardWriter._append, [1_000_000]

    def limited(self: ShardWriter, data: Any, previous: Any) -> None:
        left[0] -= memoryview(data).nbytes
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        write(self, data, previous)

    monkeypatch.setattr(ShardWriter, "_append", limited)
    flags = ["--experts", "4", "--verify-tokens", "64"]
    found, message = run(["convert", str(pico("llama")), str(tmp_path / "out"), *flags], capsys)
    assert found == ENVIRONMENT
    assert "the disk is full" in message
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", **arguments)
    assert result.resumed
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "whole" / SINGLE).read_bytes()
