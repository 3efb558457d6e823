"""Reads and checks the description of a rotary embedding, as transformers' own functions need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upcycle.errors import CheckpointError, RefusalError
from upcycle.files.formats.folder_contents import shortened
from upcycle.files.formats.settings import FLAG, NUMBER, PART, POSITIVE, SIZE, ValueKind, check_value, is_number

_FACTORS = ValueKind(
    "a list of positive numbers", lambda v: isinstance(v, list) and all(is_number(n) and n > 0 for n in v)
)
# The keys that a description must have and may have, by its type.
_NEEDED: Mapping[str, Mapping[str, ValueKind]] = {
    "default": {},
    "linear": {"factor": POSITIVE},
    "dynamic": {"factor": POSITIVE},
    "yarn": {"factor": POSITIVE},
    "longrope": {"short_factor": _FACTORS, "long_factor": _FACTORS},
    "llama3": {"factor": POSITIVE, "low_freq_factor": POSITIVE, "high_freq_factor": POSITIVE},
}
_OPTIONAL: Mapping[str, ValueKind] = {
    "rope_theta": POSITIVE,
    "partial_rotary_factor": PART,
    "factor": POSITIVE.optional,
    "original_max_position_embeddings": SIZE,
    "attention_factor": NUMBER.optional,
    "beta_fast": NUMBER.optional,
    "beta_slow": NUMBER.optional,
    "mscale": NUMBER.optional,
    "mscale_all_dim": NUMBER.optional,
    "truncate": FLAG.optional,
    "alpha": NUMBER.optional,
}
_WITH_LENGTH = ("llama3", "yarn", "longrope")  # they switch at the length that the model was first trained with
_LENGTH = "original_max_position_embeddings"


def rope_parameters(
    raw: Mapping[str, Any],
    theta: float = 10000.0,
    partial: float | None = None,
    context: int | None = None,
    where: str = "config.json",
) -> dict[str, Any]:
    """Return the whole description, from today's ``rope_parameters`` or the older ``rope_theta`` and ``rope_scaling``.

    Theta and the rotary factor are always written out, as their defaults differ between configuration classes.

    Args:
        raw: a ``config.json``.
        theta: the class's default of theta.
        partial: the class's default of the rotary factor; None: it has none.
        context: the default of the length at which a scaling switches. That length may stand beside the description, where it
            takes precedence over one inside.
        where: the name of the configuration in messages.

    Raises:
        RefusalError: layer types have different rotary embeddings, or the type is one that no text model has.
        CheckpointError: a value is missing or invalid.
    """
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise RefusalError(f"{where}: 'rope_parameters' differ per layer type, and no target here can hold that")
    rope.setdefault("rope_theta", float(raw.get("rope_theta") or theta))
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.pop("type", None)
    factor = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    factor = partial if factor is None else factor
    if factor is not None:
        rope["partial_rotary_factor"] = factor
    _check(rope, where)
    if rope["rope_type"] in _WITH_LENGTH:
        rope[_LENGTH] = raw.get(_LENGTH) or rope.get(_LENGTH) or context
    return rope


def _check(rope: Mapping[str, Any], where: str) -> None:
    kind = rope["rope_type"]
    if kind == "mrope":
        raise RefusalError(
            f"{where}: 'rope_parameters' are those of a vision-language model (mrope)",
            hint="save its text model alone, with a config.json of that",
        )
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise CheckpointError(
            f"{where}: 'rope_type' must be one of {', '.join(_NEEDED)}, got {shortened(repr(kind))}",
            hint="correct 'rope_parameters' (or 'rope_scaling')",
        )
    for key, wanted in {**_OPTIONAL, **_NEEDED[kind]}.items():
        if key in rope:
            check_value(f"rope_parameters.{key}", rope[key], wanted, where)
        elif key in _NEEDED[kind]:
            raise CheckpointError(
                f"{where}: 'rope_parameters' of rope_type {kind} need the key '{key}'",
                hint="correct 'rope_parameters' (or 'rope_scaling')",
            )


_STOPPED = 1e30  # a period within which no position turns anything


def turned(rope: Mapping[str, Any], head: int) -> int:
    """Return how many dimensions of a head are rotated."""
    return int(head * rope.get("partial_rotary_factor", 1.0))


def partly_turned(rope: Mapping[str, Any], head: int) -> tuple[int, ...]:
    """Return the order of a head's rows in which a rotation of halves of whole heads turns the rows that a partial one turns.

    A partial rotation of r rows turns row i with row i + r/2, the whole one row i with row i + head/2. Empty where all are turned.
    """
    part = turned(rope, head)
    if part == head:
        return ()
    first, second, rest = range(part // 2), range(part // 2, part), range(part, head)
    gap = (head - part) // 2
    return (*first, *rest[:gap], *second, *rest[gap:])


def can_be_masked(rope: Mapping[str, Any], context: int) -> bool:
    """Return whether :func:`masked_rope` can describe a rotary embedding.

    A longrope for a longer context than it was trained with multiplies what it turns by a factor, unless that is given as 1; in
    whole heads, it would multiply the other dimensions, too.
    """
    if rope["rope_type"] == "longrope":
        given, longer = rope.get("attention_factor"), rope.get("factor") or context / rope[_LENGTH]
        return bool(given == 1 if given is not None else longer <= 1)
    return bool(rope["rope_type"] in ("default", "linear"))


def masked_rope(rope: Mapping[str, Any], head: int, context: int) -> dict[str, Any]:
    """Return a rotary embedding of whole heads that turns what a partial one (or one scaled by a factor) turns.

    ``longrope`` multiplies every period by a factor of its own. With theta 1 all periods are 1, so that the factors are the
    periods, to the last bit: a difference would be multiplied by the position. The periods of rows that are not turned are so
    long that no position turns them. Rows must be in the order of :func:`partly_turned`.

    Args:
        rope: a description that :func:`can_be_masked`.
        head: dimensions of a head.
        context: positions; the short and the long factors of a rope that has none are the same.
    """
    part, factor = turned(rope, head), rope["factor"] if rope["rope_type"] == "linear" else 1.0
    if part == head and factor == 1 and rope["rope_type"] != "longrope":
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    stopped = [_STOPPED] * ((head - part) // 2)
    factors = {
        key: [*_periods(rope["rope_theta"], part, factor, rope.get(key)), *stopped]
        for key in ("short_factor", "long_factor")
    }
    return {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        **factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_mscale": 1.0,
        "long_mscale": 1.0,
        _LENGTH: rope.get(_LENGTH) or context,
    }


def _periods(theta: float, part: int, factor: float, own: Sequence[float] | None) -> list[float]:
    """Return fp32 numbers whose inverses are the frequencies that stock classes compute for ``part`` dimensions.

    ``factor`` divides all frequencies, ``own`` multiplies each period.
    """
    import torch

    periods = theta ** (torch.arange(0, part, 2, dtype=torch.int64).float() / part)
    if own is not None:
        periods = torch.tensor(own, dtype=torch.float) * periods
    if factor != 1:  # frequencies are divided, which rounds twice: of neighbours, the one whose inverse is nearest
        wanted, near = 1.0 / periods / factor, 1.0 / (1.0 / periods / factor)
        tried = [near, *(torch.nextafter(near, torch.full_like(near, end)) for end in (0.0, torch.inf))]
        off = torch.stack([(1.0 / each - wanted).abs() for each in tried])
        periods = torch.stack(tried).gather(0, off.argmin(0)[None])[0]
    found: list[float] = periods.tolist()
    return found
