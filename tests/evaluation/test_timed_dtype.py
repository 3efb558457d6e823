"""The dtype that models are timed in: the stored one where it is what a user would run, for everything that measures time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import upcycle
from upcycle.errors import UsageError
from upcycle.evaluation import compare_times, speed
from upcycle.evaluation.compressing import cut_times
from upcycle.evaluation.compressing.compare_compressions import compare_compressions
from upcycle.evaluation.shape_speed import OWN, STOCK, Times
from upcycle.evaluation.speed_worker import TimedModel
from upcycle.evaluation.timed_dtype import timed_dtype
from upcycle.kernels.cpu import products

SMALL = {"calibration_tokens": 1024, "tokens": 256, "window": 64}
BF16 = {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("wanted", "config", "device", "native", "expected"),
    [
        ("auto", BF16, "cpu", True, torch.bfloat16),
        ("auto", BF16, "cpu", False, torch.float32),
        ("auto", BF16, "cuda", False, torch.bfloat16),
        ("auto", {"torch_dtype": "bfloat16"}, "cpu", True, torch.bfloat16),
        ("auto", {"text_config": BF16}, "cpu", True, torch.bfloat16),
        ("auto", {"dtype": None, "text_config": BF16}, "cpu", True, torch.bfloat16),
        ("auto", {}, "cpu", True, torch.float32),
        ("auto", {"dtype": "float32"}, "cuda", True, torch.float32),
        ("bfloat16", {"dtype": "float32"}, "cpu", False, torch.bfloat16),
        ("float32", BF16, "cpu", True, torch.float32),
    ],
)
def test_what_is_stored_is_timed_where_it_is_multiplied(
    wanted: str,
    config: dict[str, Any],
    device: str,
    native: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "fast_natively", lambda _: native)
    assert timed_dtype(wanted, config, device) == expected


def test_bad_input(pico: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no dtype 'bf16' to time"):
        upcycle.compare(str(pico("llama")), methods=["random_split"], dtype="bf16")
    with pytest.raises(UsageError, match="--dtype says what --speed computes in"):
        upcycle.evaluate(str(pico("llama")), dtype="bfloat16")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"model\.gguf is a file, which is read in float32"):
        speed.measure_speed(str(pico("llama")), str(file), dtype="bfloat16")


def test_both_models_of_a_pair_are_timed_in_the_same(
    pico: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reference is stored in; and a process computes in what it is told."""
    told: list[tuple[str, str]] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name, self.process = name, self

        def start(self, _: list[int], __: int, dtype: str) -> dict[str, Any]:
            told.append((self.name, dtype))
            return {"device": "cpu", "instructions": None, "dtype": dtype, "threads": 1, "experts": None}

        def run(self) -> dict[str, float]:
            return {"prefill": 1.0, "decode": 1.0, "peak": 1.0}

        def kill(self) -> None:
            """As a process does."""

        communicate = kill

    monkeypatch.setattr(speed, "_Worker", Fake)
    monkeypatch.setattr(products, "fast_natively", lambda _: True)
    half, full = str(pico("gemma-bfloat16")), str(pico("llama"))
    for names, dtype in (((half, full), "bfloat16"), ((full, half), "float32")):
        told.clear()
        assert speed.measure_speed(*names, prompt=4, generate=2, rounds=1).dtype == dtype
        assert told == [(name, dtype) for name in names]
    assert TimedModel(full, [5, 6, 7], 2, torch.bfloat16).about()["dtype"] == "bfloat16"


def test_comparisons_time_every_shape_in_it(
    pico: Callable[[str], Path], pico_moe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []

    def clock(_: Any, shapes: dict[str, Any], *__: Any, dtype: torch.dtype, **___: Any) -> Any:
        asked.append(dtype)
        return Times(1.0, 1.0), {(name, how): Times(1.0, 1.0) for name in shapes for how in (STOCK, OWN)}

    monkeypatch.setattr(compare_times, "relative_times", clock)
    assert cut_times.time_beside is compare_times.time_beside
    told = {"methods": ["random_split"], "routers": ["cool"], "active": [0.5], "pieces": 8}
    found = upcycle.compare(str(pico("llama")), dtype="bfloat16", **told, **SMALL)
    assert found.timing is not None
    assert found.timing["dtype"] == "bfloat16"
    cuts = compare_compressions(
        str(pico_moe("mixtral")), compress=["lower_top_k"], keep=[0.5], dtype="bfloat16", **SMALL
    )
    assert cuts.timing is not None
    assert cuts.timing["dtype"] == "bfloat16"
    assert asked == [torch.bfloat16] * 2
