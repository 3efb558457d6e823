"""How a model is called on packed rows, and whether it can be: its context, its vocabulary, its kinds of layers.

Transformers 5 keeps the documents of a row apart by itself where a model is called with ``position_ids`` that restart at
every document, without ``attention_mask``, and with ``use_cache=False`` (with a cache, even an empty one, it does not). A few
models do not look at positions for it, and are given the mask that it would make.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

from upcycle.architectures.module_paths import text_config
from upcycle.architectures.stock_auto import is_encoder
from upcycle.errors import UsageError
from upcycle.registry import find
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.pictures.row_pictures import BatchPictures

if TYPE_CHECKING:
    import torch

# transformers 5.23: these models do not hand position_ids on to what makes the mask; the second group takes a mask that is made
# already.
_MASK_WITHOUT_POSITIONS = ("gpt_oss", "bloom")
_GIVEN_A_MASK = ("falcon", "opt")
# Their masks look at the first of four rows of positions; the others are those of time, height and width.
_POSITIONS_OF_TEXT = ("qwen2_5_vl", "glm46v")
_RECURRENT = {"linear_attention": "linear attention", "conv": "short convolution", "mamba": "state space"}


def packed_forward(model: Any, batch: PackedBatch, last: int = 0) -> Any:
    """A model's output for a batch, whose documents do not see each other; those of a masked language model's row do.

    Args:
        model: a stock model, or an engine around one.
        batch: rows ``[B, L]`` on the model's device.
        last: 0 for logits ``[B, L, V]``, or how many positions at the end of each row to compute logits of.
    """
    if batch.given is not None:
        return model(input_ids=batch.given, attention_mask=batch.real.long())
    some: dict[str, Any] = {"logits_to_keep": last} if last else {}
    stock = getattr(model, "module", model)
    if batch.pictures is not None:
        some |= media_arguments(stock, batch.loaded().pictures)
        if batch.pictures.source.whole_rows:
            typed = batch.pictures.source.types(batch.ids)
            return model(input_ids=batch.ids, attention_mask=batch.real.long(), use_cache=False, **typed, **some)
    if _takes_a_mask(stock.config):
        some["attention_mask"] = _mask(stock, batch.positions)
    positions = batch.positions
    if stock.config.model_type in _POSITIONS_OF_TEXT:
        positions = positions.expand(4, *positions.shape)
    return model(input_ids=batch.ids, position_ids=positions, use_cache=False, **some)


def media_arguments(model: Any, pictures: BatchPictures | None) -> dict[str, Any]:
    """What a stock model reads of the images of a batch, by argument, in its dtype."""
    media = pictures.media if pictures is not None else None
    return {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in (media or {}).items()
        if name in signature(model.forward).parameters
    }


def _mask(model: Any, positions: torch.Tensor) -> Any:
    """The mask that transformers makes of positions ``[B, L]`` for a model's attention, ``[B, 1, L, L]``; None: it needs none."""
    import torch
    from transformers.masking_utils import create_causal_mask

    like = torch.empty((*positions.shape, 0), dtype=model.dtype, device=positions.device)
    return create_causal_mask(
        config=model.config, inputs_embeds=like, attention_mask=None, past_key_values=None, position_ids=positions
    )


def _takes_a_mask(config: Any) -> bool:
    return _architecture(config) in _GIVEN_A_MASK and not getattr(config, "alibi", False)


def _architecture(config: Any) -> str:
    """The ``model_type`` of a model, or of the base of a wrapped one."""
    return str(getattr(config, "base_model_type", None) or getattr(config, "model_type", ""))


def check_fits(config: Any, tokenizer: Any, length: int) -> None:
    """Refuse rows that the model cannot take.

    Args:
        config: the model's configuration.
        tokenizer: the one that makes the rows.
        length: positions in a row.

    Raises:
        UsageError: rows are longer than the model's context, or the tokenizer has a token without an embedding.
    """
    described, config = find("described", _architecture(config)), text_config(config)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and described is not None and described.counts_from_padding:
        context -= (config.pad_token_id or 0) + 1
    if context is not None and length > context:
        raise UsageError(
            f"rows of {length} tokens are longer than the model's context of {context}",
            hint=f"set length to {context} at most",
        )
    if len(tokenizer) > config.vocab_size:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model has embeddings for {config.vocab_size}",
            hint="use the tokenizer that the model came with",
        )


def packing_leak(config: Any, rows: int) -> str | None:
    """Why documents in the same row would see each other; ``None``: they do not.

    Args:
        config: the model's configuration, with the attention implementation it runs with.
        rows: the micro-batch. Flash attention separates documents in a single row only; :meth:`PackedBatch.flat` makes one.
    """
    config, name = text_config(config), _architecture(config)
    if is_encoder(config):
        return f"{name} reads a row as a whole, as RoBERTa learned and data.packing: alone avoids"
    kinds = sorted({_RECURRENT[kind] for kind in getattr(config, "layer_types", None) or () if kind in _RECURRENT})
    if kinds:
        return f"{' and '.join(kinds)} layers of {name} run on from one document into the next"
    attention = getattr(config, "_attn_implementation", None) or ""
    unmasked = name in _GIVEN_A_MASK and ("flash" in attention or not _takes_a_mask(config))
    if name in _MASK_WITHOUT_POSITIONS or unmasked:
        return f"the attention mask of {name} in transformers does not see where a document begins"
    if "flash" in attention and rows > 1:
        return f"{attention} keeps documents apart only in a batch of one row, and micro_batch is {rows}"
    return None
