"""What encoders are measured by, against loops over stock models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from encoder_cases import SPECIAL, image_encoder, image_folder, text_encoder
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForMaskedLM
from wrapped_models import small_model

import upcycle
import upcycle.models
from upcycle.architectures.stock import load_tokenizer
from upcycle.cli.main import cli
from upcycle.errors import UsageError
from upcycle.evaluation.encoders.embeddings import compared, nearest, sentences
from upcycle.text.windows import encode

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps.\n" * 4
LINES = "\n".join(f"line {i}: {'abcdefgh'[i % 8] * (30 + i)} {i * 7919}" for i in range(40))
SPLIT = {"method": "random_split", "experts": 8, "top_k": 3, "tokenizer": "copy"}


def test_pseudo_perplexity_masks_one_token_at_a_time(tmp_path: Path) -> None:
    text_encoder("bert", tmp_path / "dense")
    upcycle.convert(str(tmp_path / "dense"), tmp_path / "moe", **SPLIT)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    found = upcycle.evaluate(tmp_path / "moe", text=str(text), reference=tmp_path / "dense", window=20, tokens=10_000)
    ids = encode(load_tokenizer(tmp_path / "dense"), TEXT)
    windows = ids[: len(ids) // 18 * 18].view(-1, 18)
    expected = []
    for folder in ("moe", "dense"):
        model, total = AutoModelForMaskedLM.from_pretrained(tmp_path / folder).eval().double(), 0.0
        for window in windows:
            for place, token in enumerate(window):
                masked = window.clone()
                masked[place] = SPECIAL.index("[MASK]")
                row = torch.cat([torch.tensor([0]), masked, torch.tensor([1])])
                with torch.no_grad():
                    total -= model(row[None]).logits[0, place + 1].log_softmax(-1)[token].item()
        expected.append(total / windows.numel())
    (result,) = found.texts
    assert result.predicted == windows.numel()
    assert result.nats_per_token == pytest.approx(expected[0], rel=1e-5)
    assert result.reference_nats_per_token == pytest.approx(expected[1], rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected[0]), rel=1e-4)
    assert [sum(layer.load) for layer in found.layers] == pytest.approx([1, 1])
    fewer = upcycle.evaluate(tmp_path / "moe", text=str(text), window=20, tokens=7).texts[0]
    assert (fewer.predicted, fewer.reference_perplexity) == (7, None)


@pytest.mark.long
def test_embeddings_are_compared_with_the_dense_parents(tmp_path: Path) -> None:
    model = text_encoder("bert", tmp_path / "dense")
    model.base_model.save_pretrained(tmp_path / "dense")  # without its head
    (tmp_path / "dense" / "model.safetensors").unlink()
    small = type(model.base_model)(model.config)
    small.load_state_dict(model.base_model.state_dict(), strict=False)
    small.save_pretrained(tmp_path / "dense")
    upcycle.convert(str(tmp_path / "dense"), tmp_path / "moe", **SPLIT)
    text = tmp_path / "text.txt"
    text.write_text(LINES)
    measured = upcycle.evaluate(tmp_path / "moe", text=str(text), reference=tmp_path / "dense")
    found = measured.embeddings
    assert found is not None
    assert [sum(layer.load) for layer in measured.layers] == pytest.approx([1, 1])
    tokenizer = load_tokenizer(tmp_path / "dense")
    vectors = []
    for folder in ("moe", "dense"):
        model, rows = AutoModel.from_pretrained(tmp_path / folder).eval(), []
        for line in sentences([LINES], 1000):
            ids = tokenizer(line, truncation=True, max_length=64, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                rows.append(model(ids).last_hidden_state[0].double().mean(0))
        vectors.append(torch.nn.functional.normalize(torch.stack(rows), dim=-1))
    assert found.cosine == pytest.approx((vectors[0] * vectors[1]).sum(-1).mean().item(), abs=1e-5)
    assert found.recall == pytest.approx(compared(vectors[0], vectors[1], "").recall, abs=0.02)
    assert 0 < found.recall < 1
    with pytest.raises(UsageError, match="has no head whose answers"):
        upcycle.evaluate(tmp_path / "moe", text=str(text))


def test_neighbours_are_the_nearest_others() -> None:
    angles = torch.tensor([0.0, 0.1, 0.25, 3.0]).double()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=-1)
    assert nearest(vectors, 1).nonzero().tolist() == [[0, 1], [1, 0], [2, 1], [3, 2]]
    assert compared(vectors, vectors, "x").recall == 1
    swapped = vectors[[0, 3, 2, 1]]
    assert compared(swapped, vectors, "x").cosine < 0.9
    with pytest.raises(UsageError, match="1 lines of 40 characters"):
        sentences(["short\n" + 50 * "a"], 9)


def test_image_classifiers_are_measured_on_a_folder_with_a_subfolder_per_class(tmp_path: Path) -> None:
    dense = image_encoder("vit", tmp_path / "dense", id2label={0: "class_0", 1: "class_1", 2: "other"})
    images = image_folder(tmp_path / "images", each=10)
    upcycle.convert(str(tmp_path / "dense"), tmp_path / "moe", **SPLIT)
    found = upcycle.evaluate(tmp_path / "moe", images=images, reference=tmp_path / "dense").classes
    assert found is not None
    processor = AutoImageProcessor.from_pretrained(tmp_path / "dense")
    files = sorted(images.rglob("*.png"))
    pixels = processor(images=[Image.open(path) for path in files], return_tensors="pt")["pixel_values"]
    moe = AutoModelForImageClassification.from_pretrained(tmp_path / "moe").eval()
    with torch.no_grad():
        one, other = (model(pixel_values=pixels).logits.argmax(-1) for model in (moe, dense))
    labels = torch.tensor([int(path.parent.name[-1]) for path in files])
    assert (found.images, found.classes) == (20, 2)
    assert found.accuracy == (one == labels).double().mean().item()
    assert found.reference_accuracy == (other == labels).double().mean().item()
    assert found.agreement == (one == other).double().mean().item()
    shown = CliRunner().invoke(cli, ["evaluate", str(tmp_path / "moe"), "--images", str(images), "--quiet"])
    assert f"{found.accuracy:.2%}" in shown.output
    by_number = tmp_path / "numbers"
    by_number.mkdir()
    for i in range(2):
        (images / f"class_{i}").rename(by_number / str(i))
    again = upcycle.evaluate(tmp_path / "moe", images=by_number).classes
    assert again is not None
    assert (again.accuracy, again.agreement) == (found.accuracy, None)
    (by_number / "0").rename(by_number / "cats")
    with pytest.raises(UsageError, match="folder 'cats' is no class of the model"):
        upcycle.evaluate(tmp_path / "moe", images=by_number)
    with pytest.raises(UsageError, match=r"reads images, and none are named"):
        upcycle.evaluate(tmp_path / "moe")


def test_other_models_say_what_they_do_not_read(tmp_path: Path) -> None:
    text_encoder("bert", tmp_path / "bert")
    small_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="reads text, not images"):
        upcycle.evaluate(tmp_path / "bert", images=tmp_path)
    with pytest.raises(UsageError, match="reads no images"):
        upcycle.evaluate(tmp_path / "gpt2", images=tmp_path)
    with pytest.raises(UsageError, match="is no encoder, and is to be compared with one"):
        upcycle.evaluate(tmp_path / "bert", reference=tmp_path / "gpt2")
