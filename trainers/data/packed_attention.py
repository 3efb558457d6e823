"""How a model is called on packed rows, and whether it can be: its context, its vocabulary, its kinds of layers.

Transformers 5 keeps the documents of a row apart by itself where a model is called with ``position_ids`` that restart at
every document, without ``attention_mask``, and with ``use_cache=False`` (with a cache, even an empty one, it does not).
"""

from __future__ import annotations

from typing import Any

from upcycle.errors import UsageError
from upcycle.trainers.data.batches import PackedBatch

_MASK_WITHOUT_POSITIONS = (
    "gpt_oss",
)  # transformers 5.23: its model does not hand position_ids on to what makes the mask
_RECURRENT = {"linear_attention": "linear attention", "conv": "short convolution", "mamba": "state space"}


def packed_forward(model: Any, batch: PackedBatch, last: int = 0) -> Any:
    """A causal language model's output for a batch, whose documents do not see each other.

    Args:
        model: a stock model, or an engine around one.
        batch: rows ``[B, L]`` on the model's device.
        last: 0 for logits ``[B, L, V]``, or how many positions at the end of each row to compute logits of.
    """
    some = {"logits_to_keep": last} if last else {}
    return model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **some)


def check_fits(config: Any, tokenizer: Any, length: int) -> None:
    """Refuse rows that the model cannot take.

    Args:
        config: the model's configuration.
        tokenizer: the one that makes the rows.
        length: positions in a row.

    Raises:
        UsageError: rows are longer than the model's context, or the tokenizer has a token without an embedding.
    """
    context = getattr(config, "max_position_embeddings", None)
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
    kinds = sorted({_RECURRENT[kind] for kind in getattr(config, "layer_types", None) or () if kind in _RECURRENT})
    if kinds:
        return f"{' and '.join(kinds)} layers of {config.model_type} run on from one document into the next"
    if config.model_type in _MASK_WITHOUT_POSITIONS:
        return f"the attention mask of {config.model_type} in transformers does not see where a document begins"
    attention = getattr(config, "_attn_implementation", None) or ""
    if "flash" in attention and rows > 1:
        return f"{attention} keeps documents apart only in a batch of one row, and micro_batch is {rows}"
    return None
