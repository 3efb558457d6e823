"""What all calibrated routers do with their rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.router_capture import captured
from upcycle.registry import load
from upcycle.routers.calibrated.base import settled

CASES = [
    ("centroid", {}),
    ("centroid", {"of": "inputs"}),
    ("ridge", {}),
    *(("ridge", {"target": target}) for target in ("energy", "output_norm", "one_hot")),
    ("representative", {}),
    ("representative", {"nearest": "l1", "k_act": 3}),
    ("distilled", {}),
    ("distilled", {"by_norm": False, "epochs": 0}),
]


def made(name: str, parameters: dict[str, Any]) -> Any:
    cls = load("router", name)
    return cls(cls.Parameters(**parameters))


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(8)


@pytest.mark.parametrize(("name", "parameters"), CASES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_new_tokens_find_their_experts(planted: Any, name: str, parameters: dict[str, Any], top_k: int) -> None:
    blueprint = replace(planted.blueprint, top_k=top_k)
    rows = made(name, parameters).rows(blueprint, planted.ffn, rng(), planted.activations())
    found = captured(planted.activations(seed=6), blueprint, rows)
    assert found.random < 0.6
    assert found.captured > 0.9


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_zero_activations_and_single_tokens(planted: Any, name: str, parameters: dict[str, Any]) -> None:
    router = made(name, parameters)
    for x in (torch.zeros(64, 24), planted.tokens(4, 0), planted.tokens(1, 0)):
        if name == "centroid" and len(x) < 4 and router.calibrated:
            with pytest.raises(UsageError, match="fewer than 4 calibration tokens"):
                router.rows(planted.blueprint, planted.ffn, rng(), Activations.of(planted.ffn, x))
            continue
        rows = router.rows(planted.blueprint, planted.ffn, rng(), Activations.of(planted.ffn, x))
        assert torch.isfinite(rows).all()
        assert len(rows.unique(dim=0)) > 1


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_the_text_is_asked_for(planted: Any, name: str, parameters: dict[str, Any]) -> None:
    router = made(name, parameters)
    assert router.calibrated is (parameters != {} or name != "centroid")
    if router.calibrated:
        with pytest.raises(UsageError, match=f"the {name} router needs calibration text") as caught:
            router.rows(planted.blueprint, planted.ffn, rng())
        assert "--calibration demo" in str(caught.value.hint)


def test_rows_are_as_long_as_the_tolerance_allows_however_short_they_were(planted: Any) -> None:
    given = torch.randn(4, 24, generator=rng())
    first, short, shifted = (
        settled(rows, planted.blueprint, planted.ffn, rng(), 0.01) for rows in (given, given * 1e-12, given + 7)
    )
    torch.testing.assert_close(short, first)
    torch.testing.assert_close(shifted, first, rtol=1e-4, atol=1e-8)
    spread = torch.cdist(first * planted.ffn.norm, first * planted.ffn.norm).max().item() * 24**0.5
    assert spread == pytest.approx(0.98 * 0.00995, rel=1e-3)
    x = planted.tokens(50, 1)
    chosen, wanted = ((x.double() @ rows.double().T).topk(2, dim=1).indices for rows in (first, given))
    assert torch.equal(chosen, wanted)


def test_experts_that_are_the_same_get_random_rows(planted: Any) -> None:
    copies = replace(planted.blueprint, routed=planted.blueprint.routed[:1] * 4)
    rows = made("ridge", {}).rows(copies, planted.ffn, rng(), planted.activations())
    assert len(rows.unique(dim=0)) == 4
