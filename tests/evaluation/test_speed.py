"""Speed: what is timed, in which order, and what a failure in a process of its own becomes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.cli.main import cli
from upcycle.errors import EnvironmentFault, UsageError
from upcycle.evaluation import speed
from upcycle.evaluation.speed import KernelSpeed, measure_speed
from upcycle.evaluation.speed_table import ON_KERNELS, speed_rows
from upcycle.evaluation.speed_worker import TimedModel
from upcycle.files import records
from upcycle.files.formats.parsing import read_json
from upcycle.kernels.entry.transformers_blocks import WholeBlock
from upcycle.report.collect import Wanted

Pico = Callable[[str], Path]


def test_medians_of_rounds_in_turns(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are timed in turns, the first of a round is another each time, and the ratios are those of the medians."""
    order: list[str] = []
    seconds = {"a": [4.0, 1.0, 2.0], "b": [1.0, 0.5, 8.0]}

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = "a" if name == str(pico("llama")) else "b"
            self.process = self

        def start(self, prompt: list[int], generate: int, dtype: str) -> dict[str, Any]:
            assert len(prompt) == 16
            assert dtype == "float32"
            experts = "grouped_mm" if self.name == "a" else None
            return {"device": "cpu", "instructions": "AVX2", "dtype": "float32", "threads": 1, "experts": experts}

        def run(self) -> dict[str, float]:
            order.append(self.name)
            value = seconds[self.name][order.count(self.name) - 1]
            return {"prefill": value, "decode": 2 * value, "peak": 100 * value}

        def run_on_kernels(self) -> dict[str, Any]:
            assert self.name == "a", "a dense reference has no experts"
            order.append("k")
            return {"prefill": 0.25, "decode": 0.5, "peak": 1, "experts": "upcycle, whole blocks"}

        def kill(self) -> None:
            order.append("killed")

        def communicate(self) -> None:
            """As a process does."""

    monkeypatch.setattr(speed, "_Worker", Fake)
    found = measure_speed(str(pico("llama")), str(pico("qwen2")), prompt=16, generate=4, rounds=3)
    assert "".join(order[:-2]) == "abkbakabk"
    assert order[-2:] == ["killed", "killed"]
    assert found.reference
    assert (found.model.prefill_tokens_per_second, found.reference.prefill_tokens_per_second) == (16 / 2, 16 / 1)
    assert (found.model.decode_tokens_per_second, found.reference.decode_tokens_per_second) == (4 / 4, 4 / 2)
    assert (found.model.peak_memory_bytes, found.reference.peak_memory_bytes) == (400, 800)
    assert (found.prefill_ratio, found.decode_ratio, found.memory_ratio) == (0.5, 0.5, 0.5)
    assert found.kernels == KernelSpeed(16 / 0.25, 4 / 0.5, "upcycle, whole blocks", 4.0, 4.0)
    columns, rows, about = speed_rows(found.as_dict())
    assert columns == ["", "reference", "model", "ratio", ON_KERNELS, "ratio"]
    assert rows[0] == ("prefill, tokens/s", "16.0", "8.0", "0.50x", "64.0", "4.00x")
    assert rows[2][4:] == ("", ""), "the memory of one process is not divided between two ways"
    assert f"experts by grouped_mm, {ON_KERNELS} by upcycle, whole blocks" in about


def test_what_is_timed_is_greedy_writing(converted: Callable[..., Path]) -> None:
    """The tokens that the timed loop feeds are those that ``generate`` writes."""
    out = converted("timed", experts=2)
    timed = TimedModel(str(out), list(range(5, 21)), 6)
    fed: list[torch.Tensor] = []
    timed.model.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    spent = timed.run()
    assert spent["prefill"] > 0
    assert spent["decode"] > 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model.set_experts_implementation("eager")
    prompt = torch.arange(5, 21)[None]
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert torch.cat(fed, 1).tolist() == written.tolist()
    assert timed.about()["experts"] in ("eager", "grouped_mm")


def test_kernels_are_timed_with_the_same_weights_and_leave_no_trace(converted: Callable[..., Path]) -> None:
    """The same greedy tokens on upcycle's kernels as a whole; then the model runs as before, and the memory is what that took."""
    timed = TimedModel(str(converted("timed", experts=2)), list(range(5, 21)), 6)
    default, fed, blocks = timed.about()["experts"], [], []
    timed.model.register_forward_pre_hook(lambda model, args: fed.append(args[0]))
    block = timed.model.model.layers[0].mlp
    timed.model.register_forward_pre_hook(lambda *_: blocks.append(isinstance(block, WholeBlock)))
    peak = timed.run()["peak"]
    found = timed.run_on_kernels()
    assert found["experts"] == "upcycle, whole blocks"
    assert found["prefill"] > 0
    assert found["decode"] > 0
    assert timed.run()["peak"] == found["peak"] >= peak
    assert blocks == [False] * 7 + [True] * 14 + [False] * 7, "once to warm up"
    runs = [torch.cat(fed[start : start + 7], 1) for start in range(0, len(fed), 7)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert timed.about()["experts"] == default == timed.model.config._experts_implementation


def test_a_model_without_kernels_is_not_timed_on_them(pico: Pico) -> None:
    assert TimedModel(str(pico("llama")), [5, 6, 7], 2).run_on_kernels() == {"experts": None}


def test_experts_that_the_default_kernel_refuses_run_one_by_one(converted: Callable[..., Path]) -> None:
    """Six neurons in fp32 are 24 bytes, which grouped_mm cannot take."""
    out = converted("narrow", method="random_split", experts=16, top_k=8)
    width = read_json(out / "config.json")["intermediate_size"]
    assert width * 4 % 16, "the kernel would take it"
    assert TimedModel(str(out), [5, 6, 7], 2).about()["experts"] == "eager"


@pytest.mark.long
def test_both_models_in_processes_of_their_own(converted: Callable[..., Path], pico: Pico, tmp_path: Path) -> None:
    out = Path(shutil.copytree(converted("timed", experts=2), tmp_path / "moe"))
    result = CliRunner().invoke(cli, ["evaluate", str(out), "--reference", str(pico("llama")), "--speed", "-q"])
    assert result.exit_code == 0, result.output
    assert "medians of 5 rounds in turns" in result.stdout
    kept = records.read_evaluation(out)
    assert kept
    timed = kept["speed"]
    for side in (timed["model"], timed["reference"]):
        assert side["prefill_tokens_per_second"] > side["decode_tokens_per_second"] > 0
        assert 1e8 < side["peak_memory_bytes"] < 2e9, "a process with torch in it"
    assert timed["prompt_tokens"] + timed["generated_tokens"] <= 512
    report = upcycle.write_report(out, wanted=Wanted(run=False))
    assert report.data["speed"]["model"] == timed["model"]
    assert timed["kernels"]["experts"] == "upcycle, whole blocks"
    assert ON_KERNELS in result.stdout
    page = report.html.read_text(encoding="utf-8")
    assert "How fast is it, relative to its parent?" in page
    assert f"{timed['decode_ratio']:.2f}x" in page
    assert page.count("on upcycle&#39;s kernels: ") == 2, "a bar for each time, in words"


@pytest.mark.long
def test_failures_of_the_processes_are_explained(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Path(shutil.copytree(pico("llama"), tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(upcycle.errors.CheckpointError, match=r"model\.safetensors"):
        measure_speed(str(broken), prompt=8, generate=2, rounds=1)
    with pytest.raises(UsageError, match="too short to write 9999"):
        measure_speed(str(pico("llama")), generate=9999)
    monkeypatch.setattr(speed, "run_module", lambda _: [sys.executable, "-c", "raise SystemExit(9)"])
    with pytest.raises(EnvironmentFault, match=r"ended \(code 9\)"):
        measure_speed(str(pico("llama")), prompt=8, generate=2, rounds=1)
