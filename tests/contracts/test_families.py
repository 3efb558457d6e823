"""What every registered family promises: its defaults are the stock class's, and its read-out agrees with it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import PICO
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

import upcycle
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.checkpoints.find_family import family_of
from upcycle.errors import RefusalError, UpcycleError
from upcycle.files.formats.settings import COMMON, HARMLESS, STOCK_ACTIVATIONS
from upcycle.models.layer_runner import LayerRunner, logits_of
from upcycle.models.stock_model import dense_reader, skeleton
from upcycle.registry import FAMILIES, load

# What a family with a condition on its configuration needs to be dense at all.
CONDITIONS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        "num_local_experts": 0,
        "layer_types": ["attention"] * 32,
        "position_embedding_type": "rope",
    },
    "ministral": {"head_dim": 128},
    "hyperclovax": {"use_post_norm": False},
    "gpt_neox": {"use_parallel_residual": False},
    "nemotron": {"num_key_value_heads": 8},  # without it, the stock class builds no model
}
_TRIED: tuple[Any, ...] = (None, True, 1, 7.5, -3, "x", [1], ["x"], {}, {"x": 1}, float("nan"), float("inf"), 10**400)


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_the_stock_class(name: str) -> None:
    given = {"model_type": name, **CONDITIONS.get(name, {})}
    stock, family = AutoConfig.for_model(**given), load("family", name)()
    read = family.config(given)
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "hidden_act",
                "rms_norm_eps", "max_position_embeddings", "initializer_range", "attention_dropout",
                "tie_word_embeddings"):  # fmt: skip
        own = family.aliases.get(key, key)
        default = {"attention_dropout": 0.0, "hidden_act": "silu", "rms_norm_eps": 1e-5}.get(
            key
        )  # what a class without the key does
        default = read.num_attention_heads if key == "num_key_value_heads" else default
        assert getattr(read, key) == getattr(stock, own, default), key
    assert read.head_dim == getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads
    # A class may keep the old spelling of rope_type beside the new one.
    assert dict(read.rope_parameters) == {key: value for key, value in stock.rope_parameters.items() if key != "type"}
    assert {key: getattr(stock, key) for key in read.token_ids} == dict(read.token_ids)
    for own, value in (
        ("embedding_multiplier", read.embedding_multiplier),
        ("attention_multiplier", read.attention_multiplier),
        ("residual_multiplier", read.residual_multiplier),
        ("logits_scaling", 1 / read.logits_multiplier),
        ("logit_scale", read.logits_multiplier),
        *read.extra.items(),
    ):
        assert getattr(stock, own, value) == value, own


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_are_those_of_the_stock_class(name: str) -> None:
    # Hunyuan's class runs with no other head size.
    sizes = {"num_hidden_layers": 4} | ({"head_dim": 128} if name == "hunyuan_v1_dense" else {})
    sizes |= CONDITIONS.get(name, {})
    sizes |= {"layer_types": ["attention"] * 4} if "layer_types" in sizes else {}
    stock, family = AutoConfig.for_model(name, **sizes), load("family", name)()
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(stock).state_dict()
    read = family.config({"model_type": name, **sizes})
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    head = shapes.pop("lm_head.weight")
    shapes |= {} if stock.tie_word_embeddings else {family.module_paths.head_weight: head}
    assert family.all_stored_specs(read) == shapes


RAW: list[dict[str, Any]] = [
    {"rope_theta": 1e6},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
]


@pytest.mark.parametrize("raw", RAW)
@pytest.mark.parametrize("name", FAMILIES)
def test_rope_is_read_as_the_stock_class_reads_it(name: str, raw: dict[str, Any]) -> None:
    if name == "phi3" and "rope_scaling" in raw:
        pytest.skip("the stock class knows longrope only")
    if name == "ministral3":  # runs with these keys alone
        needed = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
        raw = {key: {**value, **needed} if isinstance(value, dict) else value for key, value in raw.items()}
    given = {"model_type": name, **CONDITIONS.get(name, {}), **raw}
    stock = AutoConfig.for_model(**json.loads(json.dumps(given)))
    read = load("family", name)().config(given)
    # The stock class keeps the old spelling of rope_type beside the new one.
    assert dict(read.rope_parameters) == {key: value for key, value in stock.rope_parameters.items() if key != "type"}


def test_a_rotary_factor_that_the_stock_class_would_ignore_is_refused() -> None:
    with pytest.raises(RefusalError, match=r"'partial_rotary_factor' is 0\.5"):
        load("family", "llama")().config({"model_type": "llama", "partial_rotary_factor": 0.5})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("helium", {"head_dim": 64}, "'head_dim' 64"),
        ("llama", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("gpt_neox", {}, "'use_parallel_residual' is true where it is not given"),
        ("stablelm", {"use_parallel_residual": True}, "'use_parallel_residual' is true: attention and FFN"),
        ("stablelm", {"qk_layernorm": True}, "'qk_layernorm' is true"),
        ("olmo", {"clip_qkv": 8.0}, "'clip_qkv' is 8.0"),
    ],
)
def test_a_key_that_no_target_can_express_is_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusalError, match=message):
        load("family", name)().config({"model_type": name, **changes})


@pytest.mark.parametrize("name", PICO)
def test_a_stock_checkpoint_is_accepted_whole(name: str, pico: Callable[[str], Path]) -> None:
    checkpoint = DenseCheckpoint.open(str(pico(name)))
    stock = AutoConfig.from_pretrained(pico(name))
    assert checkpoint.family.name == stock.model_type
    kinds = getattr(stock, "layer_types", None)
    windows = [
        getattr(stock, "sliding_window", None) if kinds is None or kind == "sliding_attention" else None
        for kind in kinds or [None] * stock.num_hidden_layers
    ]
    assert list(checkpoint.config.windows) == windows


@pytest.mark.parametrize("name", PICO)
def test_layers_run_alone_as_they_do_in_the_stock_model(name: str, pico: Callable[[str], Path]) -> None:
    checkpoint = DenseCheckpoint.open(str(pico(name)))
    runner = LayerRunner(checkpoint, "keep", 48)
    ids = torch.randint(4096, (2, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(pico(name), dtype=torch.float32)
        expected, states = stock(ids).logits, runner.embed(ids.flatten())
        for index in range(checkpoint.config.num_hidden_layers):
            with runner.loaded(index):
                output = runner.whole(index, states)
                x, residual = runner.around(index, states)
                torch.testing.assert_close(residual + runner.added(index, runner.ffn(index, x)), output)
                ffn = checkpoint.feed_forward(index)
                norm, added = ffn.norm.float(), 0 if ffn.norm_bias is None else ffn.norm_bias.float()
                assert (
                    ((x - added) / norm).norm(dim=1) <= x.shape[1] ** 0.5 * (1 + 1e-5)
                ).all()  # what routers rely on
                states = output
        model = skeleton(checkpoint.raw_config, dense_reader(checkpoint, "keep")(None))
        actual = logits_of(model, checkpoint, states.view(2, 48, -1))
    assert torch.linalg.norm(actual - expected) < 1e-6 * torch.linalg.norm(expected)


@pytest.mark.one_in(20)
@pytest.mark.parametrize(
    "name",
    [
        "granite",
        "gemma",
        "phi3",
        "lfm2",
        "cohere2",
        "smollm3",
        "ministral",
        "granite-swa",
        "arcee",
        "hyperclovax",
        "glm",
        "cohere",
        "minicpm3",
        "jais2",
        "stablelm",
        "gpt-neox",
    ],
)
def test_other_families_are_calibrated(name: str, pico: Callable[[str], Path], tmp_path: Path) -> None:
    keys = {"method": "importance", "experts": 4, "top_k": 2, "verification": {"tokens": 64}}
    calibration = {"text": "demo", "tokens": 1024, "window": 64}
    result = upcycle.convert(str(pico(name)), tmp_path / "out", **keys, calibration=calibration)
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    assert result.verification.layer_errors[0] < 1


def test_every_listed_target_exists() -> None:
    for name in FAMILIES:
        for target in load("family", name).targets:
            assert load("target", target).name == target


def test_family_is_chosen_by_model_type() -> None:
    assert family_of({"model_type": "qwen2"}, "here").name == "qwen2"


def _fields(stock: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(stock)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_the_stock_class_is_read_or_known_to_be_harmless(name: str) -> None:
    family = load("family", name)()
    known = {*HARMLESS, *family.keys, *(family.aliases.get(key, key) for key in COMMON)}
    assert _fields(AutoConfig.for_model(name)) - known == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_value_that_the_stock_class_does_not_take_is_refused_with_its_key(name: str) -> None:
    family, given = load("family", name)(), {"model_type": name, **CONDITIONS.get(name, {})}
    keys = {*HARMLESS, *family.keys, *(family.aliases.get(key, key) for key in COMMON)} - {"model_type"}
    wrong = []
    for key, value in itertools.product(sorted(keys), _TRIED):
        try:
            family.config({**given, key: value}, "here/config.json")
        except UpcycleError as error:
            if f"'{key}" not in error.message:
                wrong.append(f"{key}={value!r} is refused without its name: {error.message}")
            continue
        try:
            AutoConfig.for_model(**json.loads(json.dumps({**given, key: value})))
        except Exception as error:  # the stock classes raise errors of many kinds
            wrong.append(f"{key}={value!r} is accepted, and the stock class says {error}")
    assert not wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": 7}, "'hidden_act' must be one of"),
        ({"hidden_act": "x"}, "'hidden_act' must be one of"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "'rope_type' must be one of"),
        ({"rope_parameters": {"rope_type": "linear"}}, "need the key 'factor'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "'rope_parameters.factor' must be"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "vision-language"),
        ({"rope_parameters": [1]}, "'rope_parameters' must be a mapping"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "has 1 numbers"),
        ({"num_key_value_heads": 5}, "not a multiple of 'num_key_value_heads' 5"),
        ({"hidden_size": 4100, "head_dim": 128}, "'hidden_size' 4100 is not a multiple of 'num_attention_heads' 32"),
        ({"pad_token_id": 32000}, "'pad_token_id' is 32000, 'vocab_size' 32000"),
        ({"num_hidden_layers": 20_000_000}, "'num_hidden_layers' must be a positive integer up to"),
        ({"dtype": "auto"}, "'dtype' must be"),
        ({"is_causal": False}, "'is_causal' is False: it attends in both directions"),
        ({"per_layer_config": {"0": {"hidden_act": "relu"}}}, "'per_layer_config'"),
        ({"transformers_weights": "other.safetensors"}, "'transformers_weights'"),
        ({"eos_token_id": "</s>"}, "'eos_token_id' must be a token id or a list"),
    ],
)
def test_nonsense_is_refused_by_file_key_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UpcycleError, match=message) as caught:
        load("family", "llama")().config({"model_type": "llama", **changes}, "here/config.json")
    assert caught.value.message.startswith("here/config.json: ")
    assert len(caught.value.message) < 500


def test_activations_are_those_that_stock_transformers_has_without_weights() -> None:
    assert set(ACT2FN) - {"prelu", "xielu"} == set(STOCK_ACTIVATIONS)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "phi3"])
@pytest.mark.parametrize("inside", [None, 64])
@pytest.mark.parametrize("beside", [None, 32])
def test_the_length_of_a_longrope_may_lie_beside_it(name: str, inside: int | None, beside: int | None) -> None:
    head = 4096 // 32 if name != "phi3" else 3072 // 32
    rope: dict[str, Any] = {"type": "longrope", "short_factor": [1.0] * (head // 2), "long_factor": [2.0] * (head // 2)}
    rope |= {"original_max_position_embeddings": inside} if inside else {}
    raw = {"model_type": name, "rope_scaling": rope, "rope_theta": 10000.0}
    raw |= {"original_max_position_embeddings": beside} if beside else {}
    stock = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    stock.standardize_rope_params()  # as its rotary embedding does when it is made
    read = load("family", name)().config(raw)
    assert dict(read.rope_parameters) == {key: value for key, value in stock.rope_parameters.items() if key != "type"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 8}, "Mixture-of-Experts already"),
        ({"num_local_experts": None}, None),
        ({"layer_types": ["mamba"] * 31 + ["attention"]}, "31 of its 32 layers are Mamba"),
        ({"position_embedding_type": None}, None),
    ],
)
def test_granite_4_is_dense_without_experts_and_mamba(changes: dict[str, Any], message: str | None) -> None:
    raw = {"model_type": "granitemoehybrid", **CONDITIONS["granitemoehybrid"], **changes}
    if message is None:
        load("family", "granitemoehybrid")().config(raw)
        return
    with pytest.raises(RefusalError, match=message):
        load("family", "granitemoehybrid")().config(raw)
