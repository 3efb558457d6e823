"""The protocols of methods: what all have in common, and those that go from a dense FFN to a blueprint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn

import torch

from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations, contributions
from upcycle.ffn.blueprint import DOWN_ONLY, ZERO_NEURON, ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.plugins import PluginParameters

if TYPE_CHECKING:
    from typing_extensions import Self

    from upcycle.checkpoints.mixed_checkpoint import Mix
    from upcycle.recipe.conversion_recipe import Recipe, SourceRecipe

SCALES = ("exact", "sum", "paper")
PREFERRED_MULTIPLE = 8
Scale = Literal["exact", "sum", "paper"]
MethodKind = Literal["copies", "partition", "overlap", "growth"]


class AnyMethod(ABC):
    """What every entry of ``upcycle list methods`` has: a name, a paper, parameters of its own, and what its source is.

    Attributes:
        name: what recipes call it.
        title: what people call it.
        paper: address of the paper; None: there is none.
        kind: what it makes, which decides the class of the job (:data:`upcycle.conversion.jobs.JOBS`).
        takes: whether its source is a dense model or a Mixture-of-Experts.
        calibrated: whether it must be given text.
        takes_sources: whether it mixes several models (:class:`upcycle.methods.mixing.base.MixingMethod`).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None]
    kind: MethodKind
    takes: ClassVar[Literal["dense", "moe"]] = "dense"
    calibrated: ClassVar[bool] = False
    takes_sources: ClassVar[bool] = False
    Parameters: ClassVar[type[PluginParameters]] = PluginParameters

    def __init__(self, parameters: PluginParameters) -> None:
        self.parameters = parameters

    def joined(self, mix: Mix | None, recipe: Recipe) -> Self:
        """Return the method as it is for these sources: itself, since it takes one.

        Args:
            mix: the sources; None: there is one.
            recipe: what it says of every source.

        Raises:
            UsageError: there are several sources, or one is given a role.
        """
        refuse_roles(self, recipe.sources)
        if mix is not None:
            refuse_sources(self, mix.count)
        return self


def refuse_sources(method: AnyMethod, count: int) -> NoReturn:
    """Refuse several sources for a method that takes one.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"{method.name} converts one source, and there are {count} sources",
        hint="--method branch_train_mix, or name one source",
    )


def refuse_roles(method: AnyMethod, sources: Sequence[SourceRecipe]) -> None:
    """Refuse whatever the recipe says of the expert that a single source becomes.

    Raises:
        UsageError: a source has a role; names the source and the key.
    """
    for source in sources:
        if source.role:
            raise UsageError(
                f"sources: {source.name} has '{source.role}', and {method.name} makes no expert of a single source",
                hint="leave it out, or --method branch_train_mix",
            )


class Method(AnyMethod):
    """Makes blueprints. Never reads or writes a file, never knows the target.

    ``exact_when_all_active`` promises that with top-k = all experts and equal router weights the layer equals the dense
    FFN; ``exact_with_any_router`` that it does with any router whose top-k weights sum to 1. ``calibrated`` methods must be
    given activations, those with ``needs_gradients`` also ``activations.importance``. ``normalized`` says that the chosen
    experts' weights are to sum to 1, ``spread`` to which powers of the scale gate, up and down are multiplied,
    ``default_scale`` which convention is taken where none is asked for, ``draws`` that weights are drawn at random.
    """

    exact_when_all_active: bool = True
    exact_with_any_router: bool = False
    normalized: bool = True
    spread: tuple[float, float, float] = DOWN_ONLY
    draws: bool = False
    default_scale: ClassVar[Scale] = "exact"
    needs_gradients: ClassVar[bool] = False

    def sizes(self, experts: int | None, top_k: int | None) -> tuple[int | None, int | None]:
        """Routed experts and top-k, given those that the recipe names; ``None`` leaves a number to the recipe's default.

        Raises:
            UsageError: the recipe's numbers contradict the method's parameters.
        """
        return experts, top_k

    def check(self, shape: MoeShape) -> None:
        """Refuse shapes that make no sense; most methods refuse none that ``expert_size`` allows."""

    def inexact(self, shape: MoeShape, scale: float) -> str | None:
        """Why the layer differs from the dense FFN however it is routed; ``None`` where the router and the scale decide."""
        if self.exact_when_all_active:
            return None
        return f"{self.name} lets experts overlap: they do not add up to the dense FFN"

    def tie(self, rows: torch.Tensor) -> torch.Tensor:
        """The router's rows ``[E, d]`` with what the method demands of them: nothing, unless experts form groups.

        Raises:
            UsageError: these rows cannot serve.
        """
        return rows

    @abstractmethod
    def expert_size(self, intermediate_size: int, experts: int, shared: int, pad: bool) -> int:
        """Neurons per expert.

        Raises:
            UsageError: the dense FFN cannot be divided that way.
        """

    @abstractmethod
    def scale(self, convention: Scale, experts: int, top_k: int, shared: int = 0) -> float:
        """Factor on the routed experts' down projection, for a router whose top-k weights sum to 1.

        Raises:
            UsageError: the convention has no meaning for this method.
        """

    @abstractmethod
    def blueprint(
        self,
        ffn: FeedForward,
        shape: MoeShape,
        scale: float,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> LayerBlueprint:
        """Decide the neurons of every expert of one layer; the router is filled in afterwards."""


class Partition(Method):
    """A splitting method: every neuron belongs to exactly one expert. Subclasses group the neurons of the routed experts.

    The shared experts come first and take the neurons that matter most. The dense FFN is the unweighted sum of all
    experts, hence the conventions for routers whose weights sum to 1: ``exact`` = E (expected output of a random choice,
    equal to the dense FFN at K = E), ``sum`` = K (plain sum of the chosen experts, as in MoEfication), ``paper`` = what
    the method's paper does, unless a subclass says otherwise that of LLaMA-MoE (arXiv 2406.16554): all experts over those
    that run, shared ones counted in both. That is its E/K, and the 4.0 of its script for 7 routed experts, one of them chosen, and one
    shared.
    """

    kind: MethodKind = "partition"

    @abstractmethod
    def labels(
        self,
        neurons: torch.Tensor,
        experts: int,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Group ``neurons`` (int64 ``[M]``, ascending) into ``experts``: int64 ``[M]`` in ``0..experts-1``.

        Group sizes differ by at most one, so they are equal whenever ``experts`` divides ``M``.
        """

    def shared_neurons(
        self, count: int, ffn: FeedForward, rng: torch.Generator, activations: Activations | None
    ) -> torch.Tensor:
        """Int64 ``[count]``: the neurons of the shared experts.

        Those that add most to the output on the calibration text; without one, those with the largest weights.
        """
        if activations is not None:
            score = contributions(activations)
        else:
            score = ffn.activated_rows.double().norm(dim=1)
            if ffn.gate is not None:
                score = score * ffn.up.double().norm(dim=1)
            score = score * ffn.down.double().norm(dim=0)
        return score.argsort(descending=True, stable=True)[:count]

    def expert_size(self, intermediate_size: int, experts: int, shared: int, pad: bool) -> int:
        """``F / (E + S)``, rounded up to a multiple of 8 when padding is allowed."""
        return piece_size(intermediate_size, experts, shared, pad)

    def scale(self, convention: Scale, experts: int, top_k: int, shared: int = 0) -> float:
        """See the class."""
        paper = (experts + shared) / (top_k + shared)
        return {"exact": float(experts), "sum": float(top_k), "paper": paper}[convention]

    def blueprint(
        self,
        ffn: FeedForward,
        shape: MoeShape,
        scale: float,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> LayerBlueprint:
        """Choose the shared neurons, group the others, and fill up with zero neurons where sizes demand it."""
        size, everyone = shape.expert_size, torch.arange(ffn.intermediate_size)
        shared: tuple[ExpertSpec, ...] = ()
        if shape.shared:
            taken = self.shared_neurons(shape.shared * size, ffn, rng, activations)
            shared = tuple(ExpertSpec(piece.sort().values) for piece in taken.split(size))
            everyone = everyone[~torch.isin(everyone, taken)]
        labels = self.labels(everyone, shape.experts, ffn, rng, activations)
        routed = tuple(ExpertSpec(filled(everyone[labels == e], size)) for e in range(shape.experts))
        return LayerBlueprint(ffn.layer, routed, shape.top_k, scale, shared)


def filled(neurons: torch.Tensor, size: int) -> torch.Tensor:
    """``neurons`` with zero neurons after them up to ``size``."""
    return torch.cat([neurons, neurons.new_full((size - len(neurons),), ZERO_NEURON)])


def piece_size(intermediate_size: int, experts: int, shared: int, pad: bool, what: str = "") -> int:
    """Neurons per expert when ``F`` is cut into ``experts + shared`` equal pieces, which an error calls ``what``.

    Raises:
        UsageError: ``F`` does not divide and ``pad`` is off, or some expert would get no neuron.
    """
    pieces = experts + shared
    size, rest = divmod(intermediate_size, pieces)
    if rest and not pad:
        padded = -(-intermediate_size // (pieces * PREFERRED_MULTIPLE)) * PREFERRED_MULTIPLE * pieces
        divisors = [n for n in range(2, 65) if intermediate_size % n == 0]
        raise UsageError(
            f"{intermediate_size} neurons do not divide into "
            + (what or f"{experts} routed + {shared} shared = {pieces} equal experts"),
            hint=f"--pad fills up to {padded} with zero neurons (exact), or choose a total of {_some(divisors)}",
        )
    if pad:
        # Whole 16-byte lines in bfloat16, or transformers' default kernel (grouped_mm) refuses the expert.
        size = -(-intermediate_size // (pieces * PREFERRED_MULTIPLE)) * PREFERRED_MULTIPLE
    if intermediate_size - shared * size < experts:
        raise UsageError(
            f"{shared} shared experts of {size} neurons leave {max(0, intermediate_size - shared * size)} of "
            f"{intermediate_size} neurons for {experts} routed experts",
            hint="choose fewer shared or fewer routed experts",
        )
    return size


def balanced_blocks(count: int, experts: int) -> torch.Tensor:
    """Int64 ``[count]``: ``0..experts-1`` in runs whose lengths differ by at most one."""
    return torch.arange(count) * experts // count


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:12])) if numbers else "1"
