"""Wrapped models in stock transformers: what a user does with a model works, and the numbers are the dense model's."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    Trainer,
    TrainingArguments,
)
from wrapped_models import SMALL, auto_class, inputs_of, output_of, relative_error, small_model, wrapped

from upcycle.errors import CheckpointError, UsageError
from upcycle.models.own.configuration import wrapped_config
from upcycle.models.own.moe_block import MoeBlock
from upcycle.models.own.replaced_ffn import ReplacedFfn
from upcycle.models.own.routing.relu import ReluRule
from upcycle.models.own.routing.top_k import TopKRule

pytestmark = pytest.mark.one_in(4)  # the other cases are long

ROUNDING = 2e-6  # fp32, two layers of sums of 64 terms: a few roundings of 6e-8 each
GENERATING = [name for name, (_, kind, _) in SMALL.items() if kind in ("CausalLM", "Seq2SeqLM", "SpeechSeq2Seq")]


def with_router(model: Any) -> Any:
    """The same model with routers that choose."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MoeBlock):
                module.router.weight.copy_(torch.randn(module.router.weight.shape, generator=generator))
    return model


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", SMALL)
def test_copies_and_whole_splits_are_the_dense_model(name: str) -> None:
    dense, inputs = small_model(name), inputs_of(name)
    expected = output_of(dense, inputs)
    copies = with_router(wrapped(dense, experts=4, rule=TopKRule(2)))
    assert relative_error(output_of(copies, inputs), expected) < ROUNDING
    widths = (96, 16, 16) if SMALL[name][0] == "bloom" else (24, 8, 32)
    for split in (
        wrapped(dense, pieces=4),
        wrapped(dense, pieces=4, shared=16, bias_of="output"),
        wrapped(dense, widths=widths),
    ):
        assert relative_error(output_of(split, inputs), expected) < ROUNDING
    with torch.no_grad():
        blocks = [module for module in copies.modules() if isinstance(module, MoeBlock)]
        blocks[0].experts.down[::2] *= -1
    assert relative_error(output_of(copies, inputs), expected) > 1e-4  # the experts do run


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", SMALL)
def test_saved_models_load_by_the_auto_classes_with_every_weight(name: str, tmp_path: Path) -> None:
    model, inputs = with_router(wrapped(small_model(name), pieces=4, rule=TopKRule(2), shared=16)), inputs_of(name)
    model.save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    for auto in {auto_class(name), *(() if name == "t5-encoder" else (AutoModel,))}:  # which adds a decoder
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True, device_map="cpu")
        assert not report["mismatched_keys"]
        missing = [key for key in report["missing_keys"] if "embed_positions" not in key]  # sinusoids, of no file
        assert all("pooler" in key for key in missing), report  # a head's class may lack it
        assert type(loaded).__name__.startswith("UpcycleMoe")
        if auto is auto_class(name):
            assert not report["unexpected_keys"]
            assert relative_error(output_of(loaded, inputs), output_of(model, inputs)) < ROUNDING
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, type(small_model(name).config))
    assert pickle.loads(pickle.dumps(config)).to_dict() == deepcopy(config).to_dict() == config.to_dict()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_a_cache_gives_the_dense_models_tokens(name: str) -> None:
    dense, inputs = small_model(name), inputs_of(name)
    model = with_router(wrapped(dense, experts=3, rule=TopKRule(2)))
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    expected = dense.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, use_cache=True), expected)
    assert torch.equal(model.generate(**inputs, **settings, use_cache=False), expected)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", SMALL)
def test_every_weight_of_a_block_learns(name: str) -> None:
    model = with_router(wrapped(small_model(name), pieces=4, rule=ReluRule(), shared=16, bias_of="output")).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    made = model(**inputs_of(name))
    if "text_embeds" in made:
        out = made.text_embeds @ made.image_embeds.T
    else:
        out = made.logits if "logits" in made else made.last_hidden_state[..., :5]
    out.square().sum().backward()
    for key, module in model.named_modules():
        if isinstance(module, MoeBlock):
            for part, weight in module.named_parameters():
                assert weight.grad is not None, f"{key}.{part}"
                assert weight.grad.abs().sum() > 0, f"{key}.{part}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "bert", "flan-t5", "clip", "gemma3_text"])
def test_half_precision_is_as_near_as_the_dense_models(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense, inputs = small_model(name), inputs_of(name)
    model = with_router(wrapped(dense, experts=4, rule=TopKRule(2)))
    exact = output_of(dense, inputs)
    model.save_pretrained(tmp_path)
    loaded = auto_class(name).from_pretrained(tmp_path, dtype=dtype)
    dense.to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    own = relative_error(output_of(dense, inputs).float(), exact)
    assert relative_error(output_of(loaded, inputs).float(), exact) < 1.5 * own  # two experts' sums round once more


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_a_compiler_takes_the_whole_model(name: str) -> None:
    model, inputs = with_router(wrapped(small_model(name), pieces=4, rule=TopKRule(2))), inputs_of(name)
    expected = output_of(model, inputs)
    compiled = torch.compile(model, backend="aot_eager")
    assert relative_error(output_of(compiled, inputs), expected) < ROUNDING


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_takes_a_step_saves_and_what_it_saved_loads(checkpointing: bool, tmp_path: Path) -> None:
    model, inputs = with_router(wrapped(small_model("gpt2"), pieces=4, rule=TopKRule(2))), inputs_of("gpt2")
    before = model.transformer.h[0].mlp.experts.down.detach().clone()
    rows = [{"input_ids": ids, "labels": ids} for ids in inputs["input_ids"]]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_steps=1, gradient_checkpointing=checkpointing
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert not torch.equal(model.transformer.h[0].mlp.experts.down, before)
    expected = output_of(model.eval(), inputs)
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-1"):
        loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert torch.equal(output_of(loaded, inputs), expected)
    again = Trainer(model, arguments, train_dataset=rows)
    again.args.max_steps = 2
    assert again.train(resume_from_checkpoint=True).global_step == 2


def test_weights_may_stay_on_the_disk(tmp_path: Path) -> None:
    model, inputs = with_router(wrapped(small_model("gpt2"), pieces=4, rule=TopKRule(2), shared=16)), inputs_of("gpt2")
    model.save_pretrained(tmp_path / "model")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    assert all(weight.is_meta for weight in empty.parameters())
    places = dict.fromkeys(("wte", "wpe", "h.0", "h.1", "ln_f"), "cpu") | {"h.0": "disk"}
    places = {f"transformer.{part}": place for part, place in places.items()} | {"lm_head": "cpu"}
    disk = tmp_path / "disk"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=disk)
    assert loaded.transformer.h[0].mlp.experts.down.is_meta
    assert torch.equal(output_of(loaded, inputs), output_of(model, inputs))


def test_adapters_go_on_attention() -> None:
    peft = pytest.importorskip("peft")
    plain, inputs = wrapped(small_model("bert"), pieces=4), inputs_of("bert")
    expected = output_of(plain, inputs)
    model = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["query", "value"]))
    assert torch.equal(output_of(model, inputs), expected), "an adapter adds nothing before it is trained"
    model(**inputs).logits.square().mean().backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("implementation", ["upcycle", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bert"])
def test_adapters_go_on_packed_experts_and_routers(name: str, implementation: str, tmp_path: Path) -> None:
    """A trained adapter computes what the model does that it is merged into, and is loaded as it was saved."""
    peft = pytest.importorskip("peft")
    plain, inputs = with_router(wrapped(small_model(name), pieces=4, rule=TopKRule(2), shared=16)), inputs_of(name)
    plain.save_pretrained(tmp_path / "model")
    expected = output_of(plain, inputs)
    names = ["experts.up", "experts.gate_up", "experts.down", "router.weight"]
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules="all-linear", target_parameters=names))
    plain.set_experts_implementation(implementation)
    assert relative_error(output_of(model, inputs), expected) < ROUNDING, "an adapter adds nothing before it is trained"
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 0.1)
    for _ in range(2):  # after the first step both factors of an adapter get gradients
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
    still = [
        key for key, weight in model.named_parameters() if weight.requires_grad and not weight.grad.abs().sum() > 0
    ]
    assert not still
    trained = output_of(model, inputs)
    assert relative_error(trained, expected) > 1e-3
    model.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(auto_class(name).from_pretrained(tmp_path / "model"), tmp_path / "adapters")
    assert relative_error(output_of(again, inputs), trained) < ROUNDING
    merged = again.merge_and_unload()
    assert relative_error(output_of(merged, inputs), trained) < 10 * ROUNDING  # W + BA is rounded once more
    assert {type(module).__name__ for key, module in merged.named_modules() if key.endswith("router")} == {
        "TokenRouter"
    }


def test_routers_are_trained_whole_beside_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain = with_router(wrapped(small_model("gpt2"), pieces=4, rule=TopKRule(2)))
    model = peft.get_peft_model(plain, peft.LoraConfig(target_modules="all-linear", modules_to_save=["router"]))
    model(**inputs_of("gpt2")).logits.square().mean().backward()
    routers = [weight for key, weight in model.named_parameters() if "router" in key and weight.requires_grad]
    assert [tuple(weight.shape) for weight in routers] == [(4, 32)] * 2
    assert all(weight.grad.abs().sum() > 0 for weight in routers)


def test_a_class_of_one_tower_takes_its_own_experts(tmp_path: Path) -> None:
    wrapped(small_model("t5"), pieces=4).save_pretrained(tmp_path)
    encoder, report = AutoModelForTextEncoding.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert sum(isinstance(module, MoeBlock) for module in encoder.modules()) == 2


def test_routing_parameters_can_be_given_when_loading(tmp_path: Path) -> None:
    wrapped(small_model("gpt2"), pieces=4).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, routing={"top_k": 1, "h.1.mlp": {"top_k": 3}})
    assert [layer.mlp.rule.top_k for layer in model.transformer.h] == [1, 3]
    with pytest.raises(CheckpointError, match="'routing' has 'tau', which is no parameter"):
        AutoModelForCausalLM.from_pretrained(tmp_path, routing={"tau": 0.1})
    with pytest.raises(CheckpointError, match="'top_k' is 9, and there are 4 experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path, routing={"top_k": 9})


def test_implementations_are_chosen_by_name() -> None:
    model, inputs = with_router(wrapped(small_model("gpt2"), pieces=4, rule=TopKRule(2))), inputs_of("gpt2")
    expected = output_of(model, inputs)
    model.set_experts_implementation("eager")
    assert {m.experts.implementation for m in model.modules() if isinstance(m, MoeBlock)} == {"eager"}
    assert relative_error(output_of(model, inputs), expected) < ROUNDING
    with pytest.raises(UsageError, match="experts_implementation is 'fast'"):
        model.set_experts_implementation("fast")


def ffn(**changes: Any) -> ReplacedFfn:
    paths = changes.pop("paths", (("h.0.mlp",),))
    fields = {
        "hidden_size": 32,
        "activation": "gelu_new",
        "gated": False,
        "biases": frozenset({"up"}),
        "widths": (8, 8),
    }
    more: Any = {**fields, "shared_width": 0, "router_bias": False, "rule": TopKRule(1), **changes}
    return ReplacedFfn(paths, **more)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (ffn(paths=(("h.7.mlp",),)), "'h.7.mlp', which a gpt2 model does not have"),
        (ffn(paths=(("h.0.mlp", "h.0.forward"),)), "'h.0.forward', which a gpt2 model does not have"),
        (ffn(paths=(("layers.0.mlp",),)), "'layers.0.mlp', and a UpcycleMoeGPT2LMHeadModel has no part of that name"),
        (
            ffn(hidden_size=48),
            r"'h.0.mlp' reads vectors of 'hidden_size' 48, and the base model's matrix there is \[32, 64\]",
        ),
    ],
)
def test_ffns_that_the_base_does_not_have_are_named(entry: ReplacedFfn, message: str) -> None:
    config = wrapped_config(small_model("gpt2").config, [entry])
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_config(config)
