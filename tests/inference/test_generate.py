"""Text as ``generate`` of transformers writes it, and the experts that stock routers chose."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from any_moe import auto_class_of
from pico_models import PICO_MOE

from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.files.locate import DEMO_FOLDER
from upcycle.inference.generate import Pieces, Writer
from upcycle.kernels.entry import whole_block

Pico = Callable[[str], Path]
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
PROMPT = "def read(path):"
KNOWN = list(PICO_MOE)


def greedy(folder: Path, ids: list[int], tokens: int) -> tuple[Any, list[int]]:
    model = auto_class_of(folder).from_pretrained(folder, dtype=torch.float32)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    given = torch.tensor([ids])
    written = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False)
    return model, written[0].tolist()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", KNOWN)
def test_greedy_text_and_the_experts_of_every_token(name: str, pico_moe: Callable[..., Path]) -> None:
    """Every MoE, of a target or not: tokens are those of ``generate``, experts what the routers give for the whole text."""
    writer = Writer(str(pico_moe(name)))
    ids = writer.encode(PROMPT)
    found = list(writer.write(ids, 8))
    model, expected = greedy(pico_moe(name), ids, 8)
    kept = expected[:-1] if writer.stopped == "end" else expected
    assert [token.id for token in found] == kept
    assert [token.prompt for token in found] == [i < len(ids) for i in range(len(kept))]
    layer = getattr(model.model, "language_model", model.model).layers[writer.layer]
    chosen: list[Any] = []
    named = [module for path, module in layer.named_modules() if path.endswith((".gate", ".router"))]
    router = next(module for module in named if hasattr(module, "top_k"))
    router.register_forward_hook(lambda _, __, output: chosen.append((output[1], output[2])))
    with torch.no_grad():
        model(torch.tensor([kept]), use_cache=False)
    (weights, experts), *_ = chosen
    for token, row, picked in zip(found, weights.tolist(), experts.tolist(), strict=True):
        pairs = sorted(zip(row, picked, strict=True), reverse=True)
        assert sorted(token.experts) == sorted(picked)
        assert token.weights == pytest.approx([weight for weight, _ in pairs], rel=1e-3, abs=1e-5)
        assert all(0 <= expert < writer.experts for expert in token.experts)


@needs_compiler
@pytest.mark.parametrize("shown", [False, True])
def test_blocks_run_on_kernels_as_a_whole_and_give_stock_logits(
    shown: bool, pico_moe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A written token takes one compiled call per block, but where routers are watched: there, the block's own code runs."""
    folder, calls = pico_moe("qwen2_moe"), []
    compiled = whole_block.few_blocks_output

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return compiled(*arguments)

    monkeypatch.setattr(whole_block, "few_blocks_output", counted)
    writer = Writer(str(folder), experts=shown)
    assert writer.kernels == "upcycle, whole blocks"
    ids = writer.encode(PROMPT)
    logits, cache, _ = writer._read(ids, None)
    calls.clear()
    further, _, ((experts, _),) = writer._read([7], cache)
    blocks = sum(hasattr(layer.mlp, "experts") for layer in writer.model.model.layers)
    assert len(calls) == blocks - shown
    assert bool(experts) == shown
    stock, _ = greedy(folder, [5, 6], 1)
    with torch.no_grad():
        expected = stock(torch.tensor([[*ids, 7]])).logits[0, -2:]
    assert (torch.stack([logits, further]) - expected).norm() <= 1e-5 * expected.norm()


def test_a_dense_model_writes_without_experts(pico: Pico) -> None:
    writer = Writer(str(pico("llama")))
    ids = writer.encode(PROMPT)
    found = list(writer.write(ids, 8))
    assert [token.id for token in found] == greedy(pico("llama"), ids, 8)[1]
    assert writer.layer is None
    assert not any(token.experts or token.weights for token in found)


def test_text_is_what_the_tokens_say(pico_moe: Callable[..., Path]) -> None:
    writer = Writer(str(pico_moe("mixtral")), layer=1)
    found = list(writer.write(writer.encode(PROMPT), 12, temperature=1.0, seed=3))
    written = [token.id for token in found]
    assert "".join(token.text for token in found) == writer.tokenizer.decode(written, skip_special_tokens=True)


def test_a_seed_draws_the_same_text_and_another_seed_another(pico: Pico) -> None:
    writer = Writer(str(pico("llama")))

    def text(seed: int, temperature: float = 1.0) -> list[int]:
        return [token.id for token in writer.write(writer.encode(PROMPT), 12, temperature, seed)]

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(1, 1e-6) == text(2, 0.0), "hardly any temperature is none"


def test_draws_follow_the_distribution(pico: Pico) -> None:
    """First tokens of many seeds against the softmax in fp64, by the chi-squared test of the five likeliest and the rest."""
    from scipy.stats import chisquare

    writer = Writer(str(pico("llama")))
    ids = writer.encode(PROMPT)
    with torch.no_grad():
        logits = writer.model(torch.tensor([ids])).logits[0, -1].double()
    from upcycle.inference.generate import _draw

    likely = (logits / 0.7).softmax(-1).topk(5)
    rng = torch.Generator().manual_seed(0)
    drawn = [_draw(logits, 0.7, rng) for _ in range(2000)]
    seen = [drawn.count(token) for token in likely.indices.tolist()]
    expected = [2000 * share for share in likely.values.tolist()]
    observed = [*seen, 2000 - sum(seen)]
    assert chisquare(observed, [*expected, 2000 - sum(expected)]).pvalue > 1e-4


def test_characters_of_several_tokens_come_whole() -> None:
    tokenizer = load_tokenizer(DEMO_FOLDER / "model")
    for text in ("naïve café", "日本語 text", "a 🙂 b", "plain words", "  indented\n\ttabs"):
        pieces = Pieces(tokenizer)
        shown = [pieces.add(token) for token in tokenizer(text)["input_ids"]]
        assert "".join(shown) == text
        assert not any("\ufffd" in piece for piece in shown)
    cut = tokenizer("🙂")["input_ids"][:-1]
    pieces = Pieces(tokenizer)
    assert [pieces.add(token) for token in cut] == [""] * len(cut)
    assert "\ufffd" in pieces.rest()


def test_where_a_text_ends(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(str(pico("llama")))
    ids = writer.encode(PROMPT)
    found = list(writer.write(ids, 4))
    assert (len(found), writer.stopped) == (len(ids) + 4, "length")
    writer.context = len(ids) + 2
    found = list(writer.write(ids, 4))
    assert (len(found), writer.stopped) == (len(ids) + 2, "context")
    writer.context = len(ids)
    with pytest.raises(UsageError, match="the model reads"):
        list(writer.write(ids, 4))
    writer.context = None
    monkeypatch.setattr(writer, "_ends", {found[-1].id})
    text = list(writer.write(ids, 40))
    assert writer.stopped == "end"
    assert found[-1].id not in [token.id for token in text if not token.prompt]


def test_layers_that_have_no_experts_are_named(pico: Pico, pico_moe: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"layer 99 of .* has no experts") as caught:
        Writer(str(pico_moe("mixtral")), layer=99)
    assert caught.value.hint
    assert "0" in caught.value.hint
    with pytest.raises(UsageError, match="is dense"):
        Writer(str(pico("llama")), layer=0)
    with pytest.raises(UsageError, match="the prompt is empty"):
        Writer(str(pico("llama"))).encode("")
