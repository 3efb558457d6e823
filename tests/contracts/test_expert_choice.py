"""Expert choice, as a recipe asks for it: exact where all experts take every token, for encoders, refused for what writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from wrapped_models import auto_class, inputs_of, output_of, relative_error, small_model

import upcycle
from upcycle.errors import CheckpointError, UsageError
from upcycle.models.own.configuration import wrapped_config
from upcycle.models.own.moe_block import MoeBlock
from upcycle.models.own.replaced_ffn import ReplacedFfn
from upcycle.models.own.routing.expert_choice import ExpertChoiceRule

pytestmark = pytest.mark.one_in(8)  # the other cases are long

E = 4
QUICK: dict[str, Any] = {"tokenizer": "none", "verification": {"tokens": 64}, "target": "upcycle_moe", "experts": E}
ALL = {"rule": "expert_choice", "capacity_factor": E}
ROUNDING = 2e-6
ENCODERS = ["bert", "vit", "deit", "swin", "convnext", "clip", "t5-encoder", "embedding_gemma"]


def converted(name: str, folder: Path, **keys: Any) -> Any:
    small_model(name).save_pretrained(folder / "dense")
    return upcycle.convert(str(folder / "dense"), folder / "out", **{**QUICK, **keys}).verification


@pytest.mark.parametrize("name", ENCODERS)
def test_all_experts_on_is_the_dense_model(name: str, tmp_path: Path) -> None:
    """Copies with any router, where weights are normalised; pieces where all weigh the same."""
    expected = output_of(small_model(name), inputs_of(name))
    for place, keys in (
        ("copies", {"router": "random", "routing": ALL}),
        ("split", {"method": "random_split", "router": "zero", "routing": {**ALL, "normalized": False}}),
    ):
        said = converted(name, tmp_path / place, **keys)
        assert (said.promise, said.verdict) == ("exact", "exact")
        loaded = auto_class(name).from_pretrained(tmp_path / place / "out")
        assert relative_error(output_of(loaded, inputs_of(name)), expected) < ROUNDING


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_copies_are_the_dense_ffn_at_every_token_that_is_taken(name: str, tmp_path: Path) -> None:
    """And nothing but the FFN's down bias at the others; the capacity may be changed when it is loaded."""
    said = converted(name, tmp_path, router="random", routing={"rule": "expert_choice", "capacity_factor": 0.5})
    assert said.promise == "approximate"
    assert all(0.5 <= share < 1 for share in said.neurons_run)  # half an expert in the mean, rounded up to whole tokens
    expected = output_of(small_model(name).base_model, inputs_of(name))
    model = auto_class(name).from_pretrained(tmp_path / "out")
    assert relative_error(output_of(model.base_model, inputs_of(name)), expected) > 1e-3
    block = next(module for module in model.modules() if isinstance(module, MoeBlock))
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        taken = (block.router(x.reshape(-1, 32), 9)[2] < E).any(1).view(2, 9)
        made, whole = block(x), block.everyone(x, 1 / E)
    assert not taken.all()
    assert relative_error(made[taken], whole[taken]) < ROUNDING
    assert torch.equal(made[~taken], block.output_bias.expand(int((~taken).sum()), -1))
    every = auto_class(name).from_pretrained(tmp_path / "out", routing={"capacity_factor": E})
    assert relative_error(output_of(every.base_model, inputs_of(name)), expected) < ROUNDING


def padded(ids: torch.Tensor, more: int) -> dict[str, torch.Tensor]:
    other = torch.randint(5, 90, (1, ids.shape[1] + more), generator=torch.Generator().manual_seed(9))
    first = torch.cat([ids, torch.full((1, more), 2)], 1)
    mask = torch.ones(2, ids.shape[1] + more, dtype=torch.int64)
    mask[0, ids.shape[1] :] = 0
    return {"input_ids": torch.cat([first, other]), "attention_mask": mask}


@pytest.mark.parametrize("way", ["named", "by place", "compiled"])
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "modernbert", "t5-encoder", "embedding_gemma"])
def test_padding_changes_nothing(name: str, way: str, tmp_path: Path) -> None:
    converted(name, tmp_path, router="random", routing={"rule": "expert_choice", "capacity_factor": 1})
    model = auto_class(name).from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = torch.randint(5, 90, (1, 10), generator=torch.Generator().manual_seed(4))
    inputs = padded(ids, 6)
    alone = output_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if way == "compiled" and name in ("bert", "t5-encoder"):
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager")
    if way == "by place":
        with torch.no_grad():
            out = model(inputs["input_ids"], inputs["attention_mask"])
        together = out.logits if "logits" in out else out.last_hidden_state
    else:
        together = output_of(model, inputs)
    assert relative_error(together[0, :10], alone[0]) < 1e-5
    if way == "named":  # it is the mask that does it
        blocks = [module for module in model.modules() if isinstance(module, MoeBlock)]
        for block in blocks:
            block.register_forward_pre_hook(lambda block, _: setattr(block, "mask", None))
        assert relative_error(output_of(model, inputs)[0, :10], alone[0]) > 1e-3


def test_layers_that_are_computed_again_are_routed_as_before(tmp_path: Path) -> None:
    converted("bert", tmp_path, router="random", routing={"rule": "expert_choice", "capacity_factor": 1})
    inputs = padded(torch.randint(5, 90, (1, 10), generator=torch.Generator().manual_seed(4)), 6)
    gradients = []
    for checkpointing in (False, True):
        model = auto_class("bert").from_pretrained(tmp_path / "out").train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs).logits[0, :10].square().sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    assert relative_error(gradients[1], gradients[0]) < 1e-5


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("gpt2", {}, "a causal model does not know them"),
        ("t5", {}, "a decoder does not know them"),
        ("whisper", {"part": "decoder"}, "a decoder does not know them"),
        ("bert", {"routing": {**ALL, "capacity_factor": 5}}, "only 4 experts can take a token"),
        ("bert", {"top_k": 2}, "finds for every token how many experts run"),
        ("bert", {"routing": {**ALL, "tau": 0.5}}, "'tau' is no parameter of the rule expert_choice"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    name: str, keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        converted(name, tmp_path, **{"routing": ALL, **keys})
    assert not (tmp_path / "out").exists()


def test_stock_causal_models_are_refused_with_the_reason(tmp_path: Path, pico: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="a causal model does not know them"):
        upcycle.convert(str(pico("llama")), tmp_path / "out", **{**QUICK, "routing": ALL})


def test_the_plan_counts_what_runs_in_the_mean(tmp_path: Path) -> None:
    small_model("bert").save_pretrained(tmp_path)
    told = {**QUICK, "router": "random"}
    plans = [upcycle.plan(str(tmp_path), **told, routing={**ALL, "capacity_factor": factor}) for factor in (0.5, 1, E)]
    ffns = 2 * 2 * 32 * 64  # layers, matrices
    idle = [plan.parameters_total - plan.parameters_active for plan in plans]
    assert idle == [3.5 * ffns, 3 * ffns, 0]
    assert any("each token runs 4 copies of the FFN: 4x its compute" in one for one in plans[2].warnings)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_an_encoder_may_follow_it_where_the_decoder_may_not(name: str, tmp_path: Path) -> None:
    said = converted(name, tmp_path, router="random", routing=ALL, part="encoder")
    assert said.verdict == "exact"


def test_a_causal_layer_is_refused_when_it_is_loaded() -> None:
    ffn = ReplacedFfn((("h.0.mlp",),), 32, "gelu_new", False, frozenset(), (16,) * E, 0, False, ExpertChoiceRule())
    with pytest.raises(CheckpointError, match=r"'h\.0\.mlp' is replaced by expert_choice, which looks at later tokens"):
        auto_class("gpt2").from_config(wrapped_config(small_model("gpt2").config, [ffn]))
