"""Phi-3.5-MoE as a target: what its router does in every mode, what its dense relatives are expressed by, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import PICO
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import upcycle
from upcycle.architectures.rope import masked_rope, partly_turned
from upcycle.errors import CheckpointError, RefusalError, UsageError, VerificationError
from upcycle.ffn import gated_experts
from upcycle.files.formats.tensor_files import SafetensorsFile, SafetensorsFolder
from upcycle.registry import FAMILIES, load
from upcycle.trainers.routing.router_control import ControlParameters, RouterControl
from upcycle.trainers.routing.stock_routers import moe_layers, untaught_warning

Pico = Callable[[str], Path]
COPIES: dict[str, Any] = {
    "target": "phimoe",
    "method": "sparse_upcycling",
    "experts": 4,
    "top_k": 2,
    "verification": {"tokens": 64},
}
NAMES = [name for name, (family, _) in PICO.items() if "phimoe" in load("family", family).targets]
FIRST = {PICO[name][0]: name for name in reversed(NAMES)}
FOLDED = ("starcoder2", "gpt-neox", "jais2")


def read(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """As any user loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **changes).eval()


def ids(batch: int = 4, length: int = 64) -> torch.Tensor:
    return torch.randint(4096, (batch, length), generator=torch.Generator().manual_seed(3))


def apart(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def routers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for name, module in model.named_modules() if name.endswith("mlp.router"))


def calm(model: Any) -> Any:
    """With weights for which neither the softmax of attention nor the FFN is extreme, as the pico models' are."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(weight.shape[1] ** -0.5 / weight.std())
            elif not name.endswith("norm.weight"):
                weight.mul_(0.2)
    return model


@pytest.fixture(scope="module")
def converted(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """``converted("jais2")``: a dense model like the pico one, and a MoE made of it, each in its folder."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            calm(read(pico(name))).save_pretrained(folder / "dense")
            keys = COPIES | {"tokenizer": "none"}
            result = upcycle.convert(str(folder / "dense"), folder / "out", **keys)
            assert result.verification is not None
            assert result.verification.verdict == "exact"
            made[name] = folder / "dense", folder / "out"
        return made[name]

    return get


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("stablelm", {"partial_rotary_factor": 0.25}),
        ("stablelm", {"partial_rotary_factor": 0.5, "rope_theta": 1e6}),
        ("gpt_neox", {"partial_rotary_factor": 0.25, "rope_type": "linear", "factor": 3.0}),
        ("nemotron", {"partial_rotary_factor": 0.5, "rope_theta": 5e5}),
        ("jais2", {"rope_type": "linear", "factor": 2.5}),
    ],
)
@pytest.mark.parametrize("head", [64, 80, 96, 128])
def test_frequencies_are_the_dense_models_to_the_bit(family: str, rope: dict[str, Any], head: int) -> None:
    """A difference would be multiplied by the position. Not every number is an inverse: a scaled one may be its neighbour."""
    keys = {"hidden_size": 4 * head, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    given = {"rope_type": "default", "rope_theta": 1e4, **rope}
    dense = _rotary(family, dict(given), keys)
    made = _rotary("phimoe", masked_rope(given, head, 4096), keys | {"head_dim": head})
    part = len(dense)
    off = (made[:part].double() / dense.double() - 1).abs()
    assert off.max() <= (2.0**-23 if "factor" in rope else 0)
    assert (made[part:] * 1e6 < 1e-20).all()  # nothing turns within a million positions


def _rotary(model_type: str, rope: dict[str, Any], keys: dict[str, Any]) -> torch.Tensor:
    config = AutoConfig.for_model(model_type, rope_parameters=rope, vocab_size=8, intermediate_size=8, **keys)
    model = AutoModelForCausalLM.from_config(config)
    (found,) = (module for name, module in model.named_modules() if name.endswith(".rotary_emb"))
    return torch.as_tensor(found.inv_freq)


def test_a_partial_rotation_has_its_rows_in_pairs_of_a_whole_one() -> None:
    assert partly_turned({"partial_rotary_factor": 0.5}, 8) == (0, 1, 4, 5, 2, 3, 6, 7)
    assert partly_turned({}, 8) == ()
    plain = {"rope_type": "default", "rope_theta": 1e4}
    assert masked_rope({**plain, "partial_rotary_factor": 1.0}, 8, 64) == plain


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", FIRST.values())
def test_greedy_tokens_with_a_cache_survive_saving(
    name: str, converted: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    dense, moe = map(read, converted(name))
    moe.save_pretrained(tmp_path / "again")
    keys: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = [model.generate(ids(2, 9), **keys) for model in (dense, moe, read(tmp_path / "again"))]
    assert found[0].shape == (2, 33)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", FIRST.values())
def test_bfloat16_is_as_near_as_the_dense_models_but_for_equal_logits(
    name: str, converted: Callable[[str], tuple[Path, Path]]
) -> None:
    folders = converted(name)
    with torch.no_grad():
        expected = read(folders[0])(ids(16)).logits
        dense, moe = (read(folder, torch.bfloat16) for folder in folders)
        weights: list[torch.Tensor] = []
        for router in routers(moe):
            router.register_forward_hook(lambda _, __, output: weights.append(output[1].float()))
        errors = [(model(ids(16)).logits.float() - expected).norm(dim=-1) for model in (dense, moe)]
    assert len(weights) == 3
    tied = (torch.stack(weights) < 0.99).any(-1)  # [layers, tokens]
    # Four logits of one sign share few of bfloat16's 256 values between two powers of two.
    assert tied.float().mean() < 0.03
    alone = ~(tied.any(0).view(16, -1).cumsum(1) > 0)  # neither this token nor one that it attends to
    assert alone.sum() > 200
    assert errors[1][alone].mean() < 1.25 * errors[0][alone].mean()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", FIRST.values())
def test_a_step_moves_it_about_as_far_as_the_dense_model(
    name: str, converted: Callable[[str], tuple[Path, Path]]
) -> None:
    """Twice as many neurons learn for a token, so up to twice as far; the first loss is the dense one, in training mode, too."""
    moved, losses = [], []
    for model in map(read, converted(name)):
        with torch.no_grad():
            before = model(ids()).logits
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, weight_decay=0)
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        losses.append(loss.item())
        gradients = [router.weight.grad for router in routers(model)]
        assert not any(bool(grad.any()) for grad in gradients if grad is not None)
        assert all(weight.grad is not None for key, weight in model.named_parameters() if ".experts." in key)
        optimizer.step()
        with torch.no_grad():
            moved.append(apart(model.eval()(ids()).logits, before))
    assert abs(losses[1] / losses[0] - 1) < 1e-5
    assert 0.5 * moved[0] < moved[1] < 2.5 * moved[0]


def test_routers_learn_with_noise_and_training_says_so(converted: Callable[[str], tuple[Path, Path]]) -> None:
    model = read(converted("stablelm")[1]).train()
    assert "no gradient of the loss on tokens reaches the routers" in str(untaught_warning(model))
    for router in routers(model):
        router.requires_grad_(False)
    assert untaught_warning(model) is None
    noisy = read(converted("stablelm")[1], router_jitter_noise=0.01).train()
    assert untaught_warning(noisy) is None
    torch.manual_seed(0)
    noisy(input_ids=ids(), labels=ids()).loss.backward()
    assert all(bool(router.weight.grad.any()) for router in routers(noisy))
    control = RouterControl(ControlParameters(noise="fixed"))
    with pytest.raises(UsageError, match=r"router_jitter_noise 0\.01 these routers draw experts"):
        control.attach(moe_layers(noisy)[0])
    control.attach(moe_layers(model)[0])


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", FOLDED)
def test_half_precision_rounds_what_is_folded_and_float32_does_not(name: str, pico: Pico, tmp_path: Path) -> None:
    source = tmp_path / "source"
    read(pico(name), torch.bfloat16).save_pretrained(source)
    keys = COPIES | {"tokenizer": "none"}
    kept = upcycle.convert(str(source), tmp_path / "kept", **keys)
    wide = upcycle.convert(str(source), tmp_path / "wide", dtype="float32", **keys)
    assert kept.plan.promise == "rounded"
    assert "the norm before the FFN and its biases are parts of the experts" in kept.plan.promise_reason
    assert kept.verification is not None
    assert kept.verification.verdict == "approximate"
    assert wide.verification is not None
    assert wide.verification.verdict == "exact"
    experts = {s.dtype for n, s in SafetensorsFolder(tmp_path / "kept").specs.items() if ".experts." in n}
    assert experts == {"bfloat16"}


def test_what_has_no_biases_stays_exact_in_half_precision(pico: Pico, tmp_path: Path) -> None:
    read(pico("stablelm"), torch.bfloat16).save_pretrained(tmp_path / "source")
    made = upcycle.convert(str(tmp_path / "source"), tmp_path / "out", **COPIES, tokenizer="none").verification
    assert made is not None
    assert made.verdict == "exact"
    dense, moe = (load_file(tmp_path / part / "model.safetensors") for part in ("source", "out"))
    down = moe["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    assert torch.equal(down * 2, dense["model.layers.1.mlp.down_proj.weight"])


TIED = [
    ({"router": "zero", "experts": 2}, "the zero router makes equal rows", "--router random"),
    (
        {"method": "virtual_groups", "parameters": {"granularity": 2}},
        "gives experts of a group equal rows",
        "sparse_up",
    ),
]


@pytest.mark.parametrize(("keys", "message", "hint"), TIED)
def test_equal_logits_are_refused(keys: dict[str, Any], message: str, hint: str, pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        upcycle.convert(str(pico("olmo")), tmp_path / "out", **COPIES | keys)
    assert hint in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_saved_router_of_equal_rows_is_refused(pico: Pico, tmp_path: Path) -> None:
    upcycle.convert(str(pico("olmo")), tmp_path / "first", **COPIES)
    saved = tmp_path / "first" / "blueprint.safetensors"
    tensors, metadata = load_file(saved), SafetensorsFile(saved).metadata
    tensors["layers.1.router"][2] = tensors["layers.1.router"][0]
    save_file(tensors, saved, dict(metadata))
    with pytest.raises(RefusalError, match="layer 1: two rows of the router are equal"):
        upcycle.convert(str(pico("olmo")), tmp_path / "out", blueprint=saved, target="phimoe")


@pytest.mark.parametrize("scale", ["exact", "sum"])
def test_no_scale_of_a_split_multiplies_the_down_bias(scale: str, pico: Pico, tmp_path: Path) -> None:
    keys = {"method": "random_split", "experts": 8, "top_k": 2, "scale": scale, "verification": {"tokens": 64}}
    found = upcycle.convert(str(pico("jais2")), tmp_path / "out", **keys).verification
    assert found is not None
    assert found.verdict == "approximate"
    assert found.all_experts_error is not None
    assert found.all_experts_error < 1e-6


def test_the_plan_says_what_the_router_means(pico: Pico) -> None:
    told = "\n".join(upcycle.plan(str(pico("jais2")), experts=4).warnings)
    assert "no loss on the tokens reaches the router" in told
    assert "In bfloat16" in told
    assert "computes silu whatever hidden_act says (relu)" in told
    assert "its experts have gates" in told
    # Two experts of 104 neurons with three matrices each, in the place of 96 with two.
    assert "each token runs 2 copies of the FFN: 3.25x its compute" in told
    assert "computes silu" not in "\n".join(upcycle.plan(str(pico("stablelm")), experts=4).warnings)


@pytest.mark.parametrize("name", FOLDED)
def test_a_constant_that_is_not_one_breaks_the_promise(
    name: str, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_experts.ConstantInput, "along", property(lambda self: 1.01 / (self.width * self.level)))
    with pytest.raises(VerificationError, match="relative logit error"):
        upcycle.convert(str(pico(name)), tmp_path / "out", **COPIES)


def test_a_rope_that_depends_on_the_length_is_refused(pico: Pico, tmp_path: Path) -> None:
    source = tmp_path / "source"
    read(pico("jais2")).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusalError, match=r"neither plain nor scaled by one factor \(rope_type dynamic\)"):
        upcycle.convert(str(source), tmp_path / "out", tokenizer="none", **COPIES)


def test_buffers_of_old_files_are_left_out(pico: Pico, tmp_path: Path) -> None:
    """Files of GPT-NeoX from before transformers 4.30 hold masks beside the weights."""
    read(pico("gpt-neox")).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    prefix = "gpt_neox.layers.0.attention"
    old = {f"{prefix}.bias": torch.ones(1, 1, 8, 8), f"{prefix}.masked_bias": torch.tensor(-1e9)}
    save_file({**load_file(file), **old}, file, {"format": "pt"})
    made = upcycle.convert(str(tmp_path / "source"), tmp_path / "out", tokenizer="none", **COPIES)
    assert made.verification is not None
    assert made.verification.verdict == "exact"
    save_file({**load_file(file), "gpt_neox.layers.0.attention.rope": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"attention\.rope' is not part of a gpt_neox model"):
        upcycle.convert(str(tmp_path / "source"), tmp_path / "other", tokenizer="none", **COPIES)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("stablelm", {"partial_rotary_factor": 0.01}, "turns 0 of 'head_dim' 80"),
        ("stablelm", {"head_dim": 64}, "'head_dim' is 64"),
        ("gpt_neox", {"use_parallel_residual": False, "hidden_size": 6145}, "not a multiple of"),
    ],
)
def test_heads_that_the_stock_class_cannot_run_are_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load("family", family)().config({"model_type": family, **changes})


@pytest.mark.one_in(4)
@pytest.mark.parametrize("change", [0.0, 0.3])
@pytest.mark.parametrize("name", ["starcoder2", "nemotron-bias", "olmo"])
def test_models_are_mixed(name: str, change: float, branches: Callable[..., list[Path]], tmp_path: Path) -> None:
    """The norms of the sources differ, and all experts read the mean of them."""
    sources = [str(folder) for folder in branches(2, change, name)]
    keys = {
        "target": "phimoe",
        "method": "branch_train_mix",
        "top_k": 2,
        "verification": {"tokens": 64},
        "tokenizer": "none",
    }
    found = upcycle.convert(None, tmp_path / "out", sources=sources, **keys).verification
    assert found is not None
    assert found.verdict == ("approximate" if change else "exact")
    if change:
        assert found.all_experts_error is not None
        assert found.all_experts_error < 1e-6


def test_every_family_of_the_room_is_here() -> None:
    assert set(FIRST) == {name for name, place in FAMILIES.items() if ".layer_norm." in place}
