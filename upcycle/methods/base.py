"""The protocols of methods: the one that all share, and those of methods that make a blueprint from a dense FFN."""

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
    from upcycle.recipe.conversion_recipe import Recipe
    from upcycle.recipe.recipe_parts import SourceRecipe

SCALES = ("exact", "sum", "paper")
PREFERRED_MULTIPLE = 8
Scale = Literal["exact", "sum", "paper"]
MethodKind = Literal[
    "copies", "partition", "overlap", "pruning", "growth", "addition", "compression", "narrowing", "beside"
]


class AnyMethod(ABC):
    """Describes an entry of ``upcycle list methods``: its name, its paper, its parameters, and the source that it takes.

    Attributes:
        name: its name in recipes.
        title: its name in prose.
        paper: the paper's URL; None: there is none.
        kind: what it makes, which decides the class of the job (:data:`upcycle.conversion.jobs.JOBS`).
        takes: whether its source is a dense model or a Mixture-of-Experts.
        calibrated: whether it needs calibration text.
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
        """Return the method for these sources: itself, since it takes one source.

        Args:
            mix: the sources; None: there is one.
            recipe: the recipe, which may give each source a role.

        Raises:
            UsageError: there are several sources, or a source has a role.
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
    """Refuse roles of sources: settings for the expert that a single source becomes.

    Raises:
        UsageError: a source has a role; the message names the source and the key.
    """
    for source in sources:
        if source.role:
            raise UsageError(
                f"sources: {source.name} has '{source.role}', and {method.name} makes no expert of a single source",
                hint="leave it out, or --method branch_train_mix",
            )


class Method(AnyMethod):
    """Makes blueprints. It neither reads nor writes a file, and does not know the target.

    Attributes:
        exact_when_all_active: with top-k = all experts and equal router weights, the layer equals the dense FFN.
        exact_with_any_router: it does so with any router whose top-k weights sum to 1.
        normalized: the weights of the chosen experts are to sum to 1.
        spread: the powers of the scale that gate, up and down are multiplied by.
        draws: some weights are drawn at random.
        default_scale: the convention of the scale where the recipe names none.
        needs_gradients: the method reads ``activations.importance``. A ``calibrated`` method always gets activations.
    """

    exact_when_all_active: bool = True
    exact_with_any_router: bool = False
    normalized: bool = True
    spread: tuple[float, float, float] = DOWN_ONLY
    draws: bool = False
    default_scale: ClassVar[Scale] = "exact"
    needs_gradients: ClassVar[bool] = False

    def sizes(self, experts: int | None, top_k: int | None) -> tuple[int | None, int | None]:
        """Return the routed experts and top-k, given those of the recipe; ``None`` leaves a number to the recipe's default.

        Raises:
            UsageError: the recipe's numbers contradict the method's parameters.
        """
        return experts, top_k

    def check(self, shape: MoeShape) -> None:
        """Refuse shapes that the method cannot make; most methods make every shape that ``expert_size`` allows.

        Raises:
            UsageError: the method cannot make this shape.
        """

    def inexact(self, shape: MoeShape, scale: float) -> str | None:
        """Return why the layer differs from the dense FFN whatever the router; ``None`` where router and scale decide that."""
        if self.exact_when_all_active:
            return None
        return f"{self.name} lets experts overlap: they do not add up to the dense FFN"

    def tie(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the router's rows ``[E, d]`` as the method needs them: unchanged, unless experts form groups that share a row.

        Raises:
            UsageError: the method cannot use these rows.
        """
        return rows

    @abstractmethod
    def expert_size(self, intermediate_size: int, experts: int, shared: int, pad: bool) -> int:
        """Return the number of neurons per expert.

        Raises:
            UsageError: the dense FFN cannot be divided that way.
        """

    @abstractmethod
    def scale(self, convention: Scale, experts: int, top_k: int, shared: int = 0) -> float:
        """Return the factor on the routed experts' down projection, for a router whose top-k weights sum to 1.

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
        """Decide the neurons of every expert of one layer; the router is added afterwards.

        Args:
            ffn: the dense FFN.
            shape: the numbers and the size of the experts.
            scale: the factor on the routed experts.
            rng: the method's random numbers for this layer.
            activations: the activations of ``ffn`` on the calibration text; None: there is none.
        """


class Partition(Method):
    """Splits the FFN: every neuron belongs to exactly one expert. Subclasses group the neurons of the routed experts.

    The shared experts come first and take the neurons that matter most. The dense FFN is the unweighted sum of all
    experts, hence the conventions of the scale for routers whose weights sum to 1:

    - ``exact`` = E: the expected output of a random choice, equal to the dense FFN at K = E.
    - ``sum`` = K: the plain sum of the chosen experts, as in MoEfication (arXiv 2110.01786).
    - ``paper``: as the method's paper does; unless a subclass says otherwise, as LLaMA-MoE (arXiv 2406.16554) does: all experts
      over those that run, shared ones counted in both. That is its E/K, and the 4.0 of its script for one shared expert and 7
      routed ones, one of them chosen.
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
        """Return the expert, ``0..experts-1``, of each of ``neurons`` (int64 ``[M]``, ascending), int64 ``[M]``.

        The sizes of the groups differ by at most one, so that they are equal whenever ``experts`` divides ``M``.
        """

    def shared_neurons(
        self, count: int, ffn: FeedForward, rng: torch.Generator, activations: Activations | None
    ) -> torch.Tensor:
        """Return the neurons of the shared experts, int64 ``[count]``.

        They are those that add most to the output on the calibration text; without one, those with the largest weights.
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
        """Return ``F / (E + S)``, rounded up to a multiple of 8 when padding is allowed."""
        return piece_size(intermediate_size, experts, shared, pad)

    def scale(self, convention: Scale, experts: int, top_k: int, shared: int = 0) -> float:
        """Return ``E``, ``K`` or the paper's scale, by the convention; see the class."""
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
        """Choose the shared neurons, group the others, and pad experts with zero neurons to equal sizes."""
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
    """Return ``neurons`` (int64 ``[M]``) followed by zero neurons, int64 ``[size]``."""
    return torch.cat([neurons, neurons.new_full((size - len(neurons),), ZERO_NEURON)])


def piece_size(intermediate_size: int, experts: int, shared: int, pad: bool, what: str = "") -> int:
    """Return the neurons per expert when ``F`` is cut into ``experts + shared`` equal pieces.

    Args:
        intermediate_size: ``F``.
        experts: the number of routed experts.
        shared: the number of shared experts.
        pad: whether zero neurons may fill up the pieces, to a multiple of 8.
        what: the name of the pieces in an error; default: the numbers of experts.

    Raises:
        UsageError: ``F`` does not divide and ``pad`` is off, or an expert would get no neuron.
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
        # transformers' default for experts, grouped_mm, refuses rows that are not a multiple of 16 bytes: 8 numbers in bfloat16.
        size = -(-intermediate_size // (pieces * PREFERRED_MULTIPLE)) * PREFERRED_MULTIPLE
    if intermediate_size - shared * size < experts:
        raise UsageError(
            f"{shared} shared experts of {size} neurons leave {max(0, intermediate_size - shared * size)} of "
            f"{intermediate_size} neurons for {experts} routed experts",
            hint="choose fewer shared or fewer routed experts",
        )
    return size


def balanced_blocks(count: int, experts: int) -> torch.Tensor:
    """Return ``0..experts-1`` in runs whose lengths differ by at most one, int64 ``[count]``."""
    return torch.arange(count) * experts // count


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:12])) if numbers else "1"
