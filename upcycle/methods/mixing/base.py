"""The protocol of methods that make one model of several: which of them become experts, and how the rest is averaged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle.checkpoints.mixed_checkpoint import Mix
from upcycle.methods.base import AnyMethod, refuse_roles

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint
    from upcycle.files.measured import MeasurementCache
    from upcycle.progress import Progress
    from upcycle.recipe.conversion_recipe import Recipe, SourceRecipe

Merges = tuple[tuple[float, ...], ...]


class MixingMethod(AnyMethod):
    """What only methods need that mix several models.

    Attributes:
        takes_roles: whether the recipe may ask for another expert of a source than its FFN, routed.
        mix: the sources, once :meth:`joined` was called.
        slerp: whether in ``rest`` matrices of attention are interpolated on the sphere instead of averaged.
    """

    takes_sources = True
    takes_roles: ClassVar[bool] = False
    mix: Mix | None = None
    slerp: bool = False

    def joined(self, mix: Mix | None, recipe: Recipe) -> Self:
        """Return a copy of the method that knows its sources.

        Args:
            mix: the sources; None: there is one.
            recipe: what it says of every source.

        Raises:
            UsageError: there is one source, a source has a role that the method has no use for, or the method's parameters
                do not fit the sources.
        """
        if not self.takes_roles:
            refuse_roles(self, recipe.sources)
        method = copy(self)
        method.join(mix and replace(mix, recipes=tuple(self.source_recipes(recipe.sources))))
        return method

    @abstractmethod
    def join(self, mix: Mix | None) -> None:
        """Take over the sources, in the copy that :meth:`joined` returns.

        Raises:
            UsageError: see :meth:`joined`.
        """

    def source_recipes(self, sources: Sequence[SourceRecipe]) -> list[SourceRecipe]:
        """Return what the recipe says of every model that is mixed, in order; of the generalist it says nothing."""
        return list(sources)

    @property
    def merges(self) -> Merges | None:
        """The models that are mixed in place of the sources, a row each with the part of every source; None: the sources."""
        return None

    def undecided(self, recipe: Recipe) -> bool:
        """Return whether the parameter ``coefficients`` is still to be found, from the weights and the calibration text."""
        return False

    def decide(
        self,
        checkpoint: MixedCheckpoint,
        recipe: Recipe,
        windows: torch.Tensor,
        measured: MeasurementCache,
        progress: Progress,
    ) -> tuple[list[Any], dict[str, Any]] | None:
        """Find the coefficients, and return them with what they were decided by, as plain data; None: nothing is to be decided.

        Args:
            checkpoint: the sources.
            recipe: as it was given.
            windows: the calibration tokens, ids ``[N, W]``.
            measured: keeps what takes long to measure.
            progress: where to report.
        """
        return None

    @property
    def rest(self) -> tuple[float, ...] | None:
        """Weights of the sources (and the base behind them) in the mean of all that is no expert; None: the base's."""
        return None

    @property
    def experts_only(self) -> bool:
        """Whether of sources that are not the base only FFNs are read: whatever else differs does not matter then."""
        return False

    @property
    def members(self) -> list[int]:
        """The sources whose FFN is a routed expert, as indices (their number for the base)."""
        return []

    @property
    def shared_members(self) -> list[int]:
        """The sources whose FFN is a shared expert, as indices."""
        return []

    @property
    def shared_experts(self) -> int | None:
        """How many shared experts there are, where the sources decide that; None leaves it to the recipe."""
        return None

    def source_scale(self, member: int) -> float:
        """Return what the recipe multiplies a member's expert by."""
        return 1.0


def mixing(method: AnyMethod) -> MixingMethod | None:
    """Return the same method where it mixes several models, and None where it takes one."""
    return method if isinstance(method, MixingMethod) else None
