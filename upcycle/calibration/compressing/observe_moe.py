"""Observes the experts of a Mixture-of-Experts on text, once for every method that compresses it.

T tokens, E experts, K per token, S sampled tokens, d the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.calibration.compressing.experts_in_files import layers_with_experts_in_files
from upcycle.calibration.compressing.moe_walk import ExpertRun, MoeWalk, Routed, expert_neurons
from upcycle.errors import CheckpointError, RefusalError
from upcycle.files.atomic_files import write_whole
from upcycle.methods.compressing.observations import (
    MOST_GRAM,
    MOST_OUTPUTS,
    MOST_STREAMS,
    STREAMS,
    Observations,
)
from upcycle.methods.compressing.observations_file import OBSERVED, ObservationsWriter
from upcycle.methods.compressing.observed_layer import LayerObservations
from upcycle.models.experts import expert_outputs
from upcycle.progress import Progress
from upcycle.trainers.routing.stock_routers import selection_bias

if TYPE_CHECKING:
    from upcycle.architectures.stored_moe import MoeModel
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint

MOST_SAMPLED = 2048  # tokens per layer on which all experts run
_SAMPLED_NUMBERS = 8_000_000  # of all products of outputs that are kept of one layer
_PERCENTILES = 101


def sampled_tokens(experts: int) -> int:
    """Return on how many tokens of a layer all its experts run."""
    return max(64, min(MOST_SAMPLED, _SAMPLED_NUMBERS // experts**2))


def gram_shape(experts: int, hidden: int) -> tuple[int, ...]:
    """Return the shape of the products of inputs that are kept of one layer."""
    for count in (experts, 1):
        if count * hidden**2 <= MOST_GRAM:
            return (count, hidden, hidden)
    return (0,)


def observe_layers(
    checkpoint: MoeCheckpoint, dtype: str, windows: torch.Tensor, text: dict[str, Any], progress: Progress, path: Path
) -> Observations:
    """Observe every layer in one pass over the text, into a file; one layer without its experts is in memory, and one expert.

    Args:
        checkpoint: the MoE.
        dtype: the dtype to round its weights to, as a recipe's ``dtype`` means it.
        windows: the text, token ids ``[N, W]``.
        text: what ``upcycle.json`` says of the text.
        progress: where to report.
        path: the file, which appears complete or not at all.

    Raises:
        RefusalError: a layer's router cannot be read.
        CheckpointError: the states are not finite, or the MoE's files changed meanwhile.
    """
    walk = MoeWalk(layers_with_experts_in_files(checkpoint, dtype), windows.shape[1])
    tensors = (len(OBSERVED) * len(walk.places)) + 1
    model = checkpoint.model
    if unread := sorted(set(model.moe_layers) - set(walk.places)):
        raise RefusalError(
            f"layer {unread[0]}: what the router of this '{model.family.name}' model does is none of the rules known here",
            hint="methods that do not observe experts take it: lower_top_k, resplit, sparse_experts, quantize",
        )
    about = Observations({}, checkpoint.fingerprint, model.top_k, text, torch.zeros(0)).about_file()

    def write(partial: Path) -> None:
        with ObservationsWriter(partial, about, tensors) as file:
            file.write(STREAMS, _observed(walk, windows, model, progress, file.write_layer))
        checkpoint.check_unchanged()

    write_whole(path, write)
    return Observations.read(path)


def _observed(
    walk: MoeWalk,
    windows: torch.Tensor,
    model: MoeModel,
    progress: Progress,
    found: Callable[[int, LayerObservations], None],
) -> torch.Tensor:
    """Walk the layers, hand on what each did, and return the cosines of the streams, fp64 ``[L + 1, L + 1]``."""
    count, hidden = len(walk.layers), model.hidden_size
    every = stream_step(windows.numel(), count, hidden)
    streams = torch.empty(count + 1, -(-windows.numel() // every), hidden)
    with progress.phase("observing experts", count):
        states = torch.empty(*windows.shape, hidden)
        for batch in walk.batches(len(windows)):
            states[batch] = walk.embed(windows[batch])
        walk.forget_embeddings()
        streams[0] = _directions(states, every)
        for index in range(count):
            with walk.loaded(index):
                sums = _Sums(walk, index, windows.numel(), model) if index in walk.places else None
                for batch in walk.batches(len(windows)):
                    after = walk.run(index, states[batch], *((sums.add, sums.add_expert) if sums else ()))
                    if sums:
                        sums.compare(after)
                    states[batch] = after
                if sums:
                    found(index, sums.result())
            if not bool(states.isfinite().all()):
                raise CheckpointError(
                    f"layer {index}: the calibration states are not finite",
                    hint="compress the checkpoint in the dtype it was trained in",
                )
            streams[index + 1] = _directions(states, every)
            progress.advance()
    flat = streams.flatten(1)
    return (flat @ flat.T).double() / streams.shape[1]


def stream_step(tokens: int, layers: int, hidden: int) -> int:
    """Return how many tokens there are to one whose stream is kept behind every layer."""
    return -(-tokens // max(64, min(MOST_SAMPLED, MOST_STREAMS // ((layers + 1) * hidden))))


def _directions(states: torch.Tensor, every: int) -> torch.Tensor:
    """Return the directions, of length 1, of every so many tokens of a stream ``[N, W, d]``: ``[s, d]``."""
    return torch.nn.functional.normalize(states.reshape(-1, states.shape[-1])[::every].float(), dim=1)


class _Sums:
    """Adds up what one layer does, batch by batch."""

    def __init__(self, walk: MoeWalk, index: int, tokens: int, model: MoeModel) -> None:
        self._walk, self._index = walk, index
        self._place, self._sigmoid, self._normalized = walk.places[index], model.sigmoid, model.normalized
        self._mixed = model.family.sparse_mixer
        count = self._place.count
        self._tokens = self._cosine = 0.0
        self._block: torch.Tensor | None = None
        zeros = torch.zeros(count, dtype=torch.float64)
        self._load, self._weight, self._score = zeros.clone(), zeros.clone(), zeros.clone()
        self._norm, self._saliency = zeros.clone(), zeros.clone()
        experts: Any = self._place.experts
        width = expert_neurons(experts)
        self._neurons = torch.zeros(count, width)
        self._neuron_gram = torch.zeros((count, width, width) if count * width**2 <= MOST_GRAM else (0,))
        self._input_gram = torch.zeros(gram_shape(count, model.hidden_size))
        self._shared, self._shared_weight = torch.zeros(0), 0.0
        self._logits_gram = torch.zeros(count, count, dtype=torch.float64)
        self._ratios: list[torch.Tensor] = []
        self._every = -(-tokens // sampled_tokens(count))  # every so many tokens one is sampled
        self._sampled: list[tuple[torch.Tensor, ...]] = []
        self._mean, self._gated = torch.zeros(0), torch.zeros(0)

    def add(self, routed: Routed) -> None:
        """Add a batch."""
        count = len(self._load)
        flat, weights = routed.experts.flatten(), routed.weights.double()
        self._block = routed.block
        self._load += torch.bincount(flat, minlength=count)
        self._weight.index_add_(0, flat, weights.flatten())
        self._score += self._shares(routed.logits.double()).sum(0)
        self._logits_gram += (routed.logits.T @ routed.logits).double()
        if weights.shape[1] > 1:
            two = weights.topk(2, dim=1).values
            self._ratios.append((two[:, 1] / two[:, 0].clamp(min=1e-30)).float())
        if routed.shared is not None:
            squares = (routed.shared_weight * routed.shared).square().sum(0)
            self._shared = squares if not self._shared.numel() else self._shared + squares
            self._shared_weight += routed.shared_weight.double().sum().item()
        if len(self._input_gram) == 1 < len(self._load):
            self._input_gram[0] += routed.x.T @ routed.x
        self._sample(routed)
        self._tokens += len(routed.x)

    def _shares(self, logits: torch.Tensor) -> torch.Tensor:
        """Return every expert's share of the router's scores."""
        scores = logits.sigmoid() if self._sigmoid else logits.softmax(-1)
        return scores / scores.sum(-1, keepdim=True)

    def add_expert(self, run: ExpertRun) -> None:
        """Add what a chosen expert did."""
        expert, norms = run.expert, run.output.double().norm(dim=1)
        if len(self._input_gram) == len(self._load):
            self._input_gram[expert] += run.x.T @ run.x
        active = run.weights[:, None] * run.active
        self._neurons[expert] += active.square().sum(0)
        if self._neuron_gram.numel():
            self._neuron_gram[expert] += active.T @ active
        self._norm[expert] += norms.sum()
        self._saliency[expert] += (norms * run.weights.double()).sum()

    def _sample(self, routed: Routed) -> None:
        first = -int(self._tokens) % self._every
        taken = torch.arange(first, len(routed.x), self._every)
        at_once = max(1, MOST_OUTPUTS // (len(self._load) * routed.x.shape[1]))
        for some in taken.split(at_once) if len(taken) else ():
            outputs = torch.empty(len(some), len(self._load), routed.x.shape[1])  # [s, E, d]
            for expert, made in enumerate(expert_outputs(self._place.experts, routed.x[some])):
                outputs[:, expert] = made
            self._add_sample(routed, some, outputs)

    def _add_sample(self, routed: Routed, taken: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add tokens on which all experts ran."""
        weights = torch.zeros(len(taken), len(self._load)).scatter_(1, routed.experts[taken], routed.weights[taken])
        self._sampled.append((routed.logits[taken], weights, outputs @ outputs.mT, routed.x[taken].float()))
        if not self._mean.numel():
            self._mean, self._gated = (torch.zeros(outputs.shape[1:], dtype=torch.float64) for _ in range(2))
        shares = self._shares(routed.logits[taken].double())
        for expert in range(len(self._load)):  # in fp64, of one expert at a time
            own = outputs[:, expert].double()
            self._mean[expert] += own.sum(0)
            self._gated[expert] += shares[:, expert] @ own

    def compare(self, after: torch.Tensor) -> None:
        """Add the cosine of the stream before and behind the experts, given the layer's output ``[n, W, d]``."""
        assert self._block is not None
        out = after.reshape(-1, after.shape[-1])
        before = out - self._walk.added(self._index, self._block)
        self._cosine += torch.nn.functional.cosine_similarity(before, out, dim=1).double().sum().item()

    def result(self) -> LayerObservations:
        """Return what was observed."""
        ratios = torch.zeros(_PERCENTILES, dtype=torch.float64)
        if self._ratios:
            steps = torch.linspace(0, 1, _PERCENTILES, dtype=torch.float64)
            ordered = torch.cat(self._ratios).double().sort().values
            ratios = ordered[(steps * (len(ordered) - 1)).round().long()]
        bias = selection_bias(self._place.block, self._place.router)
        logits, weights, grams, inputs = (torch.cat(parts) for parts in zip(*self._sampled, strict=True))
        return LayerObservations(
            tokens=torch.tensor([self._tokens], dtype=torch.float64),
            load=self._load,
            weight=self._weight,
            score=self._score,
            norm=self._norm,
            saliency=self._saliency,
            logits_gram=self._logits_gram,
            ratios=ratios,
            similarity=torch.tensor([self._cosine / self._tokens], dtype=torch.float64),
            bias=torch.zeros(len(self._load)).double() if bias is None else bias.detach().double().flatten().clone(),
            factor=torch.tensor([self._factor(logits.double(), weights.double())]).double(),
            neurons=self._neurons,
            neuron_gram=self._neuron_gram,
            input_gram=self._input_gram,
            shared=self._shared,
            shared_weight=torch.tensor([self._shared_weight], dtype=torch.float64),
            sample_logits=logits,
            sample_weights=weights,
            sample_gram=grams,
            sample_inputs=inputs,
            mean_output=self._mean / len(logits),
            gated_output=self._gated / len(logits),
        )

    def _factor(self, logits: torch.Tensor, weights: torch.Tensor) -> float:
        """Return what multiplies the weights, read off those of the sampled tokens."""
        if self._mixed:  # its weights are no multiples of scores
            return 1.0
        if self._normalized:
            return round(float(weights.sum(1).mean()), 5)
        scores = logits.sigmoid() if self._sigmoid else logits.softmax(-1)
        return round(float(weights.sum() / scores[weights != 0].sum()), 5)
