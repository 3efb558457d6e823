"""Cuts of layers as plain data, for ``compression.json`` and ``upcycle.json``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from upcycle.architectures.expert_terms import SHARED_FFN, BlockCut, DenseCut, FfnPart, LayerCut, Term

Cut = LayerCut | DenseCut | BlockCut


def described_cut(cut: Cut) -> dict[str, Any]:
    """Return a cut as plain data."""
    if isinstance(cut, BlockCut):
        return {"kept": cut.kept}
    if isinstance(cut, DenseCut):
        parts = [{"terms": _described(part.terms), "scale": part.scale, "rank": part.rank} for part in cut.parts]
        return {"width": cut.width, "parts": parts}
    more: dict[str, Any] = {"skip": cut.skip} if cut.skip else {}
    more |= {} if cut.scale == 1 else {"scale": cut.scale}
    more |= {"ranks": [list(pair) for pair in cut.ranks]} if cut.ranks else {}
    return {"experts": [_described(terms) for terms in cut.experts], "rows": [*cut.rows], **more}


def _described(terms: Iterable[Term]) -> list[dict[str, Any]]:
    return [
        {
            "expert": "shared" if t.expert == SHARED_FFN else t.expert,
            "weight": t.weight,
            "order": None if t.order is None else [*t.order],
            **({"ternary": True} if t.ternary else {}),
        }
        for t in terms
    ]


def cut_of(content: dict[str, Any]) -> Cut:
    """Return the cut that :func:`described_cut` described."""
    if "kept" in content:
        return BlockCut(content["kept"])
    if "parts" in content:
        parts = tuple(FfnPart(_terms(part["terms"]), part["scale"], part["rank"]) for part in content["parts"])
        return DenseCut(content["width"], parts)
    experts = tuple(_terms(terms) for terms in content["experts"])
    ranks = tuple((up, down) for up, down in content.get("ranks", ()))
    return LayerCut(experts, tuple(content["rows"]), content.get("skip", 0.0), ranks, content.get("scale", 1.0))


def _terms(described: Iterable[dict[str, Any]]) -> tuple[Term, ...]:
    return tuple(
        Term(
            SHARED_FFN if t["expert"] == "shared" else t["expert"],
            t["weight"],
            None if t["order"] is None else tuple(t["order"]),
            t.get("ternary", False),
        )
        for t in described
    )
