"""What models of two inputs, and of sounds, are measured by, against loops over stock models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_cases import text_encoder
from media_cases import captioned_images, pair_file, sound_folder, sound_model, two_towers
from transformers import AutoImageProcessor, AutoTokenizer

import upcycle
from upcycle.errors import UsageError
from upcycle.evaluation.encoders import two_inputs
from upcycle.evaluation.encoders.two_inputs import retrieval
from upcycle.inputs.examples import InputExample, find_examples
from upcycle.recipe.recipe_parts import CalibrationRecipe

pytestmark = pytest.mark.one_in(3)  # the other cases are long

SPLIT: dict[str, Any] = {"method": "random_split", "experts": 4, "top_k": 2, "verification": {"tokens": 64}}


def converted(folder: Path, **keys: Any) -> Path:
    upcycle.convert(str(folder / "dense"), folder / "moe", **{**SPLIT, **keys})
    return folder / "moe"


@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_a_decoders_loss_is_that_of_the_stock_class(name: str, tmp_path: Path) -> None:
    keys: dict[str, Any]
    if name == "whisper":
        model = sound_model(name, tmp_path / "dense")
        source = sound_folder(tmp_path / "sounds", 10)
        keys, reads = {"text": str(source)}, "speech"
    else:
        model = text_encoder(name, tmp_path / "dense")
        source = pair_file(tmp_path / "pairs.jsonl", 20)
        keys, reads = {"text": str(source), "column": "question", "target": "answer"}, "pairs"
    moe = converted(tmp_path)
    found = upcycle.evaluate(moe, reference=tmp_path / "dense", **keys)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    total, count = 0.0, 0
    for one in find_examples(reads, CalibrationRecipe.model_validate(keys), 100):
        cut = {"truncation": True, "max_length": 32 if name == "whisper" else 64}
        labels = tokenizer(one.text, return_tensors="pt", **cut)["input_ids"]
        given: dict[str, torch.Tensor]
        if name == "whisper":
            from transformers import AutoFeatureExtractor

            extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "dense")
            samples = one.item.read(16_000).numpy()  # type: ignore[union-attr]
            given = dict(extractor(samples, sampling_rate=16_000, return_tensors="pt"))
        else:
            given = {"input_ids": tokenizer(str(one.item), return_tensors="pt", **cut)["input_ids"]}
        with torch.no_grad():  # the stock class shifts the labels itself
            total += model(**given, labels=labels).loss.item() * labels.numel()
        count += labels.numel()
    (text,) = found.texts
    assert text.tokens == count
    assert text.reference_nats_per_token == pytest.approx(total / count, rel=1e-5)
    assert text.nats_per_token != text.reference_nats_per_token
    assert [layer.layer for layer in found.layers] == [0, 1, 2, 3]  # of both, numbered through


def test_captions_are_found_as_a_loop_finds_them(tmp_path: Path) -> None:
    model = two_towers("clip", tmp_path / "dense")
    images = captioned_images(tmp_path / "images", 6)
    moe = converted(tmp_path)
    found = upcycle.evaluate(moe, reference=tmp_path / "dense", images=images)
    tokenizer, processor = (kind.from_pretrained(tmp_path / "dense") for kind in (AutoTokenizer, AutoImageProcessor))
    from PIL import Image

    vectors = []
    for path in sorted(images.rglob("*.png")):
        text = tokenizer(path.with_suffix(".txt").read_text(), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            made = model(input_ids=text, **processor(Image.open(path).convert("RGB"), return_tensors="pt"))
        vectors.append((made.image_embeds[0].double(), made.text_embeds[0].double()))
    pairs = found.retrieval
    assert pairs is not None
    assert (pairs.pairs, pairs.nearest) == (12, [1, 5, 10])
    for side, shares in ((0, pairs.reference_image_to_text), (1, pairs.reference_text_to_image)):
        ranks = []
        for i, one in enumerate(vectors):
            scores = [float(one[side] @ other[1 - side]) for other in vectors]
            ranks.append(sum(score >= scores[i] for j, score in enumerate(scores) if j != i))
        assert shares == pytest.approx([sum(rank < k for rank in ranks) / 12 for k in (1, 5, 10)])
    assert found.embeddings is not None
    assert 0.5 < found.embeddings.cosine < 1
    same = upcycle.evaluate(tmp_path / "dense", reference=tmp_path / "dense", images=images)
    assert same.embeddings is not None
    assert same.embeddings.cosine == pytest.approx(1)
    assert same.retrieval is not None
    assert same.retrieval.image_to_text == same.retrieval.reference_image_to_text


def test_vectors_that_are_all_alike_find_nothing_and_equal_captions_are_each_others() -> None:
    alike = torch.ones(12, 1, dtype=torch.float64)
    assert retrieval(alike, alike, list("abcdefghijkl"))[1:] == ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    own = torch.eye(12, dtype=torch.float64)
    assert retrieval(own, own.roll(1, 0), list("abcdefghijkl"))[1][0] == 0
    twins = ["a", "a", *"cdefghijkl"]
    swapped = own[[1, 0, *range(2, 12)]]  # each of both finds the other's caption, which is the same
    assert retrieval(own, swapped, twins)[1:] == ([1.0] * 3, [1.0] * 3)


@pytest.mark.long
def test_sounds_are_compared_by_their_vectors(tmp_path: Path) -> None:
    sound_model("hubert", tmp_path / "dense")
    sounds = sound_folder(tmp_path / "sounds", 6, spoken=False)
    copies = upcycle.evaluate(
        converted(tmp_path, method="sparse_upcycling"), reference=tmp_path / "dense", text=str(sounds)
    ).embeddings
    assert copies is not None
    assert (copies.items, copies.recall) == (6, 1.0)
    assert copies.cosine == pytest.approx(1)
    with pytest.raises(UsageError, match="has no answers that could be right or wrong"):
        upcycle.evaluate(tmp_path / "moe", text=str(sounds))


@pytest.mark.long
def test_only_what_was_held_out_of_a_calibration_is_read(tmp_path: Path) -> None:
    text_encoder("t5", tmp_path / "dense")
    pairs = {"text": str(pair_file(tmp_path / "pairs.jsonl", 80)), "column": "question", "target": "answer"}
    plain = upcycle.evaluate(tmp_path / "dense", **pairs).texts[0]
    moe = converted(tmp_path, router={"name": "ridge"}, calibration={**pairs, "tokens": 512})
    found = upcycle.evaluate(moe, **pairs).texts[0]
    assert found.remark == "what was held out of the calibration"
    assert 0 < found.tokens < plain.tokens / 4


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "hint"),
    [("t5", "--column QUESTION --target"), ("clip", "--images FOLDER"), ("whisper", "a .txt beside each")],
)
def test_what_is_missing_is_said(name: str, hint: str, tmp_path: Path) -> None:
    {"clip": two_towers, "whisper": sound_model}.get(name, text_encoder)(name, tmp_path / "dense")
    with pytest.raises(UsageError, match="none are named") as refused:
        upcycle.evaluate(tmp_path / "dense")
    assert hint in str(refused.value.hint)


@pytest.mark.parametrize("name", ["t5", "whisper", "clip"])
def test_full_reads_all_and_less_is_read_without_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_inputs, "_EXAMPLES", 4)
    monkeypatch.setattr(two_inputs, "_TOKENS", 20)
    {"clip": two_towers, "whisper": sound_model}.get(name, text_encoder)(name, tmp_path / "dense")
    keys: dict[str, Any] = {
        "t5": lambda: {"text": pair_file(tmp_path / "pairs.jsonl", 20), "column": "question", "target": "answer"},
        "whisper": lambda: {"text": sound_folder(tmp_path / "sounds", 9)},
        "clip": lambda: {"images": captioned_images(tmp_path / "images", 3)},
    }[name]()
    keys = {key: str(value) for key, value in keys.items()}
    some, all_of_it = (upcycle.evaluate(tmp_path / "dense", full=full, **keys) for full in (False, True))
    if name == "clip":
        assert some.retrieval is not None
        assert all_of_it.retrieval is not None
        assert (some.retrieval.pairs, all_of_it.retrieval.pairs) == (4, 6)
        return
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    reads, ends = ("speech", 32) if name == "whisper" else ("pairs", 64)
    examples = find_examples(reads, CalibrationRecipe.model_validate(keys), 1000)
    written = sum(len(tokenizer(one.text, truncation=True, max_length=ends)["input_ids"]) for one in examples)
    assert all_of_it.texts[0].tokens == written
    assert some.texts[0].tokens < written / 2
    assert all_of_it.window == ends if name == "whisper" else all_of_it.window == 512


def test_nothing_is_measured_on_nothing(tmp_path: Path) -> None:
    text_encoder("t5", tmp_path / "dense")
    (tmp_path / "empty.jsonl").write_text('{"question": "", "answer": null}\n')
    keys: dict[str, Any] = {"text": str(tmp_path / "empty.jsonl"), "column": "question", "target": "answer"}
    with pytest.raises(UsageError, match=r"empty\.jsonl: there is nothing in it to measure on"):
        upcycle.evaluate(tmp_path / "dense", **keys)
    for tokens in (0, 1, -5):
        with pytest.raises(UsageError, match=f"at least 2 are needed to measure a text, got {tokens}"):
            upcycle.evaluate(tmp_path / "dense", tokens=tokens, **keys)


def test_what_was_calibrated_on_is_said_where_nothing_was_held_out() -> None:
    some = [InputExample(f"text {i}") for i in range(40)]
    held = [one for one in some if one.number % 8 == 0]
    assert two_inputs._unseen(some) == (held, "what was held out of the calibration")
    rest = [one for one in some if one not in held]
    assert two_inputs._unseen(rest) == (rest, "the model was calibrated on it")
