"""Online dynamic pruning: which tokens are protected, and which layers leave experts out, restated token by token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layer_sources import layer_source, random_observations
from transformers import AutoConfig, AutoModelForCausalLM

import upcycle
from upcycle.errors import UsageError
from upcycle.methods.compressing.skip import Skip, SkipParameters, skipping_loss, threshold
from upcycle.models.own.attention_received import received
from upcycle.models.own.routing.skip import SkipRule
from upcycle.models.own.vllm_plugin import what_prevents

Models = Callable[..., Path]


@pytest.mark.parametrize("past", [0, 3])
def test_what_a_token_gets_is_the_mean_over_later_queries(past: int) -> None:
    """Of ``past`` tokens before these, which are in the cache, nothing is said."""
    heads, count = 3, 5
    attention = torch.randn(2, heads, count, past + count, generator=torch.Generator().manual_seed(0)).softmax(-1)
    found = received(attention)
    for b in range(2):
        for j in range(count):
            own = [attention[b, h, i, past + j].item() for h in range(heads) for i in range(j + 1, count)]
            assert found[b, j].item() == pytest.approx(sum(own) / len(own) if own else 0.0, rel=1e-5)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.02, 1), (0.2, 2), (0.21, 3), (0.99, 9)])
def test_the_most_important_tokens_of_every_sequence_are_protected(share: float, count: int) -> None:
    """The last token, of importance 0, never is."""
    importance = torch.rand(3, 10, generator=torch.Generator().manual_seed(1))
    importance[:, -1] = 0
    found = SkipRule(2, beta=0.5, protected=share).important(importance)
    for row, own in zip(importance.tolist(), found.tolist(), strict=True):
        assert [j for j in range(10) if own[j]] == sorted(sorted(range(10), key=lambda j: -row[j])[:count])


def test_protected_tokens_keep_all_their_experts() -> None:
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    protected = torch.arange(40) % 3 == 0
    plain, skipping = SkipRule(3), SkipRule(3, beta=0.9)
    found, usual, whole = skipping.route(logits, None, protected), skipping.route(logits), plain.route(logits)
    for part in range(2):
        assert torch.equal(found[part][protected], whole[part][protected])
        assert torch.equal(found[part][~protected], usual[part][~protected])
    assert not torch.equal(usual.experts, whole.experts)


def test_layers_are_ranked_by_what_their_output_changes() -> None:
    """Against sums over pairs of experts, token by token."""
    seen = random_observations(5, tokens=60)
    beta = threshold(seen.sample_weights, 2, 0.75)
    for rescaled in (False, True):
        change = whole = 0.0
        for weights, gram in zip(seen.sample_weights.tolist(), seen.sample_gram.double().tolist(), strict=True):
            kept = [w if w >= beta * max(weights) else 0.0 for w in weights]
            factor = sum(weights) / sum(kept) if rescaled else 1.0
            gone = [factor * k - w for k, w in zip(kept, weights, strict=True)]
            change += sum(gone[e] * gone[f] * gram[e][f] for e in range(5) for f in range(5))
            whole += sum(weights[e] * weights[f] * gram[e][f] for e in range(5) for f in range(5))
        assert skipping_loss(seen, beta, rescaled) == pytest.approx(change / whole, rel=1e-6)


def test_protected_tokens_leave_less_to_the_others() -> None:
    """Of two experts 75% are kept in all: with a tenth of the tokens protected, the others keep 1 - 0.25 / 0.9 of theirs."""
    seen = random_observations(4, tokens=200)
    cut = Skip(SkipParameters(protect=0.1)).cut(layer_source(seen), 1500)
    assert cut.skip == threshold(seen.sample_weights, 2, 1 - 0.25 / 0.9)
    assert cut.skip > Skip(SkipParameters()).cut(layer_source(seen), 1500).skip


@pytest.fixture(scope="module")
def pruned(pico_moe: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Mixtral of whose two layers one leaves experts out, but not of a quarter of the tokens."""
    out = tmp_path_factory.mktemp("odp") / "out"
    upcycle.convert(
        str(pico_moe("mixtral")),
        out,
        method="skip",
        target="upcycle_moe",
        keep=0.85,
        parameters={"protect": 0.25, "layers": 1},
        calibration={"text": "demo", "tokens": 512, "window": 64},
        refit="none",
        verification={"tokens": 64},
    )
    return out


def test_the_written_model_protects_by_its_attention(pruned: Path) -> None:
    """Experts of every token, against attention as transformers returns it, and the layer's own inputs."""
    model: Any = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    (layer,) = (i for i, own in enumerate(model.model.layers) if own.mlp.rule.beta > 0)
    block, seen = model.model.layers[layer].mlp, {}
    block.register_forward_pre_hook(lambda _, given: seen.update(x=given[0].detach()))
    block.router.register_forward_hook(lambda _, __, made: seen.update(logits=made[0].detach(), ids=made[2]))
    ids = torch.randint(4096, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions[layer].double()
    beta, kept = block.rule.beta, []
    for b in range(2):
        gets = [attention[b, :, j + 1 :, j].mean().item() if j < 23 else 0.0 for j in range(24)]
        importance = [gets[j] * seen["x"][b, j].abs().sum().item() for j in range(24)]
        important = sorted(range(24), key=lambda j: -importance[j])[: math.ceil(0.25 * 24)]
        for j in range(24):
            scores = seen["logits"][24 * b + j].double().softmax(-1).topk(2)
            both = j in important or scores.values[1] >= beta * scores.values[0]
            expected = scores.indices.tolist() if both else [scores.indices[0].item(), 4]
            assert seen["ids"][24 * b + j].tolist() == expected, (b, j)
            kept.append((both, j in important))
    assert (False, False) in kept
    assert any(important and seen["logits"][i].softmax(-1).topk(2).values[1] < beta * seen["logits"][i].softmax(-1).max()
               for i, (_, important) in enumerate(kept))  # fmt: skip


def test_what_is_written_says_it(pruned: Path) -> None:
    layers = json.loads((pruned / "compression.json").read_text())["experts"].values()
    assert sorted("skip" in layer for layer in layers) == [False, True]
    rules = [ffn["routing"] for ffn in json.loads((pruned / "config.json").read_text())["replaced_ffns"]]
    assert sorted(rule["protected"] for rule in rules) == [0.0, 0.25]


def test_a_token_that_is_written_with_a_cache_is_not_protected(pruned: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    ids = torch.randint(4096, (1, 12), generator=torch.Generator().manual_seed(4))
    written = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape == (1, 16)
    assert torch.equal(written[:, :12], ids)


def test_attention_without_weights_is_refused(pruned: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    with pytest.raises(UsageError, match="does not give its weights") as caught:
        model(torch.arange(8)[None])
    assert "eager" in (caught.value.hint or "")
    plain: Any = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32, routing={"protected": 0.0})
    assert plain.config._attn_implementation == "sdpa"


def test_vllm_is_told_before_it_tries(pruned: Path) -> None:
    assert "vLLM's does not give its weights" in (what_prevents(AutoConfig.from_pretrained(pruned)) or "")
    plain = AutoConfig.from_pretrained(pruned, routing={"protected": 0.0})
    assert "weights" not in (what_prevents(plain) or "")


@pytest.mark.parametrize(
    ("parameters", "keep", "message", "hint"),
    [
        ({"protect": 0.4}, 0.6, "would leave other tokens 0.667 of 2 experts", "--keep 0.7 or more"),
        (
            {"layers": 1},
            0.6,
            "with protect=0 and layers=1, keep 0.6 would leave other tokens 0.4 of 2",
            "--keep 0.75 or more",
        ),
    ],
)
def test_shares_that_cannot_be_are_refused(
    parameters: dict[str, Any], keep: float, message: str, hint: str, pico_moe: Models
) -> None:
    keys = {"method": "skip", "target": "upcycle_moe", "keep": keep, "parameters": parameters}
    with pytest.raises(UsageError, match=message) as caught:
        upcycle.plan(str(pico_moe("mixtral")), calibration={"text": "demo"}, **keys)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("count", [1, 2, 3, None])
def test_the_layers_that_lose_least_leave_experts_out(count: int | None) -> None:
    seen = {layer: random_observations(4, seed=layer, tokens=80) for layer in range(3)}
    source: Any = SimpleNamespace(layers={layer: layer_source(own) for layer, own in seen.items()})
    method = Skip(SkipParameters(layers=count, weights="kept"))
    found = method.cuts(source, 1800)
    share = 1 - 0.1 * 3 / (count or 3)  # what is left in those layers, so that 90% of all runs are
    betas = {layer: threshold(own.sample_weights, 2, share) for layer, own in seen.items()}
    losses = {layer: skipping_loss(own, betas[layer], False) for layer, own in seen.items()}
    chosen = sorted(losses, key=lambda layer: losses[layer])[: count or 3]
    assert {layer: cut.skip for layer, cut in found.items()} == {
        layer: pytest.approx(betas[layer]) if layer in chosen else 0.0 for layer in seen
    }
