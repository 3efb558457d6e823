"""How many experts a split has, and how wide they are, where a recipe says how much of the FFN is to run per token."""

from __future__ import annotations

import math
from collections.abc import Sequence

from upcycle.architectures.dense_config import DenseConfig
from upcycle.errors import UsageError
from upcycle.methods.base import PREFERRED_MULTIPLE, Method
from upcycle.recipe.conversion_recipe import Recipe, layer_selection

FEWEST_PIECES = 4
_ENOUGH_PIECES = 8  # fewer leave a router little to choose from
_LARGE_HIDDEN_SIZE = 1024
# Widths that matrix units and caches are made for. A narrower expert costs more to find and start than its FLOPs save.
_LARGE, _SMALL = (64, 64), (32, 16)  # the least width, and what it is a multiple of
_COUNTS = ("experts", "top_k", "shared")


def least_width(hidden_size: int) -> int:
    """Return the narrowest expert that is worth routing to, in neurons."""
    return (_LARGE if hidden_size >= _LARGE_HIDDEN_SIZE else _SMALL)[0]


def width_step(hidden_size: int) -> int:
    """Return what the width of an FFN should be a multiple of."""
    return (_LARGE if hidden_size >= _LARGE_HIDDEN_SIZE else _SMALL)[1]


def widths(intermediate_size: int, hidden_size: int) -> list[int]:
    """Return the widths that hardware has and that divide an FFN into at least four experts, ascending.

    Where none does, multiples of 8 that divide it; where none of these does either, nothing.
    """
    for least, step in (_LARGE if hidden_size >= _LARGE_HIDDEN_SIZE else _SMALL, (PREFERRED_MULTIPLE,) * 2):
        found = [w for w in range(least, intermediate_size // FEWEST_PIECES + 1, step) if intermediate_size % w == 0]
        if found:
            return found
    return []


def pieces_of(intermediate_size: int, hidden_size: int, about: int, share: float = 1.0) -> int:
    """Return the number of equal experts nearest to ``about`` whose width is among :func:`widths`.

    It is eight or more, and so many that ``share`` of them are two or more, where there is such a number. Where there is no such
    width, it is ``about`` itself, and the experts are padded.
    """
    fitting = [intermediate_size // width for width in widths(intermediate_size, hidden_size)]
    fitting = [pieces for pieces in fitting if pieces >= min(_ENOUGH_PIECES, about)] or fitting
    fitting = [pieces for pieces in fitting if round(pieces * share) >= 2] or fitting
    return min(fitting, key=lambda pieces: abs(math.log(pieces / about)), default=about)


def with_sizes(recipe: Recipe, method: Method, dense: DenseConfig, inside: Sequence[int] | None = None) -> Recipe:
    """Return the recipe with the numbers of experts that its active fraction comes to.

    Layers that stay dense are active as a whole, and count towards the fraction. ``inside`` are the layers of the part of the
    model that is converted (default: all), whose first one says how wide an FFN is.

    Raises:
        UsageError: the fraction leaves the router no choice, or the width does not divide the FFN.
    """
    if recipe.active is None:
        if recipe.width is not None:
            raise UsageError(
                "width says how wide the experts of an active fraction are", hint="--active 0.5 --width ..."
            )
        return recipe
    if method.kind == "copies":
        raise UsageError(
            f"active says how much of a split runs, and {recipe.method} copies whole FFNs",
            hint="--experts and --top-k, or --method alternating",
        )
    counted = [key for key in _COUNTS if key in recipe.model_fields_set]
    if counted:
        raise UsageError(
            f"active says how many experts there are, and so does {' and '.join(counted)}",
            hint="leave out active, or else experts, top_k and shared: with active, pieces or width say how many there are",
        )
    inside = range(dense.num_hidden_layers) if inside is None else inside
    dense, total, split = dense.at(inside[0]), len(inside), len(layer_selection(recipe.layers, len(inside)))
    share = (recipe.active * total - (total - split)) / split
    pieces = _pieces(recipe, dense, share)
    running = round(pieces * share)
    if not 2 <= running < pieces:
        raise UsageError(
            f"active {recipe.active:g} would run {max(0, running)} of {pieces} experts in each of {split} layers",
            hint="a larger active, more pieces (or a smaller width), or more layers",
        )
    shared = min(running - 1, max(1, round(recipe.always_on * running)))
    pad = recipe.pad or dense.intermediate_size % (pieces * PREFERRED_MULTIPLE) > 0
    sizes = {"experts": pieces - shared, "top_k": running - shared, "shared": shared, "pad": pad}
    return recipe.model_copy(update={**sizes, "active": None, "width": None})


def _pieces(recipe: Recipe, dense: DenseConfig, share: float) -> int:
    """Return how many experts an FFN is split into, if ``share`` of them run."""
    size, width = dense.intermediate_size, recipe.width
    if width is None:
        return pieces_of(size, dense.hidden_size, recipe.pieces, share)
    pieces = -(-size // width)
    zeros = pieces * width - size
    if pieces < FEWEST_PIECES:
        raise UsageError(
            f"experts of {width} neurons make {pieces} of an FFN of {size}", hint=_nearest(size, dense, width)
        )
    filled = -(-size // (pieces * PREFERRED_MULTIPLE)) * PREFERRED_MULTIPLE
    if recipe.pad and width % PREFERRED_MULTIPLE == 0 and filled < width:
        raise UsageError(
            f"{pieces} experts of {width} neurons are more than an FFN of {size} fills", hint=f"--width {filled}"
        )
    if (zeros or width % PREFERRED_MULTIPLE) and not recipe.pad:
        cost = f"--pad fills up the last expert with {zeros} zero neurons per layer ({zeros / size:.1%} more)"
        raise UsageError(
            f"experts of {width} neurons do not divide an FFN of {size}"
            if zeros
            else f"experts of {width} neurons are not a multiple of {PREFERRED_MULTIPLE}",
            hint=f"{_nearest(size, dense, width)}; {cost}" if zeros else _nearest(size, dense, width),
        )
    return pieces


def _nearest(size: int, dense: DenseConfig, width: int) -> str:
    """Name the widths on both sides of ``width`` that divide the FFN."""
    fitting = widths(size, dense.hidden_size)
    below = [w for w in fitting if w < width][-1:]
    above = [w for w in fitting if w > width][:1]
    named = " or ".join(f"--width {w}" for w in below + above)
    return f"the nearest that do: {named}" if named else f"no width divides {size} into four experts or more"
