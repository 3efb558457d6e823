"""Single layers of described models, against the stock model as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel
from wrapped_models import SMALL, inputs_of, relative_error, small_model

from upcycle.architectures.described.find_ffns import find_ffns
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.models.layer_runner import LayerRunner, logits_of
from upcycle.models.stock_model import dense_reader, skeleton
from upcycle.registry import load

pytestmark = pytest.mark.one_in(4)  # the other cases are long

CAUSAL = [
    name
    for name, (described, kind, _) in SMALL.items()
    if kind == "CausalLM" and not load("described", described).pauses and name != "apertus"
]
ENCODERS = ["bert", "roberta", "xlm-roberta", "electra", "mpnet", "distilbert", "modernbert", "vit", "deit"]
ROUNDING = 2e-6


@pytest.mark.parametrize("name", CAUSAL)
def test_layers_run_alone_as_in_the_stock_model(name: str, tmp_path: Path) -> None:
    model = small_model(name)
    model.save_pretrained(tmp_path)
    checkpoint = DenseCheckpoint.open(str(tmp_path))
    runner = LayerRunner(checkpoint, "keep", 12)
    ids = torch.randint(5, 94, (3, 12), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        stock = model(ids, output_hidden_states=True)
    states, ffns = runner.embed(ids.flatten()), find_ffns(model, load("described", SMALL[name][0]))
    for index, ffn in enumerate(ffns):
        stream = states * checkpoint.config.residual_multiplier
        assert relative_error(stream, stock.hidden_states[index].reshape(states.shape)) < ROUNDING
        seen: list[torch.Tensor] = []
        first, last = (model.base_model.get_submodule(ffn.replaced[i]) for i in (0, -1))
        hooks = [
            first.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])),
            last.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output.clone())),
        ]
        with torch.no_grad():
            model(ids)
        for hook in hooks:
            hook.remove()
        with runner.loaded(index), torch.no_grad():
            x, residual = runner.around(index, states)
            output = runner.ffn(index, x)
            following, made = runner.outcome(index, states)
            added = runner.added(index, output)
        assert relative_error(made, output) < ROUNDING
        assert relative_error(x, seen[0].reshape(x.shape)) < ROUNDING
        assert relative_error(output, seen[1].reshape(x.shape)) < ROUNDING
        assert relative_error(residual + added, following) < ROUNDING
        assert runner.norms_output == (relative_error(added, output) > 1e-2)
        states = following
    outside = dense_reader(checkpoint, "keep")(None)
    with torch.no_grad():
        logits = logits_of(skeleton(checkpoint.raw_config, outside), checkpoint, states.view(3, 12, -1))
    assert relative_error(logits, stock.logits) < ROUNDING


@pytest.mark.parametrize("headless", [False, True], ids=["head", "no head"])
@pytest.mark.parametrize("name", ENCODERS)
def test_layers_of_encoders_run_alone_as_in_the_stock_model(name: str, headless: bool, tmp_path: Path) -> None:
    model = small_model(name)
    if headless:
        base = AutoModel.from_config(model.config).eval()  # with a pooler, which most heads have no use for
        base.load_state_dict(model.base_model.state_dict(), strict=False)
        model = base
    model.save_pretrained(tmp_path)
    checkpoint, described = DenseCheckpoint.open(str(tmp_path)), load("described", SMALL[name][0])
    given = inputs_of(name)
    with torch.no_grad():
        stock = model.base_model(**given, output_hidden_states=True)
    expected = stock.hidden_states
    window = expected[0].shape[1]
    if described.reads == "images":
        runner = LayerRunner(checkpoint, "keep", window, lambda rows: given["pixel_values"][rows])
        states = runner.embed(torch.arange(2)[:, None].expand(2, window).flatten())
    else:
        runner = LayerRunner(checkpoint, "keep", window)
        states = runner.embed(given["input_ids"].flatten())
    norms: list[torch.Tensor] = []
    for index, ffn in enumerate(find_ffns(model, described)):
        assert relative_error(states, expected[index].reshape(states.shape)) < ROUNDING
        with runner.loaded(index), torch.no_grad():
            x, residual = runner.around(index, states)
            sums = residual + runner.ffn(index, x)
            made, following = runner.closed(index, sums), runner.whole(index, states)
            assert relative_error(runner.summed(index, states), sums) < ROUNDING
        if described.paths.closing is not None:
            norm = model.base_model.get_submodule(f"{ffn.layer}.{described.paths.closing}")
            hook = norm.register_forward_pre_hook(lambda _, args: norms.append(args[0]))
            with torch.no_grad():
                model(**given)
            hook.remove()
            assert relative_error(sums, norms[-1].reshape(sums.shape)) < ROUNDING
        assert relative_error(made, following) < ROUNDING
        states = following
