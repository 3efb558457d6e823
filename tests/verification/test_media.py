"""Images in verification: through the processor that lies beside the weights, or made from the configuration, and said which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from media_cases import with_processor
from transformers import AutoProcessor

import upcycle
from upcycle.architectures.clean_settings import clean_processor
from upcycle.publishing.model_card import make_card

KEYS: dict[str, Any] = {"experts": 4, "top_k": 2, "verification": {"tokens": 64}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pico_towers import make_tower

    return with_processor(make_tower(tmp_path_factory.mktemp("llava"), "llava", "llama", vocab_size=4104))


@pytest.mark.long
def test_an_image_goes_through_the_processor_and_the_processor_is_copied(source: Path, tmp_path: Path) -> None:
    settings = json.loads((source / "processor_config.json").read_text())
    hostile = {"auto_map": {"AutoProcessor": "evil.X"}, "chat_template_path": "/etc/passwd"}
    (source / "processor_config.json").write_text(json.dumps(settings | hostile))
    result = upcycle.convert(str(source), tmp_path / "out", **KEYS).verification
    assert result is not None
    assert result.verdict == "exact"
    assert result.media == "27 tokens with a random image made by its processor"
    assert result.media_error is not None
    assert 0 < result.media_error < 2e-6
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text()) == settings
    assert type(AutoProcessor.from_pretrained(tmp_path / "out")).__name__ == "LlavaProcessor"
    assert upcycle.verify(tmp_path / "out", tokens=64).media == result.media


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("processor_config.json", "[1]", "must hold a JSON object"),
        (
            "processor_config.json",
            '{"processor_class": "LlavaProcessor", "image_processor": {"size": 3, "crop_size": "x"}}',
            "",
        ),
    ],
)
def test_a_processor_that_cannot_be_used_is_said_and_the_configuration_serves(
    file: str, content: str, why: str, source: Path, tmp_path: Path
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    (broken / file).write_text(content)
    keys = {**KEYS, "tokenizer": "none"}
    result = upcycle.convert(str(broken), tmp_path / "out", **keys).verification
    assert result is not None
    assert result.verdict == "exact"
    assert "made by its configuration (by its processor: " in result.media
    assert why in result.media
    assert str(tmp_path) not in (tmp_path / "out" / "verification.json").read_text()
    assert result.media_error is not None


def test_settings_of_processors_lose_what_names_code_and_keep_stock_classes() -> None:
    raw = {
        "processor_class": "LlavaProcessor",
        "image_processor_type": "CLIPImageProcessorFast",
        "feature_extractor_type": "EvilExtractor",
        "auto_map": {"AutoProcessor": "evil.X"},
        "size": {"height": 3, "auto_map": 1},
        "image_processor": {"image_processor_type": "CLIPImageProcessor", "_auto_class": "AutoImageProcessor"},
        "tokenizer_class": "Evil",
        "vocab_file": "/etc/passwd",
    }
    assert clean_processor(raw) == {
        "processor_class": "LlavaProcessor",
        "image_processor_type": "CLIPImageProcessorFast",
        "size": {"height": 3},
        "image_processor": {"image_processor_type": "CLIPImageProcessor"},
    }


def test_the_card_says_that_it_reads_images_and_how_that_was_verified(
    tower: Callable[..., Path], tmp_path: Path
) -> None:
    upcycle.convert(str(tower("llava", "llama")), tmp_path / "out", **KEYS)
    text = make_card(tmp_path / "out", "org/name")
    assert "pipeline_tag: image-text-to-text" in text
    assert "AutoModelForImageTextToText.from_pretrained" in text
    assert "AutoProcessor" in text
    assert "relative error of the logits of 64 tokens with a random image made by its configuration: " in text
    assert "3 of 3 layers" in text
