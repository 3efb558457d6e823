"""All architectures that are described by their FFNs, by ``model_type``."""

from __future__ import annotations

from upcycle.architectures.described.decoders import DECODERS
from upcycle.architectures.described.encoder_decoders import ENCODER_DECODERS
from upcycle.architectures.described.encoders import ENCODERS
from upcycle.architectures.described.ffn_place import DescribedModel
from upcycle.architectures.described.vision import VISION

DESCRIBED: dict[str, DescribedModel] = {
    model.name: model for model in (*DECODERS, *ENCODERS, *ENCODER_DECODERS, *VISION)
}
