"""Gives the Auto classes of transformers a wrapped class for every stock class of a base."""

from __future__ import annotations

from typing import Any


def register_models(wrapped: Any, stock: Any) -> None:
    """Let every Auto class that has a model, tokenizer or processor for a stock configuration have one for the wrapped one.

    Args:
        wrapped: the configuration class of the wrapped model.
        stock: that of its base.
    """
    from transformers.models.auto import (
        feature_extraction_auto,
        image_processing_auto,
        modeling_auto,
        processing_auto,
        tokenization_auto,
    )

    from upcycle.architectures.stock import quiet_transformers
    from upcycle.models.own.modeling import wrapped_model_class

    for name in dir(modeling_auto):
        auto = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is None or stock not in mapping:
            continue
        found = mapping[stock]
        several = found if isinstance(found, tuple) else (found,)
        made = tuple(None if one is None else wrapped_model_class(one, wrapped) for one in several)
        mapping.register(wrapped, made if isinstance(found, tuple) else made[0], exist_ok=True)
    for others in (
        tokenization_auto.TOKENIZER_MAPPING,
        image_processing_auto.IMAGE_PROCESSOR_MAPPING,
        feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
        processing_auto.PROCESSOR_MAPPING,
    ):
        if stock in others:
            with quiet_transformers():  # which says of every image processor that torchvision is missing
                others.register(wrapped, others[stock], exist_ok=True)
