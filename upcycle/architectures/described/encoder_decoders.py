"""Models of an encoder and a decoder, of text or of speech."""

from __future__ import annotations

from upcycle.architectures.described.ffn_place import DescribedModel, FfnPlace


def _t5(up: str, gate: str | None) -> tuple[FfnPlace, ...]:
    """Of the encoder, whose layer has the FFN behind self-attention, and of the decoder, where cross-attention comes between."""
    return tuple(
        FfnPlace(
            tower, f"DenseReluDense.{up}", "DenseReluDense.wo", gate=gate and f"DenseReluDense.{gate}",
            whole="DenseReluDense", norm="layer_norm", activation="dense_act_fn",
        )
        for tower in ("encoder.block.{}.layer.1", "decoder.block.{}.layer.2")
    )  # fmt: skip


def _bart(norm: str | None) -> tuple[FfnPlace, ...]:
    return tuple(
        FfnPlace(tower, "fc1", "fc2", act="activation_fn", norm=norm, activation="activation_function")
        for tower in ("encoder.layers.{}", "decoder.layers.{}")
    )


T5_MODELS = DescribedModel("t5", "T5 and Flan-T5", (*_t5("wi", None), *_t5("wi_1", "wi_0")))
BART = DescribedModel("bart", "BART", _bart(None))
WHISPER = DescribedModel("whisper", "Whisper", _bart("final_layer_norm"))
