"""Single layers of described models, against the stock model as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from wrapped_models import SMALL, relative_error, small_model

from upcycle.architectures.described.find_ffns import find_ffns
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.models.layer_runner import LayerRunner, logits_of
from upcycle.models.stock_model import dense_reader, skeleton
from upcycle.registry import load

CAUSAL = [
    name
    for name, (described, kind, _) in SMALL.items()
    if kind == "CausalLM" and load("described", described).uncalibrated is None
]
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
