"""Encoders of sounds."""

from __future__ import annotations

from upcycle.architectures.described.ffn_place import DescribedModel, FfnPlace


def _sounds(name: str, title: str) -> DescribedModel:
    """The norm before the FFN is the attention's own, behind it, or the FFN's, as ``do_stable_layer_norm`` says."""
    ffn = "feed_forward"
    places = tuple(
        FfnPlace(
            "encoder.layers.{}",
            f"{ffn}.intermediate_dense",
            f"{ffn}.output_dense",
            whole=ffn,
            norm=norm,
            dropout="hidden_dropout",
            when=("do_stable_layer_norm", stable),
            closing=None if stable else "final_layer_norm",
        )
        for stable, norm in ((False, "layer_norm"), (True, "final_layer_norm"))
    )
    return DescribedModel(name, title, places, encoder=True, reads="sounds", pauses=True)


WAV2VEC2 = _sounds("wav2vec2", "wav2vec 2.0")
HUBERT = _sounds("hubert", "HuBERT")
