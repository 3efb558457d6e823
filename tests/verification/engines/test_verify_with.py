"""``verify --with``: engines that generate the same tokens, others or none, or are missing; what is recorded and printed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from stand_ins import make_llama_cpp, make_llama_cpp_python, make_vllm

import upcycle
from upcycle.cli.main import cli
from upcycle.errors import CheckpointError, EnvironmentFault, UsageError
from upcycle.ffn.shared_switch import half_switch
from upcycle.files import records
from upcycle.verification.engines.llama_cpp_engine import LlamaCpp
from upcycle.verification.engines.verify_with import verify_with
from upcycle.verification.engines.vllm_engine import Vllm


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for vLLM in the engine's Python."""
    monkeypatch.setenv("PYTHONPATH", str(make_vllm(tmp_path / "site")))


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for llama.cpp's converter and its server."""
    monkeypatch.setenv("LLAMA_CPP", str(make_llama_cpp(tmp_path / "llama.cpp")))


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine, wherever this runs."""
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PATH", "")


def loading(folder: Path, engine: str) -> str:
    """The card's line about an engine."""
    text = upcycle.write_card(folder, license="mit").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {engine} |")]
    return row


@pytest.mark.long
def test_an_engine_that_generates_the_same_tokens_is_the_same(out: Path, vllm: None) -> None:
    found = verify_with(out, "vllm", tokens=64)
    assert (found.verdict, found.tokens, found.equal_tokens, found.prompts) == ("same", 64, 64, 2)
    assert found.first_difference is None
    assert found.gap_error <= found.gap_allowed
    assert (found.version, found.dtype, found.tokenizer) == ("vLLM 0.0-stand-in", "float32", "transformers'")
    assert records.read_evaluation(out) == {"serving": {"vllm": json.loads(json.dumps(found.as_dict()))}}
    assert (
        "| yes, vLLM 0.0-stand-in in float32: 64 of 64 greedy tokens are transformers', up to position 48 of 512 |"
        in loading(out, "vLLM")
    )
    assert loading(out, "llama.cpp").endswith("| no |")


@pytest.mark.long
@pytest.mark.usefixtures("vllm")
def test_an_engine_that_ignores_a_window_is_different(
    pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window is longer than the usual prompts with their continuation, so that one prompt is made to reach past it."""
    source, out = shutil.copytree(pico("mistral"), tmp_path / "dense"), tmp_path / "moe"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "sliding_window": 100}))
    upcycle.convert(str(source), out, experts=2, verification={"enabled": False})
    monkeypatch.setenv("STAND_IN", "no window")
    found = verify_with(out, "vllm", tokens=32)
    assert (found.verdict, found.positions, found.positions_needed) == ("different", 148, 100)
    monkeypatch.setattr("upcycle.verification.engines.verify_with.MOST_WORK", 0)
    found = verify_with(out, "vllm", tokens=32)
    assert (found.verdict, found.positions) == ("same", 48)
    assert "up to position 48 of 512; sliding windows or scaled positions begin at 100" in found.explanation
    assert "which was not compared" in loading(out, "vLLM")


@pytest.mark.long
@pytest.mark.usefixtures("nothing")
def test_llama_cpp_runs_in_its_other_binding(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-cpp-python, where there is neither llama-server nor xllamacpp."""
    folder = str(make_llama_cpp_python(tmp_path / "site"))
    monkeypatch.setenv("LLAMA_CPP", folder)
    monkeypatch.setenv("PYTHONPATH", folder)
    found = verify_with(out, "llama.cpp", tokens=16)
    assert (found.verdict, found.equal_tokens, found.tokenizer) == ("same", 16, "same")
    assert found.version == "llama.cpp (llama-cpp-python 0.0-stand-in)"
    monkeypatch.setenv("STAND_IN", "refuse")
    found = verify_with(out, "llama.cpp", tokens=16)
    assert (found.verdict, found.explanation) == (
        "not held",
        "llama.cpp cannot load it: Failed to load model from file",
    )


@pytest.mark.long
@pytest.mark.usefixtures("llama_cpp")
def test_an_engine_that_generates_other_tokens_is_different(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3, the first difference with what rounding explains, and the card warns. What another engine said is kept."""
    before = {"verdict": "same", "version": "vLLM 1", "dtype": "float32", "explanation": "it was compared before"}
    records.write_evaluation(out, {"tasks": None, "serving": {"vllm": before}})
    monkeypatch.setenv("STAND_IN", "wrong")
    result = CliRunner().invoke(cli, ["verify", str(out), "--with", "llama.cpp", "--tokens", "16", "--json"])
    assert result.exit_code == 3 or result.exception
    assert "llama.cpp does not write what transformers writes: after prompt 1, token 1 is" in str(result.exception)
    kept = (records.read_evaluation(out) or {})["serving"]
    assert kept["vllm"] == before
    found = kept["llama.cpp"]
    assert json.loads(result.stdout) == found
    assert found["verdict"] == "different"
    assert found["first_difference"]["found"] == 7
    assert found["first_difference"]["margin"] > found["first_difference"]["allowed"]
    assert found["tokenizer"] == "same"
    assert "llama-server 1 (stand-in)" in found["version"]
    assert "**do not use it**" in loading(out, "llama.cpp")


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("engine", "wrong", "says"),
    [
        ("vllm", "refuse", "vLLM cannot load it: ValueError: Model architectures ['X'] are not supported"),
        ("llama.cpp", "architecture", "converter cannot convert it: Model MixtralForCausalLM is not supported"),
        ("llama.cpp", "tokenizer", "converter cannot convert it: it does not know this tokenizer"),
    ],
)
@pytest.mark.usefixtures("vllm", "llama_cpp")
def test_a_model_that_the_engine_cannot_load_is_not_held(
    engine: str, wrong: str, says: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", wrong)
    result = CliRunner().invoke(cli, ["verify", str(out), "--with", engine])
    assert isinstance(result.exception, UsageError)
    assert says in result.exception.message
    assert "--target" in (result.exception.hint or "")
    assert f"it cannot run this model: {'vLLM' if engine == 'vllm' else 'llama.cpp'}" in loading(
        out, "vLLM" if engine == "vllm" else "llama.cpp"
    )


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize(
    ("engine", "says", "hint"),
    [
        ("vllm", "vLLM is not installed for ", "--engine-python"),
        ("llama.cpp", "convert_hf_to_gguf.py was not found", "LLAMA_CPP"),
    ],
)
def test_a_missing_engine_is_an_error_with_a_hint(engine: str, says: str, hint: str, out: Path) -> None:
    with pytest.raises(EnvironmentFault, match=says) as caught:
        verify_with(out, engine)
    assert hint in (caught.value.hint or "")
    assert records.read_evaluation(out) is None


@pytest.mark.long
def test_a_relative_path_of_python_means_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: Path
) -> None:
    python = tmp_path / "engine" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{make_vllm(tmp_path / "site")}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert verify_with(out, "vllm", tokens=16, python="engine/bin/python").verdict == "same"
    with pytest.raises(EnvironmentFault, match="nowhere/python cannot be run"):
        verify_with(out, "vllm", tokens=16, python="./nowhere/python")


@pytest.mark.usefixtures("vllm")
def test_an_engine_that_dies_is_an_error_with_its_last_lines(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "die")
    with pytest.raises(EnvironmentFault, match=r"(?s)ended \(signal SIGKILL\).*out of memory") as caught:
        verify_with(out, "vllm")
    assert "memory" in (caught.value.hint or "")


@pytest.mark.usefixtures("llama_cpp")
def test_what_the_converter_needs_is_named(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "package")
    with pytest.raises(EnvironmentFault, match="converter needs a_package_that_is_not_there") as caught:
        verify_with(out, "llama.cpp")
    assert "pip install a_package_that_is_not_there" in (caught.value.hint or "")


def test_wrong_arguments_are_refused(out: Path) -> None:
    with pytest.raises(UsageError, match="unknown engine 'ollama'"):
        verify_with(out, "ollama")
    with pytest.raises(EnvironmentFault, match="/no/such/python cannot be run"):
        verify_with(out, "vllm", python="/no/such/python")
    for flags, says in (
        (["--source", "x", "--with", "vllm"], "no --source"),
        (["--engine-python", "x"], "needs --with"),
    ):
        result = CliRunner().invoke(cli, ["verify", str(out), *flags])
        assert isinstance(result.exception, UsageError)
        assert says in result.exception.message
    (out / "config.json").write_text((out / "config.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match="SHA-256"):
        verify_with(out, "vllm")


@pytest.mark.long
def test_a_worker_ends_when_its_parent_has_ended() -> None:
    """Killed before it could say so, too."""
    worker = Path(upcycle.__file__).parent / "verification" / "engines" / "workers"
    asked = f"import sys, time; sys.path.insert(0, {str(worker)!r}); import answering; answering.serve(lambda _: time.sleep(600))"
    code = (
        "import os, subprocess, sys, time\n"
        "os.environ['UPCYCLE_PARENT'] = str(os.getpid())\n"
        f"p = subprocess.Popen([sys.executable, '-c', {asked!r}], stdin=subprocess.PIPE, start_new_session=True)\n"
        "p.stdin.write(b'{}'); p.stdin.close(); print(p.pid, flush=True); time.sleep(600)\n"
    )
    asking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert asking.stdout
    child = psutil.Process(int(asking.stdout.readline()))
    assert child.is_running()
    asking.kill()
    asking.wait()
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("zero", [False, True])
def test_known_differences_of_llama_cpp_are_explained(tmp_path: Path, zero: bool) -> None:
    """``norm_topk_prob`` is fixed in its graphs; with all experts on, the weights sum to 1 anyway. A zero switch is looked for."""
    engine, switch = LlamaCpp(), torch.zeros(1, 4) if zero else half_switch(4, torch.float32)
    save_file({"model.layers.0.mlp.shared_expert_gate.weight": switch}, tmp_path / "model.safetensors")
    config = {"model_type": "qwen2_moe", "norm_topk_prob": True, "num_experts": 8, "num_experts_per_tok": 2}
    for changes, normalised in (({}, True), ({"num_experts_per_tok": 8}, False), ({"norm_topk_prob": False}, False)):
        found = engine.known_difference(tmp_path, config | changes) or ""
        assert ("shared expert's switch" in found) == zero
        assert ("norm_topk_prob" in found) == normalised
    said = engine.known_difference(tmp_path, config | {"model_type": "qwen3_moe", "norm_topk_prob": False}) or ""
    assert "sum to 1" in said
    assert engine.known_difference(tmp_path, config | {"model_type": "qwen3_moe"}) is None
    assert "RMSNorms" in (engine.known_difference(tmp_path, {"model_type": "phimoe"}) or "")


def test_known_differences_of_vllm_are_explained(tmp_path: Path) -> None:
    """What its class for Phi-3.5-MoE takes from no key."""
    config = {"model_type": "phimoe", "hidden_act": "silu", "router_jitter_noise": 0.01, "sliding_window": None}
    for changes, reason in (
        ({"hidden_act": "relu"}, "silu where hidden_act is relu"),
        ({"router_jitter_noise": 0.0}, "fixes router_jitter_noise at 0.01"),
        ({"sliding_window": 16}, "no sliding window"),
    ):
        assert reason in (Vllm().known_difference(tmp_path, config | changes) or "")
    assert Vllm().known_difference(tmp_path, config) is None
    assert Vllm().known_difference(tmp_path, {"model_type": "mixtral"}) is None
