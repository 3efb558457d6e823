"""SpheroMoE against its formula in fp64, and what its description must say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import gelu
from wrapped_models import auto_class, inputs_of, output_of, relative_error, small_model

from upcycle.errors import CheckpointError
from upcycle.models.own.configuration import wrapped_config
from upcycle.models.own.modeling import wrapped_model_class
from upcycle.models.own.slot_ffn import SlotFfn
from upcycle.models.own.slots import SlotBlock

pytestmark = pytest.mark.one_in(3)  # the other cases are long

D, N, WIDTHS = 6, 7, (8, 4, 2, 2)
FFN = SlotFfn((("mlp",),), D, "gelu", False, True, WIDTHS, slots=2)


def block(**changes: Any) -> SlotBlock:
    """In fp64, every number random."""
    made = SlotBlock(SlotFfn(**{**vars(FFN), **changes})).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(0.4 + drawn.abs() if "temperature" in name else drawn)
    return made


def tokens() -> torch.Tensor:
    return torch.randn(3, N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def restated(made: SlotBlock, x: torch.Tensor) -> torch.Tensor:
    """One sequence ``[n, d]``, slot by slot and token by token."""
    p = dict(made.named_parameters())
    queries, keys = [], []
    for one in p["queries"]:
        row = (one - one.mean()) / (one.var(unbiased=False) + 1e-5).sqrt() * p["query_norm.weight"] + p[
            "query_norm.bias"
        ]
        queries.append(row / row.norm())
    for token in x:
        key = token * p["key_scale"] + p["key_shift"]
        keys.append(key / key.norm())
    cosines = torch.stack([torch.stack([key @ query for query in queries]) for key in keys])
    made_of = []
    for slot in range(len(queries)):
        shares = (cosines[:, slot] / p["dispatch_temperature"]).exp()
        read = sum(share * token for share, token in zip(shares / shares.sum(), x, strict=True))
        expert = slot // made.slots
        first = sum(made.experts.widths[:expert])
        out = p["experts.down_bias"][expert].clone()
        for j in range(first, first + made.experts.widths[expert]):
            out = out + gelu(p["experts.up"][j] @ read + p["experts.up_bias"][j]) * p["experts.down"][j]
        made_of.append(out)
    result = []
    for row in cosines:
        shares = (row / p["combine_temperature"]).exp()
        result.append(sum(share * out for share, out in zip(shares / shares.sum(), made_of, strict=True)))
    return torch.stack(result)


@pytest.mark.parametrize("implementation", ["upcycle", "eager"])
def test_it_is_the_formula_for_every_sequence_alone(implementation: str) -> None:
    made, x = block(), tokens()
    made.experts.implementation = implementation
    expected = torch.stack([restated(made, one) for one in x])
    assert torch.allclose(made(x), expected, rtol=1e-10, atol=1e-10)
    assert torch.allclose(made(x[0]), expected[0], rtol=1e-10, atol=1e-10)
    rows = torch.cat([x, x], 1)[:, :12].view(3, 3, 4, D)
    assert torch.allclose(made(rows), made(rows.view(3, 12, D)).view_as(rows))


@pytest.mark.parametrize("implementation", ["upcycle", "eager"])
def test_gradients_are_finite_differences(implementation: str) -> None:
    made, x = block(), tokens()[:1, :3].clone().requires_grad_()
    made.experts.implementation = implementation
    names = [name for name, _ in made.named_parameters()]

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(made, dict(zip(names, weights, strict=True)), (x,))
        return out

    assert torch.autograd.gradcheck(run, (x, *made.parameters()))


def test_the_order_of_tokens_and_of_experts_does_not_matter() -> None:
    made, x = block(), tokens()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(made(x[:, order]), made(x)[:, order], rtol=1e-10, atol=1e-12)
    moved = block(widths=WIDTHS[::-1])
    with torch.no_grad():
        moved.load_state_dict(made.state_dict())
        moved.queries.copy_(made.queries.view(4, 2, D).flip(0).reshape(8, D))
        moved.experts.down_bias.copy_(made.experts.down_bias.flip(0))
        for name in ("up", "down", "up_bias"):
            pieces = getattr(made.experts, name).split(list(WIDTHS))
            getattr(moved.experts, name).copy_(torch.cat(pieces[::-1]))
    assert torch.allclose(moved(x), made(x), rtol=1e-10, atol=1e-12)


def test_padding_is_in_no_slot() -> None:
    made, x = block(), tokens()
    alone = made(x[:, :4])
    made.mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]] * 3)
    assert torch.allclose(made(x)[:, :4], alone, rtol=1e-10, atol=1e-12)
    made.mask = torch.zeros(3, N)
    assert made(x).isfinite().all()


def test_noise_and_expert_dropout_are_of_training_alone() -> None:
    made, x = block(noise=0.0, expert_dropout=0.5), tokens()
    expected = made(x)
    made.train()
    torch.manual_seed(0)
    combine = made.weights(x)[1]
    gone = (combine == 0).all(0).all(0).view(4, 2)
    assert torch.equal(gone[:, 0], gone[:, 1])  # whole experts
    assert 0 < int(gone[:, 0].sum()) < 4
    assert torch.allclose(combine.sum(-1), torch.ones(3, N, dtype=torch.float64))
    everyone = block(noise=0.0, expert_dropout=1.0).train()
    assert torch.allclose(everyone(x), expected)  # never all of them
    assert not torch.allclose(block(noise=1.0).train()(x), expected)


@pytest.mark.long
@pytest.mark.parametrize("name", ["vit", "deit", "bert", "swin", "convnext"])
def test_it_is_saved_loaded_compiled_and_trained(name: str, tmp_path: Any) -> None:
    from upcycle.models.own.recycling import recycle

    layers: Any = [0] if name in ("swin", "convnext") else "last-half"  # whose stages differ in size
    model = recycle([small_model(name)], core=2, universal=3, width=32, layers=layers)
    blocks = [module for module in model.modules() if isinstance(module, SlotBlock)]
    assert [one.experts.widths for one in blocks] == [(32, 32, 8, 8, 8)]
    model.save_pretrained(tmp_path)
    loaded, report = auto_class(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    expected = output_of(model, inputs_of(name))
    assert relative_error(output_of(loaded, inputs_of(name)), expected) < 2e-6
    assert relative_error(output_of(torch.compile(loaded, backend="aot_eager"), inputs_of(name)), expected) < 2e-6
    model.train()(**inputs_of(name)).logits.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in blocks[0].parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": []}, r"slot_ffns\[0\].widths' must be a list of positive integers"),
        ({"slots": 0}, "slots' must be a positive integer, got 0"),
        ({"expert_dropout": 2}, "expert_dropout' must be a number from 0 to 1"),
        ({"router": 1}, "router' is unknown; known: paths"),
        ({"hidden_size": 48}, "'hidden_size' 48, and the base model's matrix there is"),
        ({"paths": [["layers.9.mlp"]]}, "'layers.9.mlp', which a vit model does not have"),
        ({"paths": [["layers.0.mlp"], ["layers.0.mlp"]]}, "is replaced twice"),
    ],
)
def test_a_wrong_description_is_refused(change: dict[str, Any], message: str) -> None:
    from upcycle.models.own.configuration import UpcycleMoeConfig
    from upcycle.models.own.recycling import recycle

    dense = small_model("vit")
    config = recycle([dense], core=1, universal=1, layers=[0]).config.to_dict()
    (entry,) = config["slot_ffns"]
    with pytest.raises(CheckpointError, match=message):
        wrong = UpcycleMoeConfig.from_dict({**config, "slot_ffns": [{**entry, **change}]})
        wrapped_model_class(type(dense), type(wrong))(wrong)


def test_a_causal_layer_is_refused() -> None:
    dense = small_model("gpt2")
    config = wrapped_config(dense.config, [], [SlotFfn((("h.0.mlp",),), 32, "gelu_new", False, True, (16, 16))])
    with pytest.raises(CheckpointError, match="replaced by slots, which looks at later tokens"):
        wrapped_model_class(type(dense), type(config))(config)
