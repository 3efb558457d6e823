"""Predicts how long a split or pruned model takes, relative to its dense parent, from what was fitted to the committed times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense_config import DenseConfig, Feature
from upcycle.architectures.moe.softmax.qwen2_moe import Qwen2Moe, shared_size
from upcycle.ffn.moe_shape import MoeShape
from upcycle.planning.speed.table import TABLES, MeasuredModel, committed, measurements
from upcycle.planning.speed.work import HOWS, TIMED_PARTS, BlockShape, ModelShape, milliseconds

# Targets whose sparse blocks consist of the measured products: a softmax router, equal experts, at most one shared expert.
_MEASURED_ALIKE = ("mixtral", "qwen2_moe", "qwen3_moe", "mellum", "flex_olmo")
_OTHER_LAYERS = {Feature.CONVOLUTIONS, Feature.GATED_ATTENTION, Feature.PARALLEL_BLOCK}
_ABOUT = ("device", "instructions", "threads", "dtype", "prompt_tokens", "torch", "transformers")


def predicted_times(dense: DenseConfig, shape: MoeShape, target: str, dtype: str) -> dict[str, Any]:
    """Return :func:`predicted_time` in fp32, and, of a model whose experts are stored in another dtype that was timed, in that one.

    The latter stands under the dtype's name. It is of a CPU that multiplies such numbers itself; others compute them in fp32.
    """
    found = predicted_time(dense, shape, target)
    if "unknown" in found or dtype == found["dtype"] or dtype not in TABLES:
        return found
    return {**found, dtype: predicted_time(dense, shape, target, committed(dtype))}


def predicted_time(
    dense: DenseConfig, shape: MoeShape, target: str, table: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what ``plan`` says about time, as plain data.

    ``relative`` maps ``grouped_mm`` and ``upcycle``, the ways to run sparse blocks, to the times of reading a prompt (``prefill``) and
    of writing a token (``decode``), relative to the dense model's. Beside it stand what was measured on, and by how much
    predictions for models that nothing was fitted to are off. Where the table says nothing about such a model, there is
    only ``unknown``, the reason.

    Args:
        dense: the parent.
        shape: of the result; without experts, its FFNs are its shared experts.
        target: the name of the result's architecture.
        table: times and what was fitted to them; by default, those that come with the package.
    """
    table = committed() if table is None else table
    parent = _model(dense, BlockShape(dense.intermediate_size), dense.num_hidden_layers)
    child = _converted(dense, shape, target)
    seen = list(measurements(table))
    if reason := _unlike(dense, shape, target) or _outside(parent, child, seen):
        return {"unknown": reason}
    fitted = table["milliseconds"]
    relative = {
        how: {
            part: round(milliseconds(fitted[part], child, part, how) / milliseconds(fitted[part], parent, part, how), 3)
            for part in TIMED_PARTS
        }
        for how in HOWS
    }
    same_size = any((each.shape.hidden, each.ffn) == (dense.hidden_size, dense.intermediate_size) for each in seen)
    off = table["errors"]["without_shape" if same_size else "without_size"]
    about = {key: table["about"][key] for key in _ABOUT}
    return {"relative": relative, **about, "error_median": off["median"], "error_worst": off["worst"]}


def _converted(dense: DenseConfig, shape: MoeShape, target: str) -> ModelShape:
    shared = shared_size(dense, shape) if target == Qwen2Moe.name else shape.shared * shape.expert_size
    block = BlockShape(shape.expert_size, shape.experts, shape.top_k, shared) if shape.experts else BlockShape(shared)
    return _model(dense, block, len(shape.moe_layers))


def _model(dense: DenseConfig, block: BlockShape, converted: int) -> ModelShape:
    """Return the dense model, in which so many layers have another block for their FFN."""
    blocks = [(BlockShape(dense.intermediate_size), dense.num_hidden_layers - converted), (block, converted)]
    heads = (dense.num_attention_heads, dense.num_key_value_heads, dense.head_dim)
    return ModelShape(dense.hidden_size, heads, dense.vocab_size, tuple((b, count) for b, count in blocks if count))


def _unlike(dense: DenseConfig, shape: MoeShape, target: str) -> str | None:
    """Return what kind of model the times are not about."""
    if shape.experts and target not in _MEASURED_ALIKE:
        return f"MoE layers of {target}, the result's architecture, were not timed"
    if dense.special & _OTHER_LAYERS:
        return f"layers of {dense.family}, the source's architecture, were not timed"
    if not dense.mlp_gated or dense.mlp_bias:
        return "FFNs without a gate or with biases were not timed"
    return None


def _outside(parent: ModelShape, child: ModelShape, seen: list[MeasuredModel]) -> str | None:
    """Return which number lies outside of those that were timed."""
    ((ffn, _),) = parent.blocks
    blocks = [block for block, _ in child.blocks if block.experts]
    timed = [block for each in seen for block, _ in each.shape.blocks if block.experts]
    numbers = [("hidden size", parent.hidden, [each.shape.hidden for each in seen])]
    numbers += [("FFN", ffn.width, [each.ffn for each in seen])]
    for block in blocks:
        numbers += [("number of experts", block.experts, [each.experts for each in timed])]
        numbers += [("width of experts", block.width, [each.width for each in timed])]
        numbers += [("top-k", block.top_k, [each.top_k for each in timed])]
    for name, number, known in numbers:
        if not min(known) <= number <= max(known):
            return f"a {name} of {number:,} lies outside of what was timed, {min(known):,} to {max(known):,}"
    return None
