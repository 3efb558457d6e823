"""Which template a recipe means, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chats import CHATML

from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.files.locate import DEMO_FOLDER
from upcycle.trainers.data.chat_templates import BUILT_IN, find_template, kept_template


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(DEMO_FOLDER / "model")


def test_a_tokenizers_own_a_file_or_one_of_two(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(CHATML)
    assert find_template(tokenizer, str(tmp_path / "t.jinja")).source == CHATML
    assert find_template(tokenizer, "turns").source == BUILT_IN["turns"]
    tokenizer.chat_template = CHATML
    assert find_template(tokenizer, None).source == CHATML
    assert kept_template(tokenizer, [("data", None)]) is None
    assert kept_template(tokenizer, [("data", None), ("stages.a.data", "turns"), ("data", None)]) == BUILT_IN["turns"]


def test_chatml_needs_its_tokens(tokenizer: Any) -> None:
    with pytest.raises(
        UsageError, match=r"chatml needs the token <\|im_start\|>, which the tokenizer does not"
    ) as caught:
        find_template(tokenizer, "chatml")
    assert "chat_template: turns" in str(caught.value.hint)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert find_template(tokenizer, "chatml").source == BUILT_IN["chatml"]


def test_without_a_template_one_can_be_named(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="there are conversations, and the tokenizer has no chat template") as caught:
        find_template(tokenizer, None)
    assert "--set data.chat_template=turns" in str(caught.value.hint)
    tokenizer.chat_template = {"tools": CHATML, "rag": CHATML}
    with pytest.raises(UsageError, match="several chat templates, and none is called default"):
        find_template(tokenizer, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff", "it is not UTF-8 text"),
        (b"{% for m in messages %}\n{% endif %}", r"t\.jinja is not a Jinja template: line 2"),
        (b"x" * (1 << 21), "has more than"),
    ],
)
def test_a_file_that_is_no_template(tokenizer: Any, tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        find_template(tokenizer, str(tmp_path / "t.jinja"))
