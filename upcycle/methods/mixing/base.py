"""The protocol of methods that make one model of several: which models become experts, and how the rest is averaged."""

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
    from upcycle.recipe.conversion_recipe import Recipe
    from upcycle.recipe.recipe_parts import SourceRecipe

Merges = tuple[tuple[float, ...], ...]


class MixingMethod(AnyMethod):
    """Adds what only methods that mix several models need.

    Attributes:
        takes_roles: whether the recipe may give a source a role, such as a shared or a scaled expert.
        mix: the sources, once :meth:`joined` has been called.
        slerp: whether matrices of attention are interpolated on the sphere in ``rest``, instead of averaged.
    """

    takes_sources = True
    takes_roles: ClassVar[bool] = False
    mix: Mix | None = None
    slerp: bool = False

    def joined(self, mix: Mix | None, recipe: Recipe) -> Self:
        """Return a copy of the method that knows its sources.

        Args:
            mix: the sources; None: there is one.
            recipe: the recipe, which may give each source a role.

        Raises:
            UsageError: there is one source, a source has a role that the method does not take, or the method's parameters
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
        """Return the recipe's entry for every model that is mixed, in order; the generalist has none."""
        return list(sources)

    @property
    def merges(self) -> Merges | None:
        """The merges that are mixed in place of the sources: a row each with the coefficient of every source.

        None: the sources themselves are mixed.
        """
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
        """Find the coefficients of the merges.

        Args:
            checkpoint: the sources.
            recipe: the user's recipe.
            windows: the calibration tokens, ids ``[N, W]``.
            measured: keeps measurements that take long, for a run that continues.
            progress: where to report.

        Returns:
            The coefficients, and the measurements that decided them, as plain data; None: nothing is to be decided.
        """
        return None

    @property
    def rest(self) -> tuple[float, ...] | None:
        """The weights of the sources, and of the base behind them, in the mean of all tensors outside experts.

        None: those tensors are the base's.
        """
        return None

    @property
    def experts_only(self) -> bool:
        """Whether only FFNs are read from sources other than the base, so that their other tensors may differ."""
        return False

    @property
    def members(self) -> list[int]:
        """The indices of the sources whose FFN is a routed expert; the base's is their number."""
        return []

    @property
    def shared_members(self) -> list[int]:
        """The indices of the sources whose FFN is a shared expert."""
        return []

    @property
    def shared_experts(self) -> int | None:
        """The number of shared experts, where the sources decide that; None leaves it to the recipe."""
        return None

    def source_scale(self, member: int) -> float:
        """Return the factor that the recipe gives a member's expert."""
        return 1.0


def mixing(method: AnyMethod) -> MixingMethod | None:
    """Return the same method where it mixes several models, and None where it takes one."""
    return method if isinstance(method, MixingMethod) else None
