"""Perplexity against a token-by-token recomputation, expert load against the routers' own choices."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.evaluation.evaluate import SAMPLE
from upcycle.progress import Progress
from upcycle.text.reading.plain_text import read_text
from upcycle.text.windows import encode

Pico = Callable[[str], Path]


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(100, 32, 16), (100, 32, 31), (97, 64, 10), (20, 64, None), (33, 32, 16)]
)
def test_every_token_is_scored_once_with_the_context_its_window_gives(
    tokens: int, window: int, stride: int | None, pico: Pico
) -> None:
    result = upcycle.evaluate(pico("llama"), text="prose", tokens=tokens, window=window, stride=stride)
    step = stride or window // 2
    model = AutoModelForCausalLM.from_pretrained(pico("llama"))
    ids = encode(load_tokenizer(pico("llama")), read_text("prose"))[:tokens]
    total, scored = 0.0, 0
    for position in range(1, tokens):
        # The first window whose end lies beyond this token is the one that scores it.
        index = max(0, math.ceil((position + 1 - window) / step))
        with torch.no_grad():
            logits = model(ids[None, index * step : position]).logits[0, -1]
        total -= logits.log_softmax(-1)[ids[position]].item()
        scored += 1
    (text,) = result.texts
    assert text.predicted == scored == tokens - 1
    assert text.nats_per_token == pytest.approx(total / scored, rel=1e-5)
    assert text.perplexity == pytest.approx(math.exp(total / scored), rel=1e-4)


def test_an_exact_conversion_has_the_perplexity_of_its_reference(pico: Pico, tmp_path: Path) -> None:
    upcycle.convert(str(pico("llama")), tmp_path / "out", experts=4, verification={"enabled": False})
    result = upcycle.evaluate(tmp_path / "out", reference=pico("llama"), tokens=300, window=128)
    assert [text.text for text in result.texts] == ["code", "prose"]
    for text in result.texts:
        assert text.perplexity == pytest.approx(text.reference_perplexity, rel=1e-5)


def test_load_counts_what_the_routers_choose(pico: Pico, tmp_path: Path) -> None:
    upcycle.convert(str(pico("llama")), tmp_path / "out", experts=4, top_k=2, verification={"enabled": False})
    result = upcycle.evaluate(tmp_path / "out", text="code", tokens=64, window=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = encode(load_tokenizer(tmp_path / "out"), read_text("code"))[:64]
    with torch.no_grad():
        routed = model(ids[None], output_router_logits=True).router_logits
    for layer, scores in zip(result.layers, routed, strict=True):
        counts = torch.bincount(scores.topk(2, dim=-1).indices.flatten(), minlength=4).double()
        load = counts / counts.sum()
        assert layer.load == pytest.approx(load.tolist())
        assert layer.max_over_mean == pytest.approx(load.max().item() * 4)
        assert layer.entropy == pytest.approx((-(load * load.clamp(min=1e-300).log()).sum() / math.log(4)).item())
        assert layer.dead_experts == [e for e in range(4) if counts[e] == 0]


def test_a_zero_router_leaves_dead_experts(pico: Pico, tmp_path: Path) -> None:
    router = {"name": "zero", "parameters": {"inference_only": True}}
    upcycle.convert(
        str(pico("llama")), tmp_path / "out", experts=4, top_k=2, router=router, verification={"enabled": False}
    )
    result = upcycle.evaluate(tmp_path / "out", text="code", tokens=64, window=64)
    # All logits tie; which two experts win is up to the top-k kernel, but it is the same two for every token.
    assert {len(layer.dead_experts) for layer in result.layers} == {2}
    assert result.layers[0].max_over_mean == pytest.approx(2.0)
    assert result.layers[0].entropy == pytest.approx(0.5)


@pytest.mark.long
def test_the_demo_card_states_what_evaluate_prints() -> None:
    from upcycle.files.locate import DEMO_FOLDER

    card = (DEMO_FOLDER / "model" / "README.md").read_text()
    for text in upcycle.evaluate("demo", tokens=20_000).texts:
        assert f"| {text.text} | {text.predicted:,} | {text.perplexity:.2f} |" in card


@pytest.mark.long
def test_a_sample_is_read_and_said_unless_all_is_asked_for(pico: Pico) -> None:
    said: list[str] = []

    class Heard(Progress):
        def tell(self, message: str) -> None:
            said.append(message)

    assert upcycle.evaluate(pico("llama"), text="prose", progress=Heard()).texts[0].tokens == SAMPLE
    assert len(said) == 1
    assert re.fullmatch(r"reading the first 8,192 tokens of each text \(prose has [\d,]+\); --full reads all", said[0])
    whole = len(encode(load_tokenizer(pico("llama")), read_text("prose")))
    assert upcycle.evaluate(pico("llama"), text="prose", full=True, progress=Heard()).texts[0].tokens == whole > SAMPLE
    assert len(said) == 1


def test_arguments_that_make_no_sense(pico: Pico) -> None:
    with pytest.raises(UsageError, match="--tokens and --full"):
        upcycle.evaluate(pico("llama"), text="prose", tokens=50, full=True)
    with pytest.raises(UsageError, match="stride"):
        upcycle.evaluate(pico("llama"), text="prose", tokens=50, window=16, stride=16)
    with pytest.raises(UsageError, match="at least 2 are needed"):
        upcycle.evaluate(pico("llama"), text="prose", tokens=1)
    with pytest.raises(UsageError, match="no such text file"):
        upcycle.evaluate(pico("llama"), text="poetry")


def test_what_cannot_be_measured_is_said_before_a_model_is_read(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: object) -> None:
        raise AssertionError("dear work")

    monkeypatch.setattr("upcycle.evaluation.window_losses.load_model", unwanted)
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(UsageError, match=r"short.txt: fewer than two tokens"):
        upcycle.evaluate("demo", text=str(tmp_path / "short.txt"))
    with pytest.raises(UsageError, match=r"the stride \(600\) must be at least 1 and below the window \(512\)"):
        upcycle.evaluate("demo", text="prose", stride=600)
    other = tmp_path / "other"
    shutil.copytree(pico("llama"), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 4096, "content": "<|other|>"})
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="different vocabularies"):
        upcycle.evaluate(pico("llama"), text="prose", reference=other)
