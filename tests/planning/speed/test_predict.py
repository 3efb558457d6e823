"""What a plan says about time, and the models about which it says nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

import upcycle
from upcycle.architectures.dense.llama_like.llama import Llama
from upcycle.architectures.dense_config import DenseConfig, Feature
from upcycle.cli.main import cli
from upcycle.ffn.moe_shape import MoeShape
from upcycle.planning.speed.predict import predicted_time
from upcycle.planning.speed.table import committed, measurements
from upcycle.planning.speed.work import HOWS, TIMED_PARTS

LAYERS = 30
DENSE = Llama().config(
    {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
)


def split(layers: int = LAYERS, **changed: Any) -> MoeShape:
    """Twelve pieces, six of which run."""
    shape = MoeShape(7, 1, 5, 128, tuple(range(LAYERS - layers, LAYERS)))
    return replace(shape, **changed)


def made_of(milliseconds: dict[str, float]) -> dict[str, Any]:
    """The committed table, with all time in a few amounts."""
    fitted = {part: dict.fromkeys(committed()["milliseconds"][part], 0.0) for part in TIMED_PARTS}
    for part in TIMED_PARTS:
        fitted[part].update(milliseconds)
    return {**committed(), "milliseconds": fitted}


def test_a_ratio_is_one_of_whole_models() -> None:
    """Layers cost 1 ms each around their FFNs, a sparse block of upcycle's 0.25 ms more, a dense FFN nothing."""
    table = made_of({"layers": 1.0, "upcycle: blocks": 0.25})
    found = predicted_time(DENSE, split(), "qwen2_moe", table)["relative"]
    assert found["upcycle"] == {"prefill": 1.25, "decode": 1.25}
    assert found["grouped_mm"] == {"prefill": 1.0, "decode": 1.0}
    some = predicted_time(DENSE, split(layers=12), "qwen2_moe", table)["relative"]
    assert some["upcycle"] == {"prefill": 1.1, "decode": 1.1}


def test_layers_that_stay_dense_take_what_they_took() -> None:
    table = made_of({"dense weights": 1.0, "dense products": 1.0, "upcycle: blocks": 0.0})
    found = predicted_time(DENSE, split(layers=10), "qwen2_moe", table)["relative"]["upcycle"]
    assert found == pytest.approx({"prefill": 2 / 3, "decode": 2 / 3}, abs=1e-3)


def test_a_pruned_model_is_a_dense_one() -> None:
    table = made_of({"dense weights": 1.0, "dense products": 1.0})
    found = predicted_time(DENSE, MoeShape(0, 0, 1, 768, tuple(range(LAYERS))), "llama", table)["relative"]
    assert found == {how: {"prefill": 0.5, "decode": 0.5} for how in HOWS}


def test_the_expert_that_qwen2_moe_always_has_is_counted() -> None:
    table = made_of({"layers": 1.0, "grouped_mm: shared weights": 1.0})
    none, idle = (predicted_time(DENSE, split(shared=0), target, table) for target in ("mixtral", "qwen2_moe"))
    assert none["relative"]["grouped_mm"]["decode"] == 1.0
    assert idle["relative"]["grouped_mm"]["decode"] == pytest.approx(1 + 3 * 576 * 64 / 1e6, abs=1e-3)


def test_the_error_is_that_of_models_as_new_as_this_one() -> None:
    """One of the measured sizes, and one in between."""
    errors = committed()["errors"]
    known = predicted_time(DENSE, split(), "qwen2_moe")
    assert (known["error_median"], known["error_worst"]) == tuple(errors["without_shape"].values())
    new = predicted_time(replace(DENSE, hidden_size=640), split(), "qwen2_moe")
    assert (new["error_median"], new["error_worst"]) == tuple(errors["without_size"].values())
    assert known["instructions"] == committed()["about"]["instructions"]


def test_measured_splits_are_predicted_as_they_were_measured() -> None:
    """The few layers of the table, within the worst error that is stated."""
    for each in measurements(committed()):
        ((block, layers),) = each.shape.blocks
        if not each.sparse or each.shape.hidden != DENSE.hidden_size or block.shared % block.width:
            continue
        dense = replace(DENSE, num_hidden_layers=layers, vocab_size=each.shape.vocabulary)
        shape = MoeShape(block.experts, block.top_k, block.shared // block.width, block.width, tuple(range(layers)))
        said = predicted_time(dense, shape, "qwen2_moe" if block.shared else "mixtral")
        (parent,) = (m for m in measurements(committed()) if m.shape == each.parent)
        for part in TIMED_PARTS:
            measured = each.milliseconds[part] / parent.milliseconds[part]
            assert said["relative"][each.how][part] == pytest.approx(
                measured, rel=committed()["errors"]["without_size"]["worst"]
            )


@pytest.mark.parametrize(
    ("dense", "shape", "target", "reason"),
    [
        ({}, {}, "glm4_moe", "MoE layers of glm4_moe, the result's architecture, were not timed"),
        ({"hidden_size": 8192}, {}, "qwen2_moe", "a hidden size of 8,192 lies outside of what was timed, 192 to 4,096"),
        ({"intermediate_size": 28672}, {}, "qwen2_moe", "a FFN of 28,672 lies"),
        ({}, {"experts": 146, "top_k": 47}, "qwen2_moe", "a number of experts of 146 lies"),
        ({}, {"expert_size": 8}, "qwen2_moe", "a width of experts of 8 lies"),
        ({}, {"experts": 36, "top_k": 30}, "qwen2_moe", "a top-k of 30 lies"),
        (
            {"special": frozenset({Feature.CONVOLUTIONS})},
            {},
            "qwen2_moe",
            "layers of llama, the source's architecture, were not timed",
        ),
        ({"mlp_gated": False}, {}, "qwen2_moe", "FFNs without a gate or with biases were not timed"),
    ],
)
def test_nothing_is_said_about_what_was_not_timed(
    dense: dict[str, Any], shape: dict[str, Any], target: str, reason: str
) -> None:
    parent: DenseConfig = replace(DENSE, **dense)
    found = predicted_time(parent, split(**shape), target)
    assert list(found) == ["unknown"]
    assert found["unknown"].startswith(reason)


def test_what_plan_prints() -> None:
    printed = " ".join(CliRunner().invoke(cli, ["plan", "split_50", "--source", "demo"]).stdout.split())
    time = upcycle.plan("demo", method="random_split", active=0.5, calibration="demo").as_dict()["time"]
    assert set(time["relative"]) == set(HOWS)
    about = committed()["about"]
    assert "with upcycle's kernels;" in printed
    assert f"(predicted for 1 thread of a CPU with {about['instructions']}, float32; off by " in printed
    assert time["bfloat16"]["dtype"] == "bfloat16", "in which it is stored"
    assert time["bfloat16"]["relative"] != time["relative"]
    assert f"(predicted for 1 thread of a CPU with {time['bfloat16']['instructions']}, bfloat16; off by " in printed
    full = upcycle.plan("demo", method="random_split", active=0.5, calibration="demo", dtype="float32").as_dict()
    assert "bfloat16" not in full["time"]
    pruned = CliRunner().invoke(
        cli, ["plan", "demo", "--method", "static_prune", "--active", "0.5", "--calibration", "demo"]
    )
    assert " time about 0." in " ".join(pruned.stdout.split())
    assert "kernels" not in pruned.stdout, "a dense model has none"


def test_copies_have_no_predicted_time() -> None:
    assert upcycle.plan("demo", experts=4).as_dict()["time"] is None
    assert "time" not in CliRunner().invoke(cli, ["plan", "demo", "--experts", "4"]).stdout
