"""Every number about routing against plain loops, on drawn choices and on what stock routers of a pico model choose."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import upcycle
from upcycle.report.collect import Wanted, collect
from upcycle.report.data.experts import mean_cosine, output_directions
from upcycle.report.data.routing import Choices, coselection, routing_data, row_cosine, spread, top_tokens

T, E, K = 60, 5, 2


def draw(tokens: int = T, experts: int = E, top_k: int = K, layers: int = 1) -> Choices:
    """Choices in which expert 3 is never taken and expert 0 often."""
    rng = torch.Generator().manual_seed(0)
    weights = torch.rand(layers, tokens, experts, generator=rng)
    weights[..., 0] += 0.4
    weights[..., 3] = -1
    return Choices(
        experts={layer: weights[layer].topk(top_k).indices.to(torch.int16) for layer in range(layers)},
        counts=dict.fromkeys(range(layers), experts),
        tokens=torch.randint(0, 7, (tokens,), generator=rng),
        domains=(torch.arange(tokens) >= tokens // 3).long(),
        names=["first", "second"],
    )


def test_load_balance_and_specialisation() -> None:
    choices = draw()
    rows = torch.randn(E, 4, generator=torch.Generator().manual_seed(1))
    data = routing_data(choices, {0: rows}, str)
    (layer,) = data["layers"]
    picks = choices.experts[0].tolist()
    counts = [sum(expert in row for row in picks) for expert in range(E)]
    mean = sum(counts) / E
    assert layer["counts"] == counts
    assert layer["load"] == pytest.approx([count / mean for count in counts], abs=1e-4)
    assert layer["max_violation"] == pytest.approx(max(counts) / mean - 1)
    shares = [count / sum(counts) for count in counts if count]
    assert layer["entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(E))
    assert layer["dead_experts"] == [3]
    loads = []
    for domain in (0, 1):
        mine = [row for row, d in zip(picks, choices.domains.tolist(), strict=True) if d == domain]
        loads.append([sum(expert in row for row in mine) / (K * len(mine)) for expert in range(E)])
    divergence = sum(
        p * math.log(p / ((loads[0][e] + loads[1][e]) / 2)) / 2 for row in loads for e, p in enumerate(row) if p
    )
    assert layer["specialisation"] == pytest.approx(divergence / math.log(2))
    cosines = {
        (i, j): torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=0).item()
        for i in range(E)
        for j in range(E)
        if i != j
    }
    assert layer["router_cosine_mean"] == pytest.approx(sum(cosines.values()) / len(cosines), abs=1e-6)
    closest = layer["router_closest"]
    assert closest["cosine"] == pytest.approx(max(cosines.values()), abs=1e-6)
    assert cosines[tuple(closest["experts"])] == pytest.approx(max(cosines.values()), abs=1e-6)
    (shown,) = data["shown"]
    assert torch.tensor(shown["domain_load"]).flatten().tolist() == pytest.approx(
        [E * p for row in loads for p in row], abs=1e-4
    )
    assert shown["router_cosine"][1][2] == pytest.approx(cosines[1, 2], abs=1e-4)


def test_rows_that_all_point_away_from_each_other_are_not_alike() -> None:
    """No row is compared with itself, which is as near as rows can be."""
    rows = torch.eye(E) - 1 / E  # the corners of a simplex: every cosine is -1 / (E - 1)
    (layer,) = routing_data(draw(), {0: rows}, str)["layers"]
    first, second = layer["router_closest"]["experts"]
    assert first != second
    assert layer["router_closest"]["cosine"] == pytest.approx(-1 / (E - 1))


def test_coselection() -> None:
    choices = draw()
    picks, ratios = choices.experts[0].tolist(), coselection(choices, 0)
    assert ratios is not None
    for i in range(E):
        for j in range(E):
            together = sum(i in row and j in row for row in picks)
            first, second = (sum(expert in row for row in picks) for expert in (i, j))
            if i == j or not first or not second:
                assert ratios[i][j] is None
                continue
            even = first * second / T * (E * (K - 1)) / (K * (E - 1))
            assert ratios[i][j] == pytest.approx(together / even, abs=1e-4)


def test_coselection_is_one_where_every_pair_is_equally_frequent() -> None:
    pairs = torch.combinations(torch.arange(4), 2)
    choices = Choices({0: pairs}, {0: 4}, torch.zeros(6), torch.zeros(6, dtype=torch.long), ["text"])
    ratios = coselection(choices, 0)
    assert ratios is not None
    assert {ratios[i][j] for i in range(4) for j in range(4) if i != j} == {1.0}


@pytest.mark.parametrize("top_k", [1, E])
def test_coselection_says_nothing_of_one_or_all(top_k: int) -> None:
    assert coselection(draw(top_k=top_k), 0) is None


def test_top_tokens() -> None:
    choices = draw()
    picks, ids = choices.experts[0].tolist(), choices.tokens.tolist()
    for expert, found in enumerate(top_tokens(choices, 0, lambda token: f"<{token}>")):
        mine = [token for token, row in zip(ids, picks, strict=True) if expert in row]
        excess = {token: mine.count(token) - len(mine) * ids.count(token) / T for token in set(mine)}
        best = sorted((value for value in excess.values() if value > 0), reverse=True)[:6]
        assert [entry["excess"] for entry in found] == pytest.approx(best, abs=0.051)
        for entry in found:
            assert entry["text"] == f"<{entry['token']}>"
            assert entry["count"] == mine.count(entry["token"])


def test_rows_of_zeros_are_like_no_other() -> None:
    cosine = row_cosine(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
    assert cosine.tolist() == torch.eye(3).tolist()


def test_shown_layers_are_spread() -> None:
    assert spread([1, 2, 3], 4) == [1, 2, 3]
    assert spread(list(range(30)), 4) == [0, 10, 19, 29]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("dense", "keys"),
    [
        ("llama", {"method": "random_split", "experts": 4, "top_k": 2, "shared": 2}),
        ("llama", {"experts": 4, "top_k": 2, "target": "mixtral"}),
        ("lfm2", {"experts": 4, "top_k": 2}),  # a bias on the choice, sigmoid scores
    ],
)
def test_a_pico_model_against_its_routers_own_outputs(
    dense: str, keys: dict[str, object], pico: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from upcycle.architectures.stock import load_tokenizer
    from upcycle.text.reading.plain_text import read_text
    from upcycle.text.windows import encode, windows_of

    out = tmp_path / "out"
    upcycle.convert(str(pico(dense)), out, **keys, verification={"enabled": False})
    _, data = collect(str(out), Wanted(texts=["prose", "code"], tokens=128, prompts=["def"]))
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = load_tokenizer(out)
    windows = [windows_of([encode(tokenizer, read_text(name))], 128, 128) for name in ("prose", "code")]
    chosen: dict[int, list[torch.Tensor]] = {}
    for i, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if name.endswith((".gate", ".router")) and hasattr(module, "top_k"):
                module.register_forward_hook(lambda _, __, output, i=i: chosen.setdefault(i, []).append(output[2]))
    with torch.no_grad():
        logits = [model(batch).logits for batch in windows]
    assert [layer["layer"] for layer in data["routing"]["layers"]] == sorted(chosen)
    for layer in data["routing"]["layers"]:
        counts = torch.bincount(torch.cat(chosen[layer["layer"]]).flatten(), minlength=4)
        assert layer["counts"] == counts.tolist()
        assert layer["max_violation"] == pytest.approx((counts.max() / counts.float().mean() - 1).item(), abs=1e-6)
    for domain, batch, scores in zip(data["quality"]["domains"], windows, logits, strict=True):
        loss = torch.nn.functional.cross_entropy(scores[0, :-1], batch[0, 1:])
        assert domain["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    exact = "method" not in keys
    assert data["quality"]["ratio"] == (pytest.approx(1, abs=1e-4) if exact else pytest.approx(1, abs=0.9))
    for layer in data["experts"]["layers"]:
        if exact:  # copies compute what the dense FFN does
            assert layer["to_dense"] == pytest.approx([1.0] * 4, abs=1e-4)
            assert layer["to_each_other"] == pytest.approx(1.0, abs=1e-4)
        else:
            assert max(layer["to_dense"]) < 0.999
    json.dumps(data, allow_nan=False)


def test_cosines_of_outputs() -> None:
    experts = MixtralExperts(MixtralConfig(hidden_size=5, intermediate_size=4, num_local_experts=3))
    for seed, weight in enumerate((experts.gate_up_proj, experts.down_proj)):
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    cosine = mean_cosine(output_directions(experts, x))
    outputs = []
    for expert in range(3):
        gate, up = experts.gate_up_proj[expert].detach().double().split(4)
        hidden = torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)
        outputs.append(hidden @ experts.down_proj[expert].detach().double().T)
    for i in range(3):
        for j in range(3):
            pairs = [torch.dot(a, b) / (a.norm() * b.norm()) for a, b in zip(outputs[i], outputs[j], strict=True)]
            assert cosine[i, j].item() == pytest.approx((sum(pairs) / len(pairs)).item(), abs=1e-5)
