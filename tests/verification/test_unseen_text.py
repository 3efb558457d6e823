"""What a split lost of text that it was not calibrated on is measured and said, wherever its quality is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.cli.verbs.verify import verification_facts
from upcycle.errors import UsageError
from upcycle.files.locate import DEMO_FOLDER
from upcycle.publishing.model_card import make_card
from upcycle.text.reading.plain_text import EVERYDAY, read_text
from upcycle.text.windows import encode
from upcycle.verification.verdict import Verification, overfitted, unseen_ratio

Pico = Callable[[str], Path]
SPLIT = {"method": "random_split", "experts": 8, "top_k": 4, "router": "ridge", "seed": 1}


def split(source: Path, out: Path, text: str, **more: object) -> Verification:
    calibration = {"text": [text], "tokens": 1024, "window": 128}
    found = upcycle.convert(str(source), out, calibration=calibration, **{**SPLIT, **more}).verification
    assert found is not None
    return found


def test_verify_states_the_loss_on_text_of_another_kind(pico: Pico, tmp_path: Path) -> None:
    found = split(pico("llama"), tmp_path / "out", "code")
    assert found.unseen is not None
    tokens = encode(load_tokenizer(tmp_path / "out"), read_text(EVERYDAY))
    ids = torch.stack([tokens[:256], tokens[len(tokens) // 256 * 256 - 256 :][:256]])  # the first and the last window
    assert found.unseen["tokens"] == 512
    for key, folder in (("perplexity_dense", pico("llama")), ("perplexity", tmp_path / "out")):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
        assert found.unseen[key] == pytest.approx(math.exp(loss), rel=1e-4)
    line = dict(verification_facts(found))["other text"]
    assert f"now {found.unseen['perplexity']:.3f}" in str(line)
    assert "everyday English, which was not calibrated on" in make_card(tmp_path / "out", "out")


def test_text_that_was_calibrated_on_is_not_called_another_kind(pico: Pico, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text((DEMO_FOLDER / "unseen" / f"{EVERYDAY}.txt").read_text())
    assert split(pico("llama"), tmp_path / "out", str(copy)).unseen is None


def test_nothing_is_measured_on_other_text_where_nothing_is_lost_or_calibrated(pico: Pico, tmp_path: Path) -> None:
    assert split(pico("llama"), tmp_path / "exact", "code", top_k=8, router="zero").unseen is None
    plain = upcycle.convert(str(pico("llama")), tmp_path / "plain", method="random_split", experts=8, top_k=4)
    assert plain.verification is not None
    assert plain.verification.unseen is None


@pytest.mark.parametrize(
    ("other", "ratio", "much"),
    [
        (None, None, False),
        ({"perplexity_dense": 10.0, "perplexity": 24.0}, 2.4, False),
        ({"perplexity_dense": 10.0, "perplexity": 26.0}, 2.6, True),
        ({"perplexity_dense": 10.0, "perplexity": None}, None, False),
    ],
)
def test_much_worse_is_a_quarter_more_than_on_what_was_calibrated_on(
    other: dict[str, float | None] | None, ratio: float | None, much: bool
) -> None:
    check = {"perplexity_dense": 10.0, "perplexity": 20.0, "unseen": other}
    assert unseen_ratio(check) == (None if ratio is None else pytest.approx(ratio))
    assert overfitted(check) is much


def test_the_text_that_is_kept_for_measuring_is_not_calibrated_on(pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="everyday is the embedded text by which is measured"):
        split(pico("llama"), tmp_path / "out", EVERYDAY)
    assert not (tmp_path / "out").exists()
