"""A stock model of transformers on the Triton kernels gives the logits and gradients it gives without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_oracle import cosine, relative

from upcycle.kernels.gpu.tile_table import TILES_VARIABLE, TileTable


@pytest.mark.slow
def test_mixtral(device: torch.device, table: TileTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from upcycle.kernels.entry.transformers_experts import register_kernels

    table.save(tmp_path / "tiles.json")
    monkeypatch.setenv(TILES_VARIABLE, str(tmp_path / "tiles.json"))
    monkeypatch.setenv("UPCYCLE_KERNELS", "triton")
    register_kernels()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    ids = torch.randint(61, (2, 6), device=device)
    found = {}
    for implementation in ("eager", "upcycle"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        found[implementation] = {"logits": logits.detach(), **gradients}
    for name, wanted in found["eager"].items():
        assert relative(found["upcycle"][name], wanted.double()) < 1e-5, name
        assert cosine(found["upcycle"][name], wanted.double()) > 0.9999, name
