"""Experts of low rank beside FFNs: the papers' formulas in fp64, instructions and their clusters, and folders."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import upcycle.models  # noqa: F401
from upcycle.errors import CheckpointError
from upcycle.models.own.adapted_ffn import AdaptedFfn
from upcycle.models.own.configuration import wrapped_config
from upcycle.models.own.instructions import Instruction, InstructionClusters
from upcycle.models.own.routing.tempered import TemperedRule
from upcycle.models.own.routing.top_k import TopKRule

D, F, V, C, LEAD = 16, 24, 96, 5, 6
SIZES = {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": V}
LLAMA = LlamaConfig(hidden_size=D, intermediate_size=F, num_key_value_heads=1, max_position_embeddings=64, **SIZES)
GPT2 = GPT2Config(n_embd=D, n_layer=2, n_head=2, n_inner=F, n_positions=64, vocab_size=V)
LINEARS = ("gate_proj", "up_proj", "down_proj")
PATHS = (("layers.0.mlp",), ("layers.1.mlp",))
BY_CLUSTER = AdaptedFfn(PATHS, D, LINEARS, "", 2, 1.5, 3, True, TemperedRule(temperature=0.3), C, 4, V, LEAD)
BY_TOKEN = AdaptedFfn(PATHS, D, LINEARS, "", 2, 1.5, 3, True, TemperedRule(temperature=0.3))
ADAPTERS = AdaptedFfn(PATHS, D, (), "silu", 3, 1.0, 4, False, TopKRule(2))
CONV1D = AdaptedFfn((("h.0.mlp",),), D, ("c_fc", "c_proj"), "", 2, 1.0, 3, False, TopKRule(1, normalized=False))


def made(ffn: AdaptedFfn, base: Any = LLAMA) -> Any:
    """A model in fp64, every weight random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(wrapped_config(base, [], adapted=[ffn])).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                weight.normal_(std=0.4)
        if ffn.clusters:
            centroids = torch.randn(C, D, dtype=torch.float64) * 0.3
            clusters = model.base_model.instruction_clusters
            clusters.products = (model.get_input_embeddings().weight @ centroids.T).float()
            clusters.norms = centroids.square().sum(1).float()
    return model


def ids(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(1))


def lora(block: Any, name: str, gates: torch.Tensor, x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    """``W x + sum_e G_e scale B_e A_e x``, expert by expert; ``gates`` is of one token."""
    pair, rank = block.experts.pairs[name], block.experts.pairs[name].rank
    for expert, gate in enumerate(gates):
        rows = slice(rank * expert, rank * expert + rank)
        y = y + gate * scale * (pair.b[rows].T @ (pair.a[rows] @ x))
    return y


def tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """MoCLE's weights of one token: the largest of a softmax, and what it lacks to 1 for the universal expert."""
    soft = (logits / temperature).softmax(0)
    best = int(soft.argmax())
    gates = torch.zeros(len(logits) + 1, dtype=torch.float64)
    gates[best], gates[-1] = soft[best], 1 - soft[best]
    return gates


@pytest.mark.parametrize("ffn", [BY_CLUSTER, BY_TOKEN], ids=["clusters", "tokens"])
def test_mocle_is_its_formula(ffn: AdaptedFfn) -> None:
    model = made(ffn)
    block, dense = model.model.layers[1].mlp, model.model.layers[1].mlp.dense
    x = torch.randn(1, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    clusters = torch.tensor([[0, 4, 4, 2, 1, 3, 0]])
    block.clusters = clusters
    with torch.no_grad():
        found = block(x)[0]
        for token, row in enumerate(x[0]):
            read = block.router.clusters[clusters[0, token]] if ffn.clusters else row
            gates = tempered(block.router.weight @ read, 0.3)
            gate, up = (
                lora(block, name, gates, row, getattr(dense, name).weight @ row, 1.5)
                for name in ("gate_proj", "up_proj")
            )
            hidden = gate * gate.sigmoid() * up
            expected = lora(block, "down_proj", gates, hidden, dense.down_proj.weight @ hidden, 1.5)
            torch.testing.assert_close(found[token], expected, rtol=1e-10, atol=1e-12)


def test_adapters_are_pescs_formula() -> None:
    """Every expert is the whole FFN with its adapter, and the two best are averaged by their weights."""
    model = made(ADAPTERS)
    block, pair = model.model.layers[0].mlp, model.model.layers[0].mlp.experts.pairs["output"]
    x = torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = block(x)
        for token, row in enumerate(x):
            y, soft = block.dense(row), (block.router.weight @ row).softmax(0)
            best = soft.topk(2).indices.tolist()
            expected = torch.zeros(D, dtype=torch.float64)
            for expert in best:
                rows = slice(3 * expert, 3 * expert + 3)
                inner = pair.a[rows] @ y
                adapted = y + pair.b[rows].T @ (inner * inner.sigmoid())
                expected += soft[expert] / soft[best].sum() * adapted
            torch.testing.assert_close(found[token], expected, rtol=1e-10, atol=1e-12)


def test_gpt2s_layers_that_are_stored_turned_have_experts_too() -> None:
    model = made(CONV1D, GPT2)
    block, dense = model.transformer.h[0].mlp, model.transformer.h[0].mlp.dense
    x = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        soft = (block.router.weight @ x).softmax(0)
        gates = torch.where(soft == soft.max(), soft, 0)
        hidden = dense.act(lora(block, "c_fc", gates, x, dense.c_fc(x), 1.0))
        expected = lora(block, "c_proj", gates, hidden, dense.c_proj(hidden), 1.0)
        torch.testing.assert_close(block(x[None])[0], expected, rtol=1e-10, atol=1e-12)


def test_gradients_are_finite_differences() -> None:
    """Of the router and of the experts, the universal one included."""
    model = made(BY_TOKEN)
    block = model.model.layers[0].mlp
    x = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    names = ("router.weight", "experts.pairs.up_proj.a", "experts.pairs.down_proj.b")

    def run(*values: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))
        return out

    given = tuple(block.get_parameter(name).detach().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(run, given, fast_mode=True)


def nearest(seen: list[list[float]], centroids: torch.Tensor) -> int:
    mean = [sum(column) / len(seen) for column in zip(*seen, strict=True)]
    return min(range(C), key=lambda c: math.dist(mean, centroids[c].tolist()))


def test_a_tokens_cluster_is_that_of_its_documents_first_tokens_up_to_it() -> None:
    """The centroid that is nearest to the mean embedding, document by document, padding and unknown tokens left out."""
    embeddings, centroids = (torch.randn(n, D, generator=torch.Generator().manual_seed(n)) for n in (V, C))
    module = InstructionClusters(BY_CLUSTER)
    module.products, module.norms = embeddings @ centroids.T, centroids.square().sum(1)
    tokens = torch.cat([ids(3, 19), torch.full((3, 1), V + 3)], 1)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, :4] = False
    starts = torch.zeros_like(real)
    starts[0, [0, 3, 12]] = True
    found, _ = module(tokens, real, starts)
    assert len(found.unique()) > 2
    for row in range(3):
        seen: list[list[float]] = []
        for place in range(20):
            if starts[row, place]:
                seen = []
            if real[row, place] and tokens[row, place] < V:
                seen.append(embeddings[tokens[row, place]].tolist())
            if seen:
                assert int(found[row, place]) == nearest(seen[:LEAD], centroids), (row, place)


def test_reading_in_pieces_finds_the_same_clusters() -> None:
    module = InstructionClusters(BY_CLUSTER)
    module.products, module.norms = torch.randn(V, C), torch.rand(C)
    whole, _ = module(ids())
    for first in (1, 3, LEAD, 11):
        before, state = module(ids()[:, :first])
        after, _ = module(ids()[:, first:], before=state)
        assert isinstance(state, Instruction)
        assert torch.equal(torch.cat([before, after], 1), whole)


def test_a_cache_packing_and_padding_change_nothing() -> None:
    model, tokens = made(BY_CLUSTER), ids()
    with torch.no_grad():
        whole = model(tokens).logits
        out = model(tokens[:, :3], use_cache=True)
        pieces = [out.logits]
        for place in range(3, 20):
            out = model(tokens[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-11)
        positions = torch.tensor([[*range(8), *range(12)]]).expand(2, 20)
        packed = model(tokens, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, 8:], model(tokens[:, 8:]).logits, rtol=1e-9, atol=1e-11)
        padded, mask = torch.cat([torch.zeros_like(tokens[:, :4]), tokens], 1), torch.ones(2, 24, dtype=torch.long)
        mask[:, :4] = 0
        places = (mask.cumsum(1) - 1).clamp(min=0)
        left = model(padded, attention_mask=mask, position_ids=places).logits[:, 4:]
        torch.testing.assert_close(left, whole, rtol=1e-9, atol=1e-11)


def test_without_tokens_the_universal_expert_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is given embeddings knows no instruction, and does not keep that of the call before."""
    model, tokens = made(BY_CLUSTER), ids()
    block = model.model.layers[0].mlp
    with torch.no_grad():
        model(tokens)
        assert block.clusters is not None
        model(inputs_embeds=model.get_input_embeddings()(tokens))
        assert block.clusters is None
        gates = block.gates(torch.zeros(1, 2, D, dtype=torch.float64))
    assert gates.tolist() == [[0.0, 0.0, 0.0, 1.0]] * 2


def test_a_folder_and_a_copy_hold_all_of_it(tmp_path: Path) -> None:
    model, tokens = made(BY_CLUSTER).float(), ids()
    with torch.no_grad():
        expected = model(tokens).logits
        model.save_pretrained(tmp_path)
        again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(again(tokens).logits, expected)
        half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.model.instruction_clusters.products.dtype == torch.float32
        before = half.model.instruction_clusters.products.clone()
        assert torch.equal(half.bfloat16().model.instruction_clusters.products, before)  # as DeepSpeed casts it
        other = copy.deepcopy(again)
        for pair in other.model.layers[0].mlp.experts.pairs.values():
            pair.b.zero_()
        assert torch.equal(again(tokens).logits, expected)  # the copy's hooks are its own
        assert not torch.equal(other(tokens).logits, expected)
        warm = AutoModelForCausalLM.from_pretrained(tmp_path, routing={"temperature": 9.0})
    assert warm.model.layers[1].mlp.rule.temperature == 9
    prompt = tokens[:, :8]
    told: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(prompt, **told), again.generate(prompt, use_cache=False, **told))


def test_a_linear_layer_in_the_place_of_another_has_experts_too() -> None:
    """As quantisation replaces layers; one that stands around the layer, as peft puts it, is not counted twice."""
    model, tokens = made(BY_TOKEN), ids()
    with torch.no_grad():
        expected = model(tokens).logits
        dense = model.model.layers[0].mlp.dense
        dense.up_proj = copy.deepcopy(dense.up_proj)
        dense.up_proj._forward_hooks.clear()
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)
        dense.up_proj = torch.nn.Sequential(dense.up_proj)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "'adapted_ffns\\[0\\].rank' must be a positive integer, got 0"),
        ({"linears": ["gate"]}, "names the linear layer 'gate', which a LlamaMLP does not have"),
        ({"linears": [], "activation": "no"}, "activation' must be an activation of transformers, got 'no'"),
        ({"paths": [["layers.7.mlp"]]}, "names the module 'layers.7.mlp', which a llama model does not have"),
        ({"paths": [["layers.0.mlp"], ["layers.0.mlp"]]}, "the module 'layers.0.mlp' is replaced twice"),
        ({"routing": {"rule": "expert_choice"}}, "the rule expert_choice looks at other tokens"),
        ({"routing": {"rule": "top_k", "top_k": 4}}, "'top_k' is 4, and there are 3 experts"),
        ({"hidden_size": 17}, "reads vectors of 'hidden_size' 17"),
        ({"vocabulary": None}, "vocabulary' must be a positive integer, got None"),
        ({"roles": 1}, "roles' is unknown"),
    ],
)
def test_wrong_keys_are_named(changes: dict[str, Any], message: str) -> None:
    entry = {**BY_CLUSTER.to_json(), **changes}
    with pytest.raises(CheckpointError, match=message):
        config = type(wrapped_config(LLAMA, []))
        AutoModelForCausalLM.from_config(
            config.from_dict(
                {**LLAMA.to_dict(), "base_model_type": "llama", "replaced_ffns": [], "adapted_ffns": [entry]}
            )
        )


def test_instructions_are_clustered_once() -> None:
    other = AdaptedFfn(PATHS[1:], D, LINEARS, "", 2, 1.5, 3, True, TemperedRule(), C + 1, 4, V, LEAD)
    first = AdaptedFfn(PATHS[:1], D, LINEARS, "", 2, 1.5, 3, True, TemperedRule(), C, 4, V, LEAD)
    with pytest.raises(CheckpointError, match="a model's instructions are clustered once"):
        wrapped_config(LLAMA, [], adapted=[first, other])
