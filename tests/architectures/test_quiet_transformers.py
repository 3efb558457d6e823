"""Nothing of transformers' own is drawn on the terminal."""

from __future__ import annotations

from typing import Any

from transformers import modeling_gguf_pytorch_utils

from upcycle.architectures.stock import quiet_transformers


def test_no_bar_of_transformers_is_drawn_while_gguf_is_read() -> None:
    utils: Any = modeling_gguf_pytorch_utils
    before = utils.tqdm
    with quiet_transformers():
        assert utils.tqdm([1]).disable
    assert utils.tqdm is before
