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
_UNDIVIDED_BUCKET = 500_000_000  # elements that DeepSpeed adds up at once without ZeRO


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes on one rank's device; ``host`` is what offloading moves to the host. All are estimates.

    ``buffers`` are DeepSpeed's: :func:`bucket_bytes` and :func:`gathered_bytes`.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    parent: float
    host: float

    @property
    def total(self) -> float:
        """On the device."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.parent

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "total": self.total}


def forecast_memory(division: Division, parent: ModelCounts | None, stage_recipe: Any) -> MemoryForecast:
    """What a rank holds when the last gradients of a step are there, with all activations of a pass beside it.

    Args:
        division: the run.
        parent: the dense model that is distilled from, if any: whole on every rank.
        stage_recipe: the stage of the recipe.
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
    dtype = stage_recipe.distillation.dtype if stage_recipe.distillation else "auto"
    size = _FULL if dtype == "float32" or (dtype == "auto" and division.item == _FULL) else 2
    return MemoryForecast(
        weights=weights,
        gradients=gradients,
        optimizer=states,
        buffers=bucket_bytes(division) + gathered_bytes(division),
        activations=activation_bytes(division) + (_parent_logits(division, size) if parent else 0.0),
        parent=size * parent.elements if parent else 0.0,
        host=host,
    )


def weight_bytes(division: Division) -> float:
    """``b P`` below stage 3. There ``b Q``, and whole what is small (``param_persistence_threshold``) and on several ranks."""
    everything = division.counts.weights
    if division.zero_stage < 3:
        return division.item * division.local(everything)
    small = [weight for weight in everything if division.persistent(weight) and division.holders(weight) > 1]
    return division.item * (division.partition(everything) + division.local(small))


def optimizer_bytes(division: Division) -> float:
    """``4 s Q`` of what trains, for s states per weight, and ``4 Q`` for fp32 masters, which DeepSpeed keeps apart in fp32
    training, too; at stage 0, where there are none, ``4 s P``.
    """
    if not division.zero_stage:
        return _FULL * division.states * division.local(division.trained)
    return _FULL * (division.states + 1) * division.partition(division.trained)


def gradient_bytes(division: Division) -> float:
    """Of what trains: ``4 P`` at stage 0; at stage 1 ``b P``, with bfloat16 also their sums over passes, ``4 P``; from
    stage 2 on ``4 Q``, as each rank keeps the sums of its own part.
    """
    if division.zero_stage > 1:
        return _FULL * division.partition(division.trained)
    summed = _FULL if division.item < _FULL else 0
    return (division.item + summed) * division.local(division.trained)


def bucket_bytes(division: Division) -> float:
    """The bucket of ``reduce_bucket_size`` elements in which gradients travel, and the copy of its content that is sent.

    DeepSpeed takes it whatever the model's size is, in fp32 at stage 1, where gradients move into it as they are copied, and
    in the weights' dtype from stage 2 on. Stage 0 only copies.
    """
    trained = division.local(division.trained)
    if not division.zero_stage:
        return _FULL * min(_UNDIVIDED_BUCKET, trained)
    bucket = division.setting("reduce_bucket_size")
    if division.zero_stage == 1:
        return float(_FULL * bucket)
    return division.item * (bucket + min(bucket, trained))


def gathered_bytes(division: Division) -> float:
    """Weights of others that ZeRO-3 has gathered at once: it lets go of none that is used again soon, up to
    ``max_live_parameters``, and fetches a MoE block as a whole.
    """
    if division.zero_stage < 3:
        return 0.0
    fetched: dict[str, float] = {}
    for weight in division.counts.weights:
        if not division.persistent(weight):
            fetched[weight.fetched_with] = fetched.get(weight.fetched_with, 0.0) + division.local([weight])
    largest = max(fetched.values(), default=0.0)
    return division.item * min(sum(fetched.values()), max(float(division.setting("max_live_parameters")), largest))


def activation_bytes(division: Division) -> float:
    """All layers' (:func:`layer_bytes`), or with activation checkpointing every layer's input ``b T D`` and one layer's
    beside it; and of the head: logits, their fp32 copy in bfloat16 training, the log-probabilities and the gradient of each,
    ``(2 b + 8) T V``, or ``(b + 8) T V`` in fp32.
    """
    tokens, item = division.tokens, division.item
    each = [layer_bytes(division, layer) for layer in division.counts.layers]
    inputs = item * tokens * division.counts.hidden * len(each)
    layers = inputs + max(each) if division.recipe.activation_checkpointing else sum(each)
    copies = 2 * item + 2 * _FULL if item < _FULL else item + 2 * _FULL
    return layers + copies * tokens * division.counts.vocabulary


def layer_bytes(division: Division, layer: LayerCounts) -> float:
    """What one decoder layer keeps for its backward pass.

    - two norms: in fp32 the normalised input and the output ``2 b T D`` each, in bfloat16 the fp32 input besides;
    - attention: its input is the norm's output; queries, keys and values as they are multiplied, the output, and one fp32
      number per head and token that is left out here: ``2 b T (queries + keys)``;
    - norms on queries and keys: input and normalised input, ``2 b T (queries + keys)``, the input of bfloat16 in fp32;
    - a dense FFN or shared experts: gate, up, the activated gate and the product, ``4 b T F``;
    - routed experts: :func:`expert_bytes`, and the router's logits, probabilities and weights in fp32, ``12 T E``.
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
    """Routed experts, by their implementation: ``b (3 R D + 4 R I)`` for ``eager``, ``b (2 R D + 4 R I)`` for
    ``grouped_mm`` and ``batched_mm``. Our kernels keep x, which is the norm's output and counted there, and z, ``2 b R I``
    (``upcycle_lean``: nothing). AutoEP sends rows away and back: those that leave, those that arrive and are sorted, the
    results and what comes back, ``b (4 R D + 4 R I)``.
    """
    rows = division.tokens * layer.top_k
    inside = rows * layer.width
    if division.expert_parallel > 1:
        return division.item * (4 * rows * division.counts.hidden + 4 * inside)
    if division.counts.implementation in (NAME, LEAN):
        return division.item * 2 * inside if division.counts.implementation == NAME else 0
    copies = 3 if division.counts.implementation == "eager" else 2
    return division.item * (copies * rows * division.counts.hidden + 4 * inside)


def _parent_logits(division: Division, size: int) -> float:
    """The parent's logits, and both models' log-probabilities and what is made of them in fp32: ``(b + 16) T V``."""
    return (size + 4 * _FULL) * division.tokens * division.counts.vocabulary
