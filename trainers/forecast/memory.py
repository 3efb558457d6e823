"""Estimates how much memory a rank needs to train.

T tokens of a pass, D hidden, F intermediate, E experts, K top-k, R = T K rows, I width of an expert, V vocabulary,
b bytes per element, N ranks, e ranks that share experts, P elements that a rank computes with, Q = (all elements) / N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from upcycle.kernels.entry.choose_backend import LEAN, NAME
from upcycle.trainers.forecast.model_counts import LayerCounts, ModelCounts
from upcycle.trainers.forecast.zero_division import Division

_FULL = 4  # bytes of fp32
_UNDIVIDED_BUCKET = 500_000_000  # elements that DeepSpeed sums at once without ZeRO


@dataclass(frozen=True)
class MemoryForecast:
    """Estimated bytes on one rank's device, and in ``host`` those that offloading moves to the host's memory.

    ``buffers`` are DeepSpeed's: :func:`bucket_bytes`, :func:`gathered_bytes` and :func:`arriving_bytes`. ``loading`` are those that
    pass through the host's memory before the first step: :func:`loading_bytes`.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    parent: float
    host: float
    loading: float = 0.0

    @property
    def total(self) -> float:
        """All bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.parent

    def as_dict(self) -> dict[str, Any]:
        """Every number in bytes, and the total on the device."""
        return {**vars(self), "total": self.total}


def forecast_memory(division: Division, parent: ModelCounts | None) -> MemoryForecast:
    """The memory of a rank at its peak: with all gradients of a step, and all activations of a pass.

    Args:
        division: how the run is divided.
        parent: the dense model to distil from, if any.
    """
    zero = division.recipe.zero
    weights, gradients, states = weight_bytes(division), gradient_bytes(division), optimizer_bytes(division)
    host = 0.0
    if division.zero_stage and zero.offload_optimizer:
        host, states = host + states, 0.0
        if division.zero_stage > 1:
            host, gradients = host + gradients, 0.0
    if division.zero_stage == 3 and zero.offload_weights:
        kept = division.item * sum(w.elements for w in division.counts.weights if division.persistent(w))
        host, weights = host + weights - kept, kept
    return MemoryForecast(
        weights=weights,
        gradients=gradients,
        optimizer=states,
        buffers=bucket_bytes(division) + gathered_bytes(division) + arriving_bytes(division),
        activations=activation_bytes(division) + (_parent_logits(division) if parent else 0.0),
        parent=parent_bytes(division, parent) if parent else 0.0,
        host=host,
        loading=loading_bytes(division, parent),
    )


def parent_bytes(division: Division, parent: ModelCounts) -> float:
    """The parent's weights: all of them below stage 3; there a rank's part of them, and the largest that it gathers while it runs."""
    if not division.divides_frozen:
        return float(division.parent_item * parent.elements)
    return division.parent_item * (parent.elements / division.world_size + parent.largest_part)


def loading_bytes(division: Division, parent: ModelCounts | None) -> float:
    """Weights that a rank holds whole in the host's memory while it loads: below stage 3 the whole model, and then the whole parent.

    In stage 3, the first rank reads one layer after another, and every rank keeps its part, so that it is the largest layer.
    """
    student, teacher = division.counts.elements, parent.elements if parent else 0
    if division.zero_stage == 3:
        student = division.counts.largest_part
    if division.divides_frozen:
        teacher = parent.largest_part if parent else 0
        return float(max(division.item * student, division.parent_item * teacher))
    return float(division.item * student + division.parent_item * teacher)


def weight_bytes(division: Division) -> float:
    """``b P`` below stage 3; there ``b Q``, plus the small weights that each rank keeps whole (``param_persistence_threshold``)."""
    everything = division.counts.weights
    if division.zero_stage < 3:
        return division.item * division.local(everything)
    small = [weight for weight in everything if division.persistent(weight) and division.holders(weight) > 1]
    return division.item * (division.partition(everything) + division.local(small))


def optimizer_bytes(division: Division) -> float:
    """``4 s Q`` of what trains, for s states per weight, plus ``4 Q`` for fp32 master weights; at stage 0 ``4 s P``, and with bfloat16
    ``4 P`` for those.

    DeepSpeed keeps separate master weights from stage 1 on, in fp32 training, too.
    """
    if not division.zero_stage:
        masters = int(division.item < _FULL)
        return _FULL * (division.states + masters) * division.local(division.trained)
    return _FULL * (division.states + 1) * division.partition(division.trained)


def gradient_bytes(division: Division) -> float:
    """Gradients of what trains: ``4 P`` at stage 0; ``b P`` at stage 1, with bfloat16 also ``4 P`` for their sums over passes;
    ``4 Q`` from stage 2 on, where each rank keeps the sums of its own part.
    """
    if not division.zero_stage:
        return _FULL * division.local(division.trained)  # each 16-bit gradient is handed over and freed
    if division.zero_stage > 1:
        return _FULL * division.partition(division.trained)
    summed = _FULL if division.item < _FULL else 0
    return (division.item + summed) * division.local(division.trained)


def bucket_bytes(division: Division) -> float:
    """The bucket of ``reduce_bucket_size`` elements in which gradients are sent, and the copy of its content that is sent.

    DeepSpeed allocates it in full, however small the model is: in fp32 at stage 1, where gradients are copied straight into it,
    and in the weights' dtype from stage 2 on. Stage 0 has only the copy.
    """
    trained = division.local(division.trained)
    if not division.zero_stage:
        return _FULL * min(_UNDIVIDED_BUCKET, trained)
    bucket = division.setting("reduce_bucket_size")
    if division.zero_stage == 1:
        return float(_FULL * bucket)
    return division.item * (bucket + min(bucket, trained))


def gathered_bytes(division: Division) -> float:
    """Other ranks' weights that ZeRO-3 holds at the same time. It keeps those that are used again soon, up to
    ``max_live_parameters``, and fetches a MoE block as a whole.
    """
    fetched = _fetched(division)
    live = float(division.setting("max_live_parameters"))
    return division.item * min(sum(fetched), max(live, *fetched)) if fetched else 0.0


def arriving_bytes(division: Division) -> float:
    """The buffer in which the largest fetch of ZeRO-3 arrives, with the ranks' parts apart, before its weights are put together."""
    return division.item * max(_fetched(division), default=0.0)


def _fetched(division: Division) -> list[float]:
    """Elements of each of the groups of weights that ZeRO-3 fetches at once."""
    fetched: dict[str, float] = {}
    for weight in division.counts.weights if division.zero_stage == 3 else ():
        if not division.persistent(weight):
            fetched[weight.fetched_with] = fetched.get(weight.fetched_with, 0.0) + division.local([weight])
    return list(fetched.values())


def activation_bytes(division: Division) -> float:
    """Activations of all layers (:func:`layer_bytes`) and of the head.

    With activation checkpointing, only every layer's input ``b T D`` and one layer's activations are counted. The head keeps
    logits and their gradient, ``2 b T V``: losses over the vocabulary are made a few positions at a time.
    """
    tokens, item = division.tokens, division.item
    each = [layer_bytes(division, layer) for layer in division.counts.layers]
    inputs = item * tokens * division.counts.hidden * len(each)
    layers = inputs + max(each) if division.recipe.activation_checkpointing else sum(each)
    return layers + 2 * item * tokens * division.counts.vocabulary


def layer_bytes(division: Division, layer: LayerCounts) -> float:
    """Activations that one decoder layer keeps for its backward pass.

    - Two norms: the normalised input and the output, and with bfloat16 the input in fp32, too.
    - Attention, whose input is a norm's output: queries, keys, values and the output, ``2 b T (queries + keys)``. One fp32 number
      per head and token is left out.
    - Norms on queries and keys: input and normalised input, ``2 b T (queries + keys)``, and with bfloat16 the input in fp32, too.
    - A dense FFN or shared experts: gate, up, the activated gate and the product, ``4 b T F``.
    - Routed experts: :func:`expert_bytes`, and the router's logits, probabilities and weights in fp32, ``12 T E``.
    """
    tokens, item, hidden = division.tokens, division.item, division.counts.hidden
    norm = 2 * item + (_FULL if item < _FULL else 0) + item
    found = 2.0 * norm * tokens * hidden
    found += 2 * item * tokens * (layer.queries + layer.keys)
    if layer.normed:
        found += (2 * item + (_FULL if item < _FULL else 0)) * tokens * (layer.queries + layer.keys)
    found += 4 * item * tokens * layer.shared
    if layer.experts:
        found += expert_bytes(division, layer) + 3 * _FULL * tokens * layer.experts
    return found


def expert_bytes(division: Division, layer: LayerCounts) -> float:
    """Activations of routed experts, by their implementation.

    - ``eager``: ``b (3 R D + 4 R I)``; ``grouped_mm`` and ``batched_mm``: ``b (2 R D + 4 R I)``.
    - upcycle's kernels keep their input, which is the norm's output and counted there, and the products of gate and up,
      ``2 b R I``; ``upcycle_lean`` keeps nothing more.
    - AutoEP, which sends rows to other ranks and back: rows that leave, rows that arrive and are sorted, the results, and what
      comes back, ``b (4 R D + 4 R I)``.
    """
    rows = division.tokens * layer.top_k
    inside = rows * layer.width
    if division.expert_parallel > 1:
        return division.item * (4 * rows * division.counts.hidden + 4 * inside)
    if division.counts.implementation in (NAME, LEAN):
        return division.item * 2 * inside if division.counts.implementation == NAME else 0
    copies = 3 if division.counts.implementation == "eager" else 2
    return division.item * (copies * rows * division.counts.hidden + 4 * inside)


def _parent_logits(division: Division) -> float:
    """What learning the parent's next tokens adds: its logits, and a gradient of its own before the two are added, ``2 b T V``.

    From a cache of the most probable tokens it is the student's logits and three things made of them in fp32, ``16 T V``.
    """
    distillation = (division.stage or division.recipe.stages[0]).distillation
    cached = distillation is not None and distillation.cache is not None
    each = 4 * _FULL if cached else division.parent_item + division.item
    return each * division.tokens * division.counts.vocabulary
