"""``upcycle generate --image``: a model of parts reads a picture as stock transformers has it read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pico_towers import reconfigured
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

import upcycle
from upcycle.cli.main import cli
from upcycle.errors import EnvironmentFault, UsageError
from upcycle.inference.generate import Writer

Tower = Callable[..., Path]


@pytest.fixture
def moe(tower: Tower, tmp_path: Path) -> Path:
    """A LLaVA-like MoE with its processor, beside two pictures."""
    source = tower("llava", "llama", vocab_size=4104)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    dense = reconfigured(source, tmp_path / "dense", image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "image_token": "<image>"}
    LlavaProcessor(images, tokenizer, num_additional_image_tokens=1, **settings).save_pretrained(dense)
    for name, seed in (("one", 1), ("two", 2)):
        noise = torch.randint(256, (20, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{name}.png")
    keys = {"method": "random_split", "experts": 4, "top_k": 2, "verification": {"tokens": 64}}
    upcycle.convert(str(dense), tmp_path / "moe", **keys)
    return tmp_path / "moe"


@pytest.mark.long
def test_the_text_is_what_stock_code_writes_for_the_picture(moe: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(moe)
    model = AutoModelForMultimodalLM.from_pretrained(moe, dtype=torch.float32).eval()
    written = {}
    for name in ("one", "two"):
        text = f"{processor.image_token}\nthe sea was"
        inputs = processor(text=[text], images=[Image.open(tmp_path / f"{name}.png")], return_tensors="pt")
        assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == 16
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        writer = Writer(str(moe))
        tokens = list(writer.write(writer.encode("the sea was", tmp_path / f"{name}.png"), 6))
        written[name] = [token.id for token in tokens]
        assert written[name] == expected[0].tolist()
        assert all(len(token.experts) == 2 for token in tokens[:-1])
    done = CliRunner().invoke(
        cli,
        [
            "generate",
            str(moe),
            "--prompt",
            "the sea was",
            "--image",
            str(tmp_path / "two.png"),
            "--tokens",
            "6",
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    assert [token["id"] for token in json.loads(done.stdout)["tokens"]] == written["two"]


@pytest.mark.long
def test_the_picture_is_read_once(moe: Path, tmp_path: Path) -> None:
    writer = Writer(str(moe))
    with_one = [token.id for token in writer.write(writer.encode("the sea", tmp_path / "one.png"), 2)]
    assert writer.model.config.image_token_index in with_one
    plain = [token.id for token in writer.write(writer.encode("the sea"), 2)]
    assert plain == [token.id for token in Writer(str(moe)).write(writer.encode("the sea"), 2)]


def test_what_is_no_picture_is_refused(moe: Path, tmp_path: Path, pico_moe: Callable[[str], Path]) -> None:
    writer = Writer(str(moe))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UsageError, match=r"text\.png is no image that Pillow can read"):
        writer.encode("the sea", tmp_path / "text.png")
    with pytest.raises(UsageError, match=r"none\.png cannot be read: .*No such file"):
        writer.encode("the sea", tmp_path / "none.png")
    content = (tmp_path / "one.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=r"cut\.png cannot be read: "):
        writer.encode("the sea", tmp_path / "cut.png")
    with pytest.raises(UsageError, match="is a 'mixtral' model, which reads no images"):
        Writer(str(pico_moe("mixtral"))).encode("the sea", tmp_path / "one.png")
    for file in moe.glob("*processor_config.json"):
        file.unlink()
    with pytest.raises(EnvironmentFault, match="processor"):
        Writer(str(moe)).encode("the sea", tmp_path / "one.png")
