"""Models of an encoder and a decoder, of text or of speech."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.described.ffn_place import DescribedModel, FfnPlace

_PARTS: dict[str, Any] = {
    "parts": (("encoder", "encoder."), ("decoder", "decoder.")),
    "pauses": True,
}


def _t5(up: str, gate: str | None) -> tuple[FfnPlace, ...]:
    """Of the encoder, whose layer has the FFN behind self-attention, and of the decoder, where cross-attention comes between."""
    return tuple(
        FfnPlace(
            f"{tower}.block.{{}}",
            f"{ffn}.DenseReluDense.{up}",
            f"{ffn}.DenseReluDense.wo",
            gate=gate and f"{ffn}.DenseReluDense.{gate}",
            whole=f"{ffn}.DenseReluDense",
            norm=f"{ffn}.layer_norm",
            activation="dense_act_fn",
        )
        for tower, ffn in (("encoder", "layer.1"), ("decoder", "layer.2"))
    )


def _t5_like(name: str, title: str) -> DescribedModel:
    return DescribedModel(name, title, (*_t5("wi", None), *_t5("wi_1", "wi_0")), reads="pairs", **_PARTS)


_BEHIND = "encoder_attn_layer_norm|self_attn_layer_norm"  # norms behind attention: the FFN reads the last one's output


def _bart(norm: str) -> tuple[FfnPlace, ...]:
    """Of both; where the FFN reads what is behind attention, the norm of its own name comes behind it."""
    closing = "final_layer_norm" if norm == _BEHIND else None
    return tuple(
        FfnPlace(tower, "fc1", "fc2", act="activation_fn", norm=norm, activation="activation_function", closing=closing)
        for tower in ("encoder.layers.{}", "decoder.layers.{}")
    )


def _bart_like(name: str, title: str, norm: str = _BEHIND) -> DescribedModel:
    return DescribedModel(name, title, _bart(norm), reads="pairs", **_PARTS)


T5_MODELS = _t5_like("t5", "T5 and Flan-T5")
MT5 = _t5_like("mt5", "mT5")
UMT5 = _t5_like("umt5", "UMT5")
BART = _bart_like("bart", "BART")
MBART = _bart_like("mbart", "mBART", "final_layer_norm")
PEGASUS = _bart_like("pegasus", "PEGASUS", "final_layer_norm")
MARIAN = _bart_like("marian", "MarianMT")
WHISPER = DescribedModel("whisper", "Whisper", _bart("final_layer_norm"), reads="speech", **_PARTS)
