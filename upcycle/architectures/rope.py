"""Reads and checks the description of a rotary embedding, as transformers' own functions need it."""

from __future__ import annotations

from collections.abc import Mapping
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


def can_be_whole(rope: Mapping[str, Any], context: int) -> bool:
    """Return whether :func:`whole_head_rope` can describe a rotary embedding.

    A longrope for a longer context than it was trained with multiplies what it turns by a factor, unless that is given as 1; in
    whole heads, it would multiply the other dimensions, too.
    """
    if rope["rope_type"] == "longrope":
        given, longer = rope.get("attention_factor"), rope.get("factor") or context / rope[_LENGTH]
        return given == 1 if given is not None else longer <= 1
    return bool(rope["rope_type"] == "default")


def whole_head_rope(rope: Mapping[str, Any], head: int, rotated: int, context: int) -> dict[str, Any]:
    """Return a rotary embedding of whole heads that turns ``rotated`` of their dimensions as ``rope`` does, and no others.

    It is a longrope with theta 1, so that its factors are the wavelengths themselves. transformers computes a frequency as
    ``1 / (factor * theta ** exponent)`` in fp32: with the same fp32 numbers as factors, frequencies are equal to the last bit.
    The other dimensions have a factor of 1e30, which turns them by less than 1e-24 anywhere. Rows of queries and keys must be put
    :func:`~upcycle.architectures.tensor_origin.apart`.

    Args:
        rope: a description that :func:`can_be_whole`.
        head: dimensions of a head.
        rotated: those that are turned.
        context: the model's longest input, to which a default rope does not change.
    """
    import torch

    wavelengths = rope["rope_theta"] ** (torch.arange(0, rotated, 2, dtype=torch.float) / rotated)
    stopped = [1e30] * ((head - rotated) // 2)
    factors = {
        key: [*(torch.tensor(rope.get(key, 1.0), dtype=torch.float) * wavelengths).tolist(), *stopped]
        for key in ("short_factor", "long_factor")
    }
    kept = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    if rope["rope_type"] == "default":
        kept |= {"attention_factor": 1.0, _LENGTH: context}
    return {**kept, "rope_type": "longrope", "rope_theta": 1.0, **factors}


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


def masked_rope(rope: Mapping[str, Any], head: int, context: int) -> dict[str, Any]:
    """Return a rotary embedding of whole heads that turns what a partial one (or one scaled by a factor) turns.

    ``longrope`` multiplies every period by a factor of its own. With theta 1 all periods are 1, so that the factors are the
    periods, to the last bit: a difference would be multiplied by the position. The periods of rows that are not turned are so
    long that no position turns them. Rows must be in the order of :func:`partly_turned`.

    Args:
        rope: a description of type ``default`` or ``linear``.
        head: dimensions of a head.
        context: positions; the short and the long factors are the same.
    """
    part, factor = turned(rope, head), rope["factor"] if rope["rope_type"] == "linear" else 1.0
    if part == head and factor == 1:
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    periods = [*_periods(rope["rope_theta"], part, factor), *[_STOPPED] * ((head - part) // 2)]
    return {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "short_factor": periods,
        "long_factor": periods,
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_mscale": 1.0,
        "long_mscale": 1.0,
        "original_max_position_embeddings": context,
    }


def _periods(theta: float, part: int, factor: float) -> list[float]:
    """Return fp32 numbers whose inverses are the frequencies that stock classes compute for ``part`` dimensions."""
    import torch

    periods = theta ** (torch.arange(0, part, 2, dtype=torch.int64).float() / part)
    if factor != 1:  # frequencies are divided, which rounds twice: of neighbours, the one whose inverse is nearest
        wanted, near = 1.0 / periods / factor, 1.0 / (1.0 / periods / factor)
        tried = [near, *(torch.nextafter(near, torch.full_like(near, end)) for end in (0.0, torch.inf))]
        off = torch.stack([(1.0 / each - wanted).abs() for each in tried])
        periods = torch.stack(tried).gather(0, off.argmin(0)[None])[0]
    found: list[float] = periods.tolist()
    return found
