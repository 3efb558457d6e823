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
from upcycle.evaluation.speed import measure_speed
from upcycle.evaluation.speed_worker import TimedModel
from upcycle.files import records
from upcycle.files.formats.parsing import read_json
from upcycle.report.data.collect import Wanted

Pico = Callable[[str], Path]


def test_medians_of_rounds_in_turns(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are timed in turns, the first of a round is another each time, and the ratios are those of the medians."""
    order: list[str] = []
    seconds = {"a": [4.0, 1.0, 2.0], "b": [1.0, 0.5, 8.0]}

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = "a" if name == str(pico("llama")) else "b"
            self.process = self

        def start(self, prompt: list[int], generate: int) -> dict[str, Any]:
            assert len(prompt) == 16
            return {"device": "cpu", "instructions": "AVX2", "dtype": "float32", "threads": 1, "experts": None}

        def run(self) -> dict[str, float]:
            order.append(self.name)
            value = seconds[self.name][order.count(self.name) - 1]
            return {"prefill": value, "decode": 2 * value, "peak": 100 * value}

        def kill(self) -> None:
            order.append("killed")

        def communicate(self) -> None:
            """As a process does."""

    monkeypatch.setattr(speed, "_Worker", Fake)
    found = measure_speed(str(pico("llama")), str(pico("qwen2")), prompt=16, generate=4, rounds=3)
    assert "".join(order[:-2]) == "abbaab"
    assert order[-2:] == ["killed", "killed"]
    assert found.reference
    assert (found.model.prefill_tokens_per_second, found.reference.prefill_tokens_per_second) == (16 / 2, 16 / 1)
    assert (found.model.decode_tokens_per_second, found.reference.decode_tokens_per_second) == (4 / 4, 4 / 2)
    assert (found.model.peak_memory_bytes, found.reference.peak_memory_bytes) == (400, 800)
    assert (found.prefill_ratio, found.decode_ratio, found.memory_ratio) == (0.5, 0.5, 0.5)


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
    page = report.html.read_text(encoding="utf-8")
    assert "How fast is it, relative to its parent?" in page
    assert f"{timed['decode_ratio']:.2f}x" in page


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
