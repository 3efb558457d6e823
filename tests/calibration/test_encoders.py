"""Calibration of encoders of text against stock transformers: what a layer sees, and what it is fitted to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_cases import text_encoder, weighing_alike
from torch.nn.functional import linear
from transformers.activations import ACT2FN
from wrapped_models import SMALL, auto_class, ffn_weights

import upcycle
import upcycle.models
from upcycle.architectures.described.find_ffns import FoundFfn, find_ffns
from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import RefusalError, UsageError
from upcycle.ffn.blueprint import BlueprintFile
from upcycle.registry import load
from upcycle.text.windows import demo_parts, encode

pytestmark = pytest.mark.one_in(4)  # the other cases are long

E, K, WINDOW, TOKENS = 8, 3, 32, 2048
SPLIT: dict[str, Any] = {
    "method": "random_split",
    "experts": E,
    "top_k": K,
    "router": {"name": "ridge"},
    "calibration": {"text": "prose", "tokens": TOKENS, "window": WINDOW},
    "verification": {"tokens": 64},
}
CALIBRATED = ["bert", "roberta", "electra", "mpnet", "distilbert", "modernbert"]


def windows(folder: Path) -> torch.Tensor:
    """The calibration windows, chosen again: pieces of the text between ``[CLS]`` and ``[SEP]``."""
    ids = encode(load_tokenizer(folder), demo_parts("prose")[0])
    inner = WINDOW - 2
    whole = ids[: len(ids) // inner * inner].view(-1, inner)
    chosen = whole[torch.linspace(0, len(whole) - 1, TOKENS // WINDOW).long()]
    ends = torch.tensor([[0, 1]]).expand(len(chosen), 2)
    return torch.cat([ends[:, :1], chosen, ends[:, 1:]], dim=1)


class Seen:
    """Of every FFN: its input, its output, and the sum of its output and the stream before it; flat, fp64."""

    def __init__(self, model: Any, ffns: list[FoundFfn], closing: str | None, ids: torch.Tensor, dense: bool) -> None:
        self.x: list[torch.Tensor] = []
        self.made: list[torch.Tensor] = []
        self.sums: list[torch.Tensor] = []
        base = model.base_model
        for ffn in ffns:
            first = base.get_submodule(ffn.replaced[0])
            last = base.get_submodule(ffn.replaced[-1]) if dense else first
            layer = base.get_submodule(ffn.layer)
            first.register_forward_pre_hook(lambda _, args: self.x.append(flat(args[0])))
            last.register_forward_hook(lambda _, __, output: self.made.append(flat(output)))
            if closing is None:
                layer.register_forward_hook(lambda _, __, output: self.sums.append(flat(output)))
            else:
                layer.get_submodule(closing).register_forward_pre_hook(lambda _, args: self.sums.append(flat(args[0])))
        with torch.no_grad():
            model(ids)

    def residual(self, index: int) -> torch.Tensor:
        """The stream before an FFN."""
        return self.sums[index] - self.made[index]


def flat(states: torch.Tensor) -> torch.Tensor:
    return states.double().flatten(0, 1).clone()


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("name", CALIBRATED)
def test_refit_is_the_least_squares_solution_on_what_stock_encoders_see(name: str, mode: str, tmp_path: Path) -> None:
    model, out = text_encoder(name, tmp_path / "dense"), tmp_path / "out"
    recipe = {**SPLIT, "calibration": {**SPLIT["calibration"], "mode": mode}}
    result = upcycle.convert(str(tmp_path / "dense"), out, **recipe)
    described, ids = load("described", SMALL[name][0]), windows(tmp_path / "dense")
    ffns, closing = find_ffns(model, described), described.paths.closing
    stock = Seen(model, ffns, closing, ids, dense=True)
    moe = Seen(weighing_alike(auto_class(name).from_pretrained(out).eval()), ffns, closing, ids, dense=False)
    below = moe if mode == "sequential" else stock
    for index, report in enumerate(result.layers):
        blueprint, ffn = BlueprintFile(out / "blueprint.safetensors").layer(index), ffns[index]
        weights = {part: value.double() for part, value in ffn_weights(model.base_model, ffn).items()}
        x, act = below.x[index], ACT2FN[ffn.activation]
        up = linear(x, weights["up"], weights["up_bias"])
        hidden = act(linear(x, weights["gate"], weights["gate_bias"])) * up if ffn.place.gated else act(up)
        assert blueprint.router is not None
        assert blueprint.down is not None
        chosen = linear(x, blueprint.router.double()).topk(K, dim=1).indices
        on = torch.zeros(len(x), E, dtype=torch.float64).scatter_(1, chosen, 1.0)
        active = (hidden[:, blueprint.neurons] * on.repeat_interleave(blueprint.intermediate_size, dim=1)).numpy()
        columns = weights["down"][:, blueprint.neurons].numpy()
        target = (stock.sums[index] - below.residual(index) - weights["down_bias"]).numpy()
        gram = active.T @ active
        ridge = report["strength"] * gram.diagonal().mean() * np.eye(len(gram))
        error = target - active @ columns.T
        # At the least-squares solution the gradient vanishes. In sequence, a token or two that is near a tie in the layer below
        # has another expert in fp64, of 2,048.
        pull = error.T @ active
        found = blueprint.down.double().numpy()
        left = np.linalg.norm(pull - (found - columns) @ (gram + ridge)) / np.linalg.norm(pull)
        assert left <= (1e-4 if mode == "parallel" or index == 0 else 1e-2)
        assert report["error_after"] < report["error_before"]
        assert report["captured"] > report["random"]


def test_the_verification_says_error_and_cosine_on_text_that_was_not_calibrated_on(tmp_path: Path) -> None:
    model, out = text_encoder("bert", tmp_path / "dense"), tmp_path / "out"
    found = upcycle.convert(str(tmp_path / "dense"), out, **SPLIT).verification
    assert found is not None
    assert found.text == "the quarter of the embedded texts that was not calibrated on"
    assert found.unseen is not None
    assert 0 < found.unseen["relative_error"] < 1
    moe = auto_class("bert").from_pretrained(out).eval()
    content = "".join(demo_parts(name)[1] for name in ("prose",))
    ids = encode(load_tokenizer(tmp_path / "dense"), content)[:300].view(-1, 30)
    ends = torch.tensor([[0, 1]]).expand(len(ids), 2)
    ids = torch.cat([ends[:, :1], ids, ends[:, 1:]], dim=1)
    with torch.no_grad():
        one, other = (each.base_model(ids).last_hidden_state for each in (model, moe))
    cosine = torch.cosine_similarity(one, other, dim=-1).mean().item()
    assert found.cosine == pytest.approx(cosine, abs=0.05)  # other windows of the same text
    assert found.unseen["cosine"] == pytest.approx(cosine, abs=0.1)


@pytest.mark.long
def test_a_fit_is_better_than_the_same_split_without_one(tmp_path: Path) -> None:
    text_encoder("bert", tmp_path / "dense")
    errors = []
    for refit in ("none", "down"):
        found = upcycle.convert(str(tmp_path / "dense"), tmp_path / refit, **{**SPLIT, "refit": refit}).verification
        assert found is not None
        errors.append(found.relative_logit_error)
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"calibration": {"text": "self"}}, UsageError, "an encoder writes none"),
        ({"method": "importance"}, RefusalError, "importance goes by the loss of the next token"),
    ],
)
def test_what_needs_a_next_token_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    text_encoder("bert", tmp_path / "dense")
    with pytest.raises(error, match=message):
        upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **{**SPLIT, **changes})
    with pytest.raises(RefusalError, match="compare goes by the loss of the next token"):
        upcycle.compare(str(tmp_path / "dense"))


def test_layers_that_share_an_ffn_are_refused(tmp_path: Path) -> None:
    text_encoder("albert", tmp_path / "dense")
    with pytest.raises(RefusalError, match="several of its layers share one FFN"):
        upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **SPLIT)
