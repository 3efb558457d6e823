"""What models of two inputs are calibrated on: which rows are found, which are held out, and what is wrong with a source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_cases import image_folder
from media_cases import captioned_images, pair_file, sound_folder, sound_model, two_towers, write_sound

from upcycle.architectures.stock import build_config
from upcycle.errors import CheckpointError, UsageError
from upcycle.inputs import examples
from upcycle.inputs.examples import InputExample, divided_examples, find_examples
from upcycle.inputs.read import find_inputs
from upcycle.inputs.reader import InputReader
from upcycle.recipe.recipe_parts import CalibrationRecipe


def wanted(text: str | Path | list[str], **keys: Any) -> CalibrationRecipe:
    return CalibrationRecipe.model_validate({"text": str(text) if isinstance(text, Path) else text, **keys})


def test_pairs_are_read_from_every_format_and_divided_by_their_content(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in pair_file(tmp_path / "a.jsonl").read_text().splitlines()]
    (tmp_path / "b.csv").write_text("question,answer\n" + "".join(f'"{r["question"]}","{r["answer"]}"\n' for r in rows))
    found = [
        find_examples("pairs", wanted(tmp_path / name, column="question", target="answer"), 1000)
        for name in ("a.jsonl", "b.csv")
    ]
    assert found[0] == found[1] == [InputExample(row["question"], row["answer"]) for row in rows]
    parts = divided_examples([*found[0], *found[0]], 1000, "pairs")
    assert not {one.item for one in parts.read} & {one.item for one in parts.held_out}  # copies are on one side
    assert parts.how == f"{len(parts.held_out)} of {2 * len(rows)} pairs"


def test_texts_lie_beside_images_and_sounds_or_in_files_of_lines(tmp_path: Path) -> None:
    images, plain = captioned_images(tmp_path / "captioned", 2), image_folder(tmp_path / "plain", each=1)
    (tmp_path / "lines.txt").write_text("one\n\n two \n")
    found = find_examples("images and text", wanted([str(images), str(plain), str(tmp_path / "lines.txt")]), 100)
    assert [one.text for one in found if not isinstance(one.item, str) and one.text] == [
        f"picture {i} of class_{i // 2}{', bright' * (i % 2)}" for i in range(4)
    ]
    assert [one.item for one in found if isinstance(one.item, str)] == ["one", "two"]
    sounds = find_examples("speech", wanted(sound_folder(tmp_path / "sounds", 3)), 2)
    assert [one.text for one in sounds] == ["tone number 0,", "tone number 1, and more of it"]


def test_datasets_are_read_by_their_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"de": "ja", "en": "yes", "audio": {"array": [0.5], "sampling_rate": 16000}, "text": "said"}]
    monkeypatch.setattr(examples, "hub_rows", lambda name: iter(rows))
    assert find_examples("pairs", wanted("some/set", column="de", target="en"), 5) == [InputExample("ja", "yes")]
    (spoken,) = find_examples("speech", wanted("some/set"), 5)
    assert (spoken.text, spoken.item.read(16000).tolist()) == ("said", [0.5])  # type: ignore[union-attr]
    for keys, message in (
        ({"column": "fr", "target": "en"}, r"some/set, row 0: there is no column 'fr'; the columns are \['audio'"),
        ({"column": "audio", "target": "en"}, "column 'audio' holds dict, not what the model reads"),
        ({"column": "de", "target": "audio"}, "column 'audio' holds dict, not text"),
    ):
        with pytest.raises(UsageError, match=message):
            find_examples("pairs", wanted("some/set", **keys), 5)


def test_what_is_wrong_with_a_source_is_said(tmp_path: Path) -> None:
    two_towers("clip", tmp_path / "clip")
    sound_model("whisper", tmp_path / "whisper")
    images, sounds = image_folder(tmp_path / "images"), sound_folder(tmp_path / "sounds", spoken=False)
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    pairs = pair_file(tmp_path / "pairs.jsonl")

    def fails(model: str, message: str, text: Any, error: type[Exception] = UsageError) -> None:
        raw = json.loads((tmp_path / model / "config.json").read_text())
        reads = "speech" if model == "whisper" else "images and text"
        with pytest.raises(error, match=message):
            found = find_inputs(reads, wanted(text, tokens=256), tmp_path / model, raw, 64)
            found.reader.batch(found.main.read, found.texts.read if found.texts else [])

    fails("clip", "reads images and text, and there are no texts", str(images))
    fails("clip", "reads images and text, and there are no images", str(tmp_path / "lines.txt"))
    fails("clip", "prose is no source for a model that reads images and text", "prose")
    fails("whisper", r"000\.wav: there is no 000\.txt with what is said in it", str(sounds))
    fails("whisper", r"gone\.wav does not exist, so it is no source for a model that reads speech", "gone.wav")
    fails("whisper", r"pairs\.jsonl is no source for a model that reads speech", str(pairs))
    settings = tmp_path / "whisper" / "preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "feature_size": 4}))
    sound_folder(tmp_path / "sounds")
    fails("whisper", r"makes \[4, 32\] of a sound, and the model reads \[8, 32\]", str(sounds), CheckpointError)
    settings.unlink()
    fails("whisper", "by which sounds become what the model reads", str(sounds))
    for keys, message in (
        ({"column": "question", "target": "reply"}, "no column 'reply'"),
        ({"target": "answer"}, "no column 'text'"),
    ):
        with pytest.raises(UsageError, match=message):
            find_examples("pairs", wanted(pairs, **keys), 5)
    with pytest.raises(UsageError, match="is plain text and has no column 'answer'"):
        find_examples("pairs", wanted(tmp_path / "lines.txt", target="answer"), 5)


def test_a_sound_of_less_than_two_states_is_named(tmp_path: Path) -> None:
    """How many samples these need is what the stock class says."""
    model = sound_model("hubert", tmp_path / "hubert")
    sounds = sound_folder(tmp_path / "sounds", 2, spoken=False)
    raw = json.loads((tmp_path / "hubert" / "config.json").read_text())
    reader = InputReader("sounds", build_config(raw, "hubert"), tmp_path / "hubert", 64)
    least = next(n for n in range(1, 4000) if model.base_model._get_feat_extract_output_lengths(n) == 2)
    for length in (least, least - 1):
        write_sound(sounds / "short.wav", torch.zeros(length))
        found = find_examples("sounds", wanted(sounds), 5)
        if length == least:
            with torch.no_grad():
                assert model.base_model(**reader.batch(found).arguments).last_hidden_state.shape[:2] == (3, 2)
            continue
        with pytest.raises(
            UsageError, match=rf"short\.wav: the sound has {length} samples, and two states need {least}"
        ):
            reader.batch(found)


def test_texts_are_padded_as_their_model_learned_it(tmp_path: Path) -> None:
    """CLIP masks what is behind a text, SigLIP reads it, and a decoder reads its text one token behind."""
    images = captioned_images(tmp_path / "images", 2)
    found = find_examples("images and text", wanted(images), 4)
    texts = [InputExample("ab"), InputExample("abcd")]
    for name in ("clip", "siglip"):
        two_towers(name, tmp_path / name)
        raw = json.loads((tmp_path / name / "config.json").read_text())
        reader = InputReader("images and text", build_config(raw, name), tmp_path / name, 64)
        batch = reader.batch(found[:2], texts)
        assert batch.arguments["pixel_values"].shape == (2, 3, 8, 8)
        if name == "siglip":
            assert batch.arguments["input_ids"].shape == (2, 64)
            assert not batch.kept
        else:
            assert batch.arguments["attention_mask"].tolist() == [[1] * 4 + [0] * 2, [1] * 6]
            assert torch.equal(batch.kept["text"], batch.arguments["attention_mask"].bool())
    model = sound_model("whisper", tmp_path / "whisper")
    raw = json.loads((tmp_path / "whisper" / "config.json").read_text())
    reader = InputReader("speech", build_config(raw, "whisper"), tmp_path / "whisper", 64)
    ids = reader.ids("ab")
    assert reader.decoder_ids("ab").tolist() == [model.config.decoder_start_token_id, *ids[:-1].tolist()]
