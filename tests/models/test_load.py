"""Loading a model: for use and for training, checked against memory, with torch's code paths chosen first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from upcycle.errors import EnvironmentFault
from upcycle.models import load
from upcycle.models.first_calls import settle_code_paths
from upcycle.models.load import load_model

Pico = Callable[[str], Path]


def test_for_use_and_for_training(pico_moe: Pico) -> None:
    used, trained = load_model(str(pico_moe("mixtral"))), load_model(pico_moe("mixtral"), experts=None, training=True)
    assert not used.training
    assert used.config._experts_implementation == "eager"
    assert used.config.use_cache
    assert trained.training
    assert not trained.config.use_cache
    assert trained.config._experts_implementation != "eager"


def test_what_does_not_fit_is_refused_before_it_is_read(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "available_memory", lambda: 1000)
    with pytest.raises(EnvironmentFault, match=r"needs about 0 GB, and 0 GB are available"):
        load_model(str(pico("llama")))
    assert load_model(pico("llama"), training=True).training  # a run's forecast looks at all ranks together


def test_code_paths_are_chosen_on_one_element_before_a_model_runs(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    own = torch.cos
    monkeypatch.setattr(torch, "cos", lambda x: (seen.append(x.numel()), own(x))[1])
    settle_code_paths.cache_clear()
    load_model(str(pico("llama")))
    assert seen[0] == 1
    seen.clear()
    load_model(str(pico("llama")))
    assert 1 not in seen
