"""What is fitted to measured times: the committed numbers again, and exactly what made a table that was made up."""

from __future__ import annotations

import random
from typing import Any

import pytest

from upcycle.evaluation import shape_speed
from upcycle.planning.speed.fit import errors, fit, left_out, refitted
from upcycle.planning.speed.table import TABLES, committed, measurements
from upcycle.planning.speed.work import HOWS, PROMPT_READ, TIMED_PARTS, BlockShape, ModelShape, milliseconds, work


def made_up(seed: int = 0) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The committed table with times that follow from drawn coefficients, and these."""
    draw = random.Random(seed)
    truth: dict[str, dict[str, float]] = {part: {} for part in TIMED_PARTS}
    sizes = [{**size, "models": [dict(row) for row in size["models"]]} for size in committed()["sizes"]]
    every = iter(list(measurements({"sizes": sizes})))
    for size in sizes:
        for row in size["models"]:
            for how in ("dense", *HOWS):
                if how not in row:
                    continue
                shape = next(every).shape
                for part in TIMED_PARTS:
                    for name in work(shape, part, how):
                        truth[part].setdefault(name, draw.uniform(0.5, 2.0))
                row[how] = [milliseconds(truth[part], shape, part, how) for part in TIMED_PARTS]
    return {"sizes": sizes}, truth


@pytest.mark.parametrize("dtype", TABLES)
def test_fitting_the_committed_times_gives_the_committed_numbers(dtype: str) -> None:
    table = committed(dtype)
    again = refitted(table)
    for each in measurements(table):
        for part in TIMED_PARTS:
            said = milliseconds(table["milliseconds"][part], each.shape, part, each.how)
            assert said == pytest.approx(
                milliseconds(again["milliseconds"][part], each.shape, part, each.how), rel=5e-3
            )
    for kind, off in table["errors"].items():
        assert again["errors"][kind] == pytest.approx(off, abs=5e-3)


def test_times_that_follow_the_model_are_predicted_without_having_been_seen() -> None:
    table, truth = made_up()
    every = list(measurements(table))
    for part in TIMED_PARTS:
        found = fit(every, part)
        assert set(found) == set(truth[part])
        for each in every:
            assert milliseconds(found, each.shape, part, each.how) == pytest.approx(each.milliseconds[part], rel=1e-2)
    for off in errors(left_out(table)).values():
        assert off["worst"] < 0.02


def test_an_error_is_one_of_ratios_to_the_dense_parent() -> None:
    """All times twice as long change no ratio; the sparse ones alone twice as long change every one."""
    table, _ = made_up()
    left = left_out(table)
    ratios = [each.ratio for each in left]
    assert len(left) == sum(each.sparse for each in measurements(table)) * len(TIMED_PARTS)
    for size in table["sizes"]:
        for row in size["models"]:
            row.update({how: [2 * time for time in row[how]] for how in HOWS if how in row})
    assert [each.ratio / 2 for each in left_out(table)] == pytest.approx(ratios)


@pytest.mark.parametrize("dtype", TABLES)
def test_what_is_committed_is_small_and_says_what_it_was_measured_on(dtype: str) -> None:
    assert all(value >= 0 for fitted in committed(dtype)["milliseconds"].values() for value in fitted.values())
    assert TABLES[dtype].stat().st_size < 50_000
    about = committed(dtype)["about"]
    assert (about["device"], about["threads"], about["dtype"]) == ("cpu", 1, dtype)
    assert about["instructions"] in ("AVX2", "AVX512", "DEFAULT", "AVX512 and AMX")
    assert (about["prompt_tokens"], HOWS) == (PROMPT_READ, (shape_speed.STOCK, shape_speed.OWN))
    assert shape_speed.PROMPT == PROMPT_READ
    assert committed(dtype)["errors"]["without_size"]["median"] < 0.1


def test_work_grows_with_what_is_run_and_not_with_what_is_idle() -> None:
    def total(part: Any, how: str = HOWS[0], **changed: int) -> dict[str, float]:
        block = BlockShape(**{"width": 64, "experts": 8, "top_k": 2, "shared": 128, **changed})
        return work(ModelShape(512, (8, 8, 64), 1000, ((block, 3),)), part, how)

    for part in TIMED_PARTS:
        for key in ("top_k", "width", "shared"):
            before, after = total(part), total(part, **{key: 2 * getattr(BlockShape(64, 8, 2, 128), key)})
            assert all(after[name] >= before[name] for name in before)
            assert after != before
    more = total("decode", experts=16)
    assert {name for name in more if more[name] != total("decode")[name]} == {f"{HOWS[0]}: experts"}
    assert not set(total("decode", HOWS[0])).isdisjoint(total("decode", HOWS[1])), "attention is the same"
    assert total("decode")["layers"] == 3
