"""Changes what stock routers decide: jitter, noisy top-k, a second expert by chance, normalised logits, capacity.

T tokens, D hidden, E experts, K top-k. An exported model has none of it: it routes as its architecture does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.functional import linear, softplus

from upcycle.errors import UsageError
from upcycle.models.own.routing.standardized import normalized_logits
from upcycle.trainers.data.keyed_random import random_words
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.capacity import within_capacity
from upcycle.trainers.routing.choosing_experts import check_choosing, chosen_by_experts, keep_corrections
from upcycle.trainers.routing.cluster_dropout import check_clusters, dropped_experts, without_dropped
from upcycle.trainers.routing.dense_gradients import attach_dense_gradients, check_dense_gradients
from upcycle.trainers.routing.expert_dropout import drop_inside
from upcycle.trainers.routing.other_choices import check_choice, sampled_top_1, soft, temperature_of
from upcycle.trainers.routing.routing_rule import RoutingRule, widened
from upcycle.trainers.routing.stock_routers import MoeLayer, sampling_noise

NOISE_WEIGHT = "noise_weight"  # a parameter of routers with learned noise, [E, D]; no part of the exported model


@dataclass(frozen=True)
class Noise:
    """What was added to the logits for the choice, and its standard deviation, both ``[T, E]``."""

    added: torch.Tensor
    std: torch.Tensor


class RouterControl:
    """Hooks on routers that change their output ``(logits, weights, experts)``.

    In training alone, as published:

    - jitter: ST-MoE (arXiv 2202.08906), on the router's input only, not on the experts'. One factor per number of the
      input, common to all experts, so virtual groups (arXiv 2410.07524) stay together; noise on logits parts them.
    - learned noise: Shazeer et al. (openreview B1ckMDqlg), ``softplus(W x) + floor`` with W zero at first (the floor is
      LLaMA-MoE's). W is added to the router as ``noise_weight``: attach before the optimizer is made, leave it out of exports.
    - the second expert by chance: GShard's (arXiv 2006.16668, algorithm 1) is dispatched with probability ``min(1, 2 g)``, g its
      share of the chosen weights; DeepSpeed draws it by Gumbel noise on the logits of all but the first. With more than two
      experts per token it is so for each behind the first. Weights stay what they were, or are those of the drawn ones.
    - cluster dropout: MoEC (arXiv 2207.09094), see :mod:`upcycle.trainers.routing.cluster_dropout`. Those that are left share the
      softmax; recorded logits are all experts'. The authors' code draws the same experts in every cluster of a worker.
    - expert dropout: see :func:`upcycle.trainers.routing.expert_dropout.drop_inside`.
    - capacity: see :func:`upcycle.trainers.routing.capacity.within_capacity`. A dropped choice weighs 0, and the others are not
      renormalised (Mesh TensorFlow) unless ``renormalize`` says so (DeepSpeed). The experts still compute what was dropped:
      its absence from the output is simulated. Papers evaluate with a larger capacity (ST-MoE, DeepSpeed: 2.0): that is
      ``evaluation_capacity_factor``. Groups are rows by default, and every router's own: GShard's and ST-MoE's groups are
      tokens that lie together, DeepSpeed's and Megatron-LM's a device's pass.

    - choice: sample: BTX's Sample-Top-1, see :func:`upcycle.trainers.routing.other_choices.sampled_top_1`. Validation and the
      exported model take the most probable expert at weight 1; the paper draws there, too.
    - choice: expert_choice: see :mod:`upcycle.trainers.routing.choosing_experts`. Validation and the exported model follow the
      router that learns to predict it.
    - dense gradients: DenseMixer's, see :mod:`upcycle.trainers.routing.dense_gradients`.

    In validation, too, as the paper's model has it:

    - choice: soft: BTX's soft routing, in every layer, or in the first beside ``sample`` (``soft_first``).

    - normalised logits: Skywork-MoE (arXiv 2406.06563), by the population's standard deviation plus 1e-6 (unsourced there).
    """

    def __init__(self, parameters: ControlParameters) -> None:
        self.parameters = parameters
        self.noise: dict[int, Noise] = {}  # of the last pass, by layer
        self.kept: dict[int, torch.Tensor] = {}  # bool [T, K], likewise
        self.skipped: dict[int, torch.Tensor] = {}  # bool [T, K], likewise
        self.corrections: dict[int, torch.Tensor] = {}  # [T, E], where experts choose
        self._real: torch.Tensor | None = None
        self._keys: Sequence[object] = ()
        self.step = 0  # steps before the present one, in the stage
        self._first: int | None = None  # of the layers, by index
        self.unexported: str | None = None  # what the exported model will do otherwise
        self._handles: list[Any] = []
        self._ends: list[Callable[[], None]] = []

    def rows(self, real: torch.Tensor | None, keys: Sequence[object] = ()) -> None:
        """Describe the rows of the coming passes.

        Args:
            real: bool ``[B, S]``, false where there is padding, which takes no room. ``None``: all tokens of a pass are one
                group, and none is padding.
            keys: of each row, what its random numbers are a function of, so that they do not depend on which rank and pass
                it falls to; layers computed again draw the same. Left out: torch's generator is drawn from.
        """
        self._real, self._keys = real, keys

    def did(self, layer: int) -> tuple[Noise | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """A layer's noise in the last pass, which choices were dispatched, which ones chance held back, and its predictor's output."""
        return self.noise.get(layer), self.kept.get(layer), self.skipped.get(layer), self.corrections.get(layer)

    def attach(self, layer: MoeLayer) -> None:
        """Act on one router from now on.

        Raises:
            UsageError: the architecture cannot express normalised logits, and that was not accepted.
        """
        options, rule = self.parameters, layer.rule
        check_choosing(options, rule)
        choosing = options.choice == "expert_choice"
        if rule.varies and not choosing and options != ControlParameters():
            raise UsageError(
                "control: it changes which of a fixed number of experts a token has; these routers run as many as their logits say",
                hint="leave control out",
            )
        decides = options.noise != "none" or options.second == "sampled" or bool(options.normalize_logits)
        if decides and rule.constant is not None and sampling_noise(layer):
            raise UsageError(
                f"control: with router_jitter_noise {sampling_noise(layer):g} these routers draw experts and weigh them by themselves",
                hint="leave noise, second: sampled and normalize_logits out, or set router_jitter_noise to 0 in config.json",
            )
        weights_are_constant = rule.constant is not None or (rule.top_k == 1 and rule.normalized)
        if options.normalize_logits and rule.spread is not None:
            raise UsageError(
                f"normalize_logits: this model normalises its logits by itself, to the standard deviation {rule.spread:g}",
                hint="leave it out",
            )
        if options.normalize_logits and not options.accept_unexported and not weights_are_constant:
            raise UsageError(
                "normalize_logits: no stock architecture normalises logits, so the exported model would weigh experts differently "
                "from the trained one",
                hint="convert with --target upcycle_moe --set routing.spread=1, whose routers do so everywhere, or set "
                "accept_unexported: true",
            )
        if options.normalize_logits and not weights_are_constant:
            self.unexported = (
                "normalize_logits acts in training and validation; the exported model chooses the same experts but weighs them "
                "by logits that are not normalised: evaluate it before you use it"
            )
        if choosing:
            self._handles.append(keep_corrections(layer, self.corrections))
        if options.cluster_dropout:
            check_clusters(options, layer)
        self.unexported = check_choice(options, layer) or self.unexported
        self._first = layer.index if self._first is None else self._first
        if options.dense_gradients:
            check_dense_gradients(options, layer)
            self._handles += attach_dense_gradients(layer)
        if options.noise == "learned" and not hasattr(layer.router, NOISE_WEIGHT):
            rows = next(layer.router.parameters())
            layer.router.register_parameter(NOISE_WEIGHT, nn.Parameter(torch.zeros_like(rows)))
        if options.expert_dropout:
            self._ends.append(drop_inside(layer.experts, options.expert_dropout))
        if options.jitter:
            self._handles.append(layer.router.register_forward_pre_hook(self._jitter(layer)))
        if any(
            (
                options.noise != "none",
                options.second != "always",
                options.normalize_logits,
                options.cluster_dropout,
                options.choice != "top_k",
                options.capacity_factor,
                options.evaluation_capacity_factor,
            )
        ):
            self._handles.append(layer.router.register_forward_hook(self._hook(layer)))

    def dropped(self, experts: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """Which experts cluster dropout leaves out of the present step, bool ``[E]``, of layers with so many; none without it."""
        options = self.parameters
        if not options.cluster_dropout:
            return {}
        return {layer: dropped_experts(count, options, layer, self.step) for layer, count in experts.items()}

    def detach(self) -> None:
        """Let every router decide alone again; learned noise weights stay where they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for end in self._ends:
            end()
        self._ends.clear()

    def _jitter(self, layer: MoeLayer) -> Callable[..., Any]:
        epsilon = self.parameters.jitter

        def hook(router: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            if not router.training:
                return inputs
            hidden, *others = inputs
            flat = hidden.reshape(-1, hidden.shape[-1])
            factors = self._drawn(
                layer, "jitter", flat, lambda x, rng: x.uniform_(1 - epsilon, 1 + epsilon, generator=rng)
            )
            return (hidden * factors.view_as(hidden), *others)

        return hook

    def _drawn(self, layer: MoeLayer, what: str, like: torch.Tensor, fill: Fill) -> torch.Tensor:
        """Random numbers like ``[T, n]``, each row's a function of its key where rows have one."""
        values = torch.empty_like(like, memory_format=torch.contiguous_format)
        if not self._keys:
            return fill(values, None)
        rng = torch.Generator(values.device)
        for key, part in zip(self._keys, values.view(len(self._keys), -1, values.shape[1]), strict=True):
            fill(part, rng.manual_seed(int(random_words(1, key, layer.index, what)[0] >> 1)))
        return values

    def _hook(self, layer: MoeLayer) -> Callable[..., Any]:
        def hook(router: nn.Module, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
            for of_layers in (self.noise, self.kept, self.skipped):
                of_layers.pop(layer.index, None)
            return self._decide(layer, inputs[0], output)

        return hook

    def _decide(self, layer: MoeLayer, hidden: torch.Tensor, output: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        options, rule, training = self.parameters, layer.rule, layer.router.training
        logits, weights, experts = output
        dtype, routed = weights.dtype, widened(logits)
        noisy = training and options.noise != "none"
        if options.normalize_logits:
            routed = logits = normalized_logits(routed, options.normalize_logits)
        if noisy:
            std = self._std(layer.router, hidden.reshape(-1, hidden.shape[-1]), routed)
            noise = Noise(self._drawn(layer, "noise", std, _normal) * std, std)
            self.noise[layer.index], routed = noise, routed + noise.added
        dropping = training and options.cluster_dropout
        if dropping:
            routed = without_dropped(routed, options, layer.index, self.step)
        if options.choice == "expert_choice":
            if training:
                weights, experts = chosen_by_experts(rule, logits, self._real)
            return logits, weights.to(dtype), experts
        if options.choice == "soft" or (options.soft_first and layer.index == self._first):
            weights, experts = soft(rule, routed)
            return logits, weights.to(dtype), experts
        if options.choice == "sample" and training:
            tau = temperature_of(self.step, options.temperature_rate, options.least_temperature)
            weights, experts = sampled_top_1(routed, self._drawn(layer, "choice", routed, _exponential), tau)
            return logits, weights.to(dtype), experts
        if options.normalize_logits or noisy or dropping:
            weights, experts = rule.route(routed)
        if training and options.second == "sampled" and rule.top_k > 1:
            scores = rule.scores(routed)
            weights, experts = _sampled(
                rule, scores, weights, experts, self._drawn(layer, "second", scores, _exponential)
            )
        return logits, self._dispatched(layer, weights, experts, training).to(dtype), experts

    def _dispatched(
        self, layer: MoeLayer, weights: torch.Tensor, experts: torch.Tensor, training: bool
    ) -> torch.Tensor:
        """Weights without those of choices that chance holds back or that find no room."""
        options, rule = self.parameters, layer.rule
        factor = options.capacity_factor if training else options.evaluation_capacity_factor
        asked = kept = None
        if training and options.second == "random":
            kept = asked = _by_chance(weights.detach(), self._drawn(layer, "second", weights, _uniform))
            self.skipped[layer.index] = ~asked
        if factor:
            real = self._real
            groups = real.view(1, -1) if real is not None and options.capacity_group == "pass" else real
            kept = within_capacity(
                weights, experts, rule.experts, factor, options.min_capacity, options.drop, groups, asked
            )
            if real is not None:  # nobody reads what becomes of padding: nothing of it is dropped
                kept = kept | ~real.reshape(-1, 1)
        if kept is None:
            return weights
        self.kept[layer.index] = kept
        left = weights * kept
        return _renormalized(left, weights) if options.renormalize else left

    def _std(self, router: nn.Module, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if self.parameters.noise == "fixed":
            return torch.full_like(logits, self.parameters.noise_std or 1 / logits.shape[1])
        rows: torch.Tensor = getattr(router, NOISE_WEIGHT)
        return softplus(widened(linear(hidden.to(rows.dtype), rows))) + self.parameters.noise_floor


Fill: TypeAlias = Callable[[torch.Tensor, torch.Generator | None], torch.Tensor]  # in place; the tensor is returned


def _normal(x: torch.Tensor, rng: torch.Generator | None) -> torch.Tensor:
    return x.normal_(generator=rng)


def _uniform(x: torch.Tensor, rng: torch.Generator | None) -> torch.Tensor:
    return x.uniform_(generator=rng)


def _exponential(x: torch.Tensor, rng: torch.Generator | None) -> torch.Tensor:
    return x.exponential_(generator=rng)


def _by_chance(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Bool ``[T, K]``: a token's first choice, and every other with probability ``min(1, 2 g)``, g its share of the weights."""
    shares = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    drawn = uniform < 2 * shares
    return drawn.scatter_(1, weights.argmax(1, keepdim=True), True)


def _sampled(
    rule: RoutingRule, scores: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, exponential: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token's first expert, and K - 1 others drawn in proportion to their scores ``[T, E]``, none twice."""
    first = experts.gather(1, weights.argmax(1, keepdim=True))
    tiny = torch.finfo(scores.dtype).tiny
    gumbel = -exponential.clamp(min=tiny).log()
    preferred = scores.detach().clamp(min=tiny).log() + gumbel
    others = preferred.scatter_(1, first, -torch.inf).topk(rule.top_k - 1, dim=1).indices
    experts = torch.cat([first, others], 1)
    return rule.weigh(scores, experts), experts


def _renormalized(left: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``left`` ``[T, K]``, scaled so that each token's sum is that of ``weights`` again; 0 where nothing is left."""
    total = left.sum(1, keepdim=True)
    return left * weights.sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)
