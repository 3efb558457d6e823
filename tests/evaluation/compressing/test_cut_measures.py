"""What is measured of a compressed model, against plain restatements with models that stock transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.evaluation.compressing import cut_measures
from upcycle.evaluation.compressing.cut_measures import CutMeter, CutTexts, continuations, cut_texts
from upcycle.models.stock_model import folder_model
from upcycle.recipe.recipe_parts import CalibrationRecipe
from upcycle.text.reading.plain_text import EVERYDAY, read_text
from upcycle.text.windows import demo_parts, encode

Models = Callable[..., Path]
CLOSE = 1e-5  # fp32 logits of two layers against the same in another batch


@pytest.fixture
def cut(pico_moe: Models, tmp_path: Path) -> Path:
    keys = {"method": "random_experts", "keep": 0.5, "refit": "none", "calibration": {"text": "demo", "tokens": 64}}
    upcycle.convert(str(pico_moe("mixtral")), tmp_path / "cut", **keys, verification={"enabled": False})
    return tmp_path / "cut"


def stock(folder: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    return model


def some_texts() -> CutTexts:
    rng = torch.Generator().manual_seed(3)
    domains = {name: torch.randint(300, (5, 12), generator=rng) for name in ("a", "b", "foreign")}
    domains["b"] = domains["b"][:, :9]
    return CutTexts(domains, ("foreign",), torch.randint(300, (6, 7), generator=rng), 10)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "granitemoe"])
def test_continuations_are_those_of_generate(name: str, pico_moe: Models) -> None:
    model, prompts = stock(pico_moe(name)), some_texts().prompts
    expected = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=10,
        min_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(continuations(model, prompts, 10), expected[:, 7:])


@pytest.mark.one_in(4)
@pytest.mark.parametrize("streamed", [False, True])
def test_numbers_are_those_of_the_stock_models(
    streamed: bool, cut: Path, pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut_measures, "batch_size", lambda *_: 2)  # five windows: the last batch is shorter
    source, texts = pico_moe("mixtral"), some_texts()
    meter = CutMeter(texts, 4096, tmp_path, streamed)
    before = meter.uncut(folder_model(source, streamed))
    after = meter.cut(folder_model(cut, streamed))
    again = meter.cut(folder_model(source, streamed))

    models = [stock(source), stock(cut)]
    divergence, tokens = 0.0, 0
    for name, ids in texts.domains.items():
        with torch.no_grad():
            p, q = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in models)
        for found, logp in ((before, p), (after, q)):
            nats = -logp.gather(2, ids[:, 1:, None]).mean().item()
            assert found.nats[name] == pytest.approx(nats, rel=CLOSE)
        if name != "foreign":
            divergence += (p.exp() * (p - q)).sum().item()
            tokens += ids[:, 1:].numel()
    assert after.kl == pytest.approx(divergence / tokens, rel=1e-4)
    said = [continuations(model, texts.prompts, 10) for model in models]
    assert after.agreement == pytest.approx((said[0] == said[1]).double().mean().item())
    assert 0 <= after.agreement < 1
    assert (before.kl, before.agreement) == (0.0, 1.0)
    assert (again.nats, again.agreement) == (before.nats, 1.0)
    assert again.kl < 1e-9
    assert sum(path.stat().st_size for path in tmp_path.glob("uncut.*")) == texts.disk_bytes(4096)


def test_texts_are_held_out_and_of_another_kind(pico_moe: Models) -> None:
    tokenizer = load_tokenizer(pico_moe("mixtral"))
    found = cut_texts(CalibrationRecipe(text="demo"), (), 256, 32, 128, tokenizer)
    assert list(found.domains) == ["code", "prose", EVERYDAY]
    assert (found.seen, found.unseen) == (["code", "prose"], (EVERYDAY,))
    held = {name: encode(tokenizer, demo_parts(name)[1]).tolist() for name in found.seen}
    held[EVERYDAY] = encode(tokenizer, read_text(EVERYDAY)).tolist()
    for name, ids in found.domains.items():
        assert ids.shape == ((8 if name != EVERYDAY else 4), 32)
        for row in ids.tolist():
            assert any(held[name][i : i + 32] == row for i in range(0, len(held[name]), 32))
    assert found.prompts.shape == (32, 32)
    assert found.written == 32
    both = {tuple(held[name][i : i + 32]) for name in found.seen for i in range(0, len(held[name]), 32)}
    assert all(tuple(row) in both for row in found.prompts.tolist())
    assert found.tokens == 8 * 32 * 2 + 4 * 32


def test_a_short_context_leaves_room_to_write(pico_moe: Models) -> None:
    found = cut_texts(CalibrationRecipe(text="code"), (), 256, 32, 40, load_tokenizer(pico_moe("mixtral")))
    assert (found.prompts.shape[1], found.written) == (8, 32)
    assert all(ids.shape[1] <= 40 for ids in found.domains.values())


def test_text_that_was_calibrated_on_is_not_of_another_kind(pico_moe: Models, tmp_path: Path) -> None:
    (tmp_path / "day.txt").write_text(read_text(EVERYDAY))
    found = cut_texts(
        CalibrationRecipe(text=str(tmp_path / "day.txt")), (), 64, 32, 128, load_tokenizer(pico_moe("mixtral"))
    )
    assert found.unseen == ()


def test_named_texts_take_the_place_of_what_is_held_out(pico_moe: Models, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("The keys are in the blue box under the stairs. " * 40)
    own = str(tmp_path / "own.txt")
    found = cut_texts(CalibrationRecipe(text="demo"), [own], 64, 32, 128, load_tokenizer(pico_moe("mixtral")))
    assert list(found.domains) == [own, EVERYDAY]


def test_a_text_too_short_to_measure_on_is_refused(pico_moe: Models, tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("one two three four")
    with pytest.raises(UsageError, match="too short to measure on"):
        cut_texts(
            CalibrationRecipe(text=str(tmp_path / "tiny.txt")), (), 64, 32, 128, load_tokenizer(pico_moe("mixtral"))
        )
