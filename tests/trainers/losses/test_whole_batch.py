"""The same tokens in one pass or many, on one rank or many: one loss and one gradient, those of the whole batch.

Ranks are threads here, each with a copy of the model; what DeepSpeed does with gradients is written out.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from divided_steps import Engine, divided_step, far
from training_runs import recipe_for

from upcycle.trainers.data.packing import PackedBatch, layout
from upcycle.trainers.forecast.communication import forecast_communication
from upcycle.trainers.forecast.model_counts import ModelCounts, count_model
from upcycle.trainers.forecast.speed import flops_per_token
from upcycle.trainers.forecast.zero_division import Division
from upcycle.trainers.losses.base import make_losses
from upcycle.trainers.losses.survey import Survey, needed
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.recipe.training_recipe import StageRecipe
from upcycle.trainers.routing.bias_balance import BiasBalance
from upcycle.trainers.routing.router_control import RouterControl
from upcycle.trainers.routing.router_records import capture
from upcycle.trainers.routing.stock_routers import moe_layers, selection_bias
from upcycle.trainers.run.step_result import StepResult

ROWS, LENGTH = 4, 10
FRAGMENTS = ([6, 3], [4], [10], [1, 1, 7])  # of each row; the rest is padding
BALANCES = {
    "switch_balance": {"coefficient": 0.3},
    "device_balance": {"coefficient": 0.4},
    "skywork_balance": {"coefficient": 50.0},
    "importance_cv2": {"coefficient": 0.2},
    "load_cv2": {"coefficient": 0.1},
    "mutual_information": {"coefficient": 2.0},
    "router_z": {"coefficient": 0.05, "layers": "mean"},
}
STAGES: dict[str, dict[str, Any]] = {
    "balances": {"losses": BALANCES},
    "first choices under a capacity": {
        "losses": {"switch_balance": {"fraction": "first"}, "skywork_balance": {"adaptive": True}},
        "control": {"capacity_factor": 0.6, "min_capacity": 1},
    },
    "mean weights under a capacity": {
        "losses": {"switch_balance": {"fraction": "weights"}, "importance_cv2": {}},
        "control": {"capacity_factor": 0.6, "min_capacity": 1, "drop": "probability", "renormalize": True},
    },
    "noise, jitter and chance": {
        "losses": {"load_cv2": {"coefficient": 0.1}, "switch_balance": {}, "skywork_balance": {"adaptive": True}},
        "control": {"noise": "learned", "jitter": 0.05, "second": "random", "capacity_factor": 0.6, "min_capacity": 1},
    },
    "drawn experts": {"losses": {"switch_balance": {}}, "control": {"second": "sampled"}},
    "means": {
        "losses": {"switch_balance": {"scope": "sequence", "coefficient": 0.3}, "router_z": {"coefficient": 0.1}}
    },
    "matching": {"losses": {}, "distillation": {"logits": 1.0, "hidden": 0.7, "ffn": 0.9}},
}
# Stock routers compute their softmax in fp32 whatever the model's dtype; everything else is fp64.
NEAR = 1e-6


def rows(first: int, last: int, answers: bool = False) -> PackedBatch:
    """Some rows of a batch; of examples, every third token and all of the second row are read, but not learned."""
    ids = torch.randint(4096, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    made = [tuple(map(torch.from_numpy, layout(torch.tensor(each).numpy(), LENGTH))) for each in FRAGMENTS]
    positions, mask = (torch.stack(part) for part in zip(*made, strict=True))
    real = mask | (positions == 0)
    if answers:
        mask = mask & (ids % 3 != 0) & (torch.arange(ROWS) != 1)[:, None]
    own = slice(first, last)
    return PackedBatch(ids[own], mask[own], positions[own], ("x",) * (last - first), real[own])


def step(
    model: Any, parent: Any, stage: dict[str, Any], world: int, passes: int, answers: bool = False
) -> tuple[StepResult, list[torch.Tensor], Engine]:
    return divided_step(model, parent, stage, world, passes, rows(0, ROWS, answers))


@pytest.fixture(scope="module")
def model(stock: Any) -> Any:
    return stock("qwen3_moe", experts=6, top_k=2).double()


@pytest.fixture(scope="module")
def parent(stock: Any) -> Any:
    other = stock("qwen3_moe", experts=4, top_k=2).double()
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    return other


@pytest.mark.one_in(7)
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_every_division_has_the_loss_and_gradient_of_the_whole(model: Any, parent: Any, stage: dict[str, Any]) -> None:
    whole, wanted, _ = step(model, parent, stage, 1, 1)
    assert len(wanted) > 10
    for world, passes in ((1, 2), (1, 4), (2, 1), (2, 2), (4, 1)):
        found, gradient, _ = step(model, parent, stage, world, passes)
        assert found.loss == pytest.approx(whole.loss, rel=NEAR)
        assert found.parts == {name: pytest.approx(value, rel=NEAR, abs=NEAR) for name, value in whole.parts.items()}
        assert found.dropped == whole.dropped
        assert {layer: count.tolist() for layer, count in found.counts.items()} == {
            layer: count.tolist() for layer, count in whole.counts.items()
        }
        assert far(gradient, wanted) < NEAR, (world, passes)


def test_examples_have_the_loss_of_their_answers_however_they_are_divided(model: Any, parent: Any) -> None:
    """Passes and ranks have unlike numbers of answers, and one pass has none: a mean of their means would be another number."""
    stage = {"losses": BALANCES, "distillation": {"logits": 1.0, "hidden": 0.7, "ffn": 0.9}}
    whole, wanted, _ = step(model, parent, stage, 1, 1, answers=True)
    for world, passes in ((1, 4), (2, 1), (2, 2)):
        found, gradient, _ = step(model, parent, stage, world, passes, answers=True)
        assert found.loss == pytest.approx(whole.loss, rel=NEAR)
        assert found.parts == {name: pytest.approx(value, rel=NEAR, abs=NEAR) for name, value in whole.parts.items()}
        assert far(gradient, wanted) < NEAR, (world, passes)
    batch = rows(0, ROWS, answers=True)
    nats, divergence = 0.0, 0.0
    for row in range(ROWS):
        inputs = {
            "input_ids": batch.ids[row : row + 1],
            "position_ids": batch.positions[row : row + 1],
            "use_cache": False,
        }
        own, theirs = (m(**inputs).logits[0].log_softmax(-1) for m in (model, parent))
        for place in torch.nonzero(batch.mask[row]).flatten().tolist():
            nats -= own[place - 1, batch.ids[row, place]].item()
            divergence += (theirs[place - 1].exp() * (theirs[place - 1] - own[place - 1])).sum().item()
    count = int(batch.mask.sum())
    assert whole.targets == count < int(rows(0, ROWS).mask.sum())
    assert whole.loss == pytest.approx(nats / count, rel=NEAR)
    assert whole.parts["kl"] == pytest.approx(divergence / count, rel=NEAR)
    text, _, _ = step(model, parent, stage, 1, 1)
    for (
        name
    ) in BALANCES:  # routers choose for prompts, too, in training as in use: balance is over all tokens but padding
        assert whole.parts[name] == pytest.approx(text.parts[name], rel=NEAR, abs=NEAR)


def test_the_whole_is_the_papers_formula_over_all_tokens(model: Any, parent: Any) -> None:
    """``tests/trainers/test_*`` hold every loss against its paper; here it is of the tokens that are there, and padding none."""
    own, batch = copy.deepcopy(model).train(), rows(0, ROWS)
    with capture(own, RouterControl(ControlParameters())) as recorder:
        own(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
        records = recorder.take()
    assert int(batch.real.sum()) == sum(map(sum, FRAGMENTS))
    result, _, _ = step(model, parent, STAGES["balances"], 1, 4)
    for record in records:
        counts = torch.bincount(record.experts[batch.real.flatten()].flatten(), minlength=6)
        assert result.counts[record.layer].tolist() == counts.tolist()
    for loss in make_losses(BALANCES):
        kept = [
            type(each)(
                each.layer,
                *(part[batch.real.flatten()] for part in (each.logits, each.weights, each.experts)),
                each.rule,
            )
            for each in records
        ]
        assert result.parts[loss.name] == pytest.approx(loss(kept).item(), rel=NEAR, abs=NEAR)
    load = result.parts["switch_balance"] / 0.3
    by_hand = 0.0
    for record in records:
        p = record.logits.softmax(-1)[batch.real.flatten()]
        counts = torch.bincount(record.experts[batch.real.flatten()].flatten(), minlength=6) / (2 * len(p))
        by_hand += 6 * (counts * p.mean(0)).sum().item()
    assert load == pytest.approx(by_hand, rel=NEAR)


def test_the_bias_follows_the_load_of_all_tokens_that_are_there(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    observe = BiasBalance.observe

    def spy(self: BiasBalance, records: Any, mask: Any = None) -> None:
        counted.append(len(records[0].chosen) if mask is None else int(mask.sum()))
        observe(self, records, mask)

    monkeypatch.setattr(BiasBalance, "observe", spy)
    model = stock("glm4_moe", experts=6, top_k=2)
    before = {layer.index: selection_bias(layer.block, layer.router) for layer in moe_layers(model)}
    for world, passes in ((1, 1), (2, 2)):
        result, _, engine = step(model, None, {"losses": {}, "balance": {"rate": 0.25}}, world, passes)
        after = {layer.index: selection_bias(layer.block, layer.router) for layer in moe_layers(engine.module)}
        assert set(result.counts) == set(before)
        assert sum(counted) == sum(map(sum, FRAGMENTS))
        counted.clear()
        for layer, bias in before.items():
            assert bias is not None
            count = result.counts[layer]
            assert int(count.sum()) == 2 * sum(map(sum, FRAGMENTS))
            wanted = bias.flatten() + 0.25 * torch.sign(count.mean() - count)
            torch.testing.assert_close(after[layer].flatten(), wanted)  # type: ignore[union-attr]


def test_a_loss_per_pass_has_another_value_and_costs_no_survey(model: Any, parent: Any) -> None:
    stage = STAGES["balances"]
    whole, _, twice = step(model, parent, stage, 1, 4)
    apart, _, once = step(model, parent, {**stage, "losses_over": "pass"}, 1, 4)
    assert (twice.calls, once.calls) == (8, 4)
    assert step(model, parent, STAGES["means"], 1, 4)[2].calls == 4
    for name in ("switch_balance", "mutual_information", "importance_cv2"):
        assert abs(apart.parts[name] / whole.parts[name] - 1) > 1e-3
    # A mean of the passes' means differs, as passes have unlike numbers of tokens.
    assert apart.parts["router_z"] != whole.parts["router_z"]


def test_a_survey_runs_only_for_losses_of_the_whole_batch() -> None:
    assert needed({"switch_balance": {}}, None, 2, "batch") == Survey(student=True)
    assert needed({"switch_balance": {}}, None, 1, "batch") == Survey()
    assert needed({"switch_balance": {}}, None, 2, "pass") == Survey()
    assert needed({"switch_balance": {"scope": "sequence"}, "router_z": {}, "hoyer": {}}, None, 2, "batch") == Survey()
    own = StageRecipe.model_validate({"steps": 1, "learning_rate": 1, "distillation": {"ffn": 1}}).distillation
    assert needed({}, own, 2, "batch") == Survey(parent=True)


@pytest.mark.parametrize(("losses", "factor"), [({"switch_balance": {}}, 1), ({"router_z": {}}, 0)])
def test_a_plan_counts_the_survey(pico_moe: Any, tmp_path: Any, losses: dict[str, Any], factor: int) -> None:
    from upcycle.files.formats.tensor_files import read_json

    folder = pico_moe("mixtral")
    zero = {"settings": {"param_persistence_threshold": 0}}
    recipe = recipe_for(folder, tmp_path, micro_batch=1, stage={"losses": losses}, zero=zero)
    counts: ModelCounts = count_model(read_json(folder / "config.json"), str(folder), recipe.length)
    several, alone = Division(recipe, counts, 2, 3), Division(recipe, counts, 4, 3)
    assert (several.passes, alone.passes) == (2, 1)
    assert flops_per_token(several, None) - flops_per_token(alone, None) == factor * counts.flops.forward
    first, second = (
        {each.kind: each.payload for each in forecast_communication(own).traffic} for own in (several, alone)
    )
    assert first["all_gather"] == 2 * (1 + 2 * factor) * second["all_gather"]  # as test_forecasts_on_ranks measures
