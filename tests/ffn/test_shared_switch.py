"""The switch of a shared expert: its sigmoid is 1/2 to the last bit however it is computed, llama.cpp's ``silu(x) / x`` included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.ffn.shared_switch import LEAST_SIZE, half_switch, switch_dtype
from upcycle.files.formats.tensor_files import SafetensorsFolder

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def states(width: int, tokens: int = 2000) -> torch.Tensor:
    """Hidden states ``[T, d]`` of many sizes: with outliers, constant channels, one channel alone, and channels that cancel."""
    torch.manual_seed(0)
    usual = torch.randn(tokens, width)
    outliers, alone, dead = usual.clone(), torch.zeros(width, width), usual.clone()
    outliers[:, 1] = 3e4
    alone[range(width), range(width)] = usual[0]
    dead[:, ::2] = 0
    cancelling = usual.clone()
    cancelling[:, : width // 2 * 2 : 4], cancelling[:, 2 : width // 2 * 2 : 4] = 1, -1
    return torch.cat([usual, usual * 1e-4, usual * 1e4, outliers, alone, dead, cancelling])


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_sigmoid_is_one_half_to_the_last_bit(dtype: torch.dtype) -> None:
    """Computed in the dtype of the model, and in fp32 (as transformers and llama.cpp read it)."""
    for computed in (dtype, torch.float32):
        row = half_switch(64, dtype).to(computed)
        logits = states(64).to(computed) @ row.T
        assert torch.equal(logits.sigmoid(), torch.full_like(logits, 0.5))
        assert torch.equal(1 / (1 + torch.exp(-logits)), torch.full_like(logits, 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dividing_by_its_logit_gives_one_half_too(dtype: torch.dtype) -> None:
    """llama.cpp's formula in fp32, the dtype in which it keeps the row; a row of zeros gives NaN."""
    logits = states(64) @ half_switch(64, dtype).float().T
    assert torch.equal(silu(logits) / logits, torch.full_like(logits, 0.5))
    zero = states(64) @ torch.zeros(64, 1)
    assert (silu(zero) / zero).isnan().all()


def test_channels_that_cancel_do_not_leave_zero() -> None:
    """Small whole numbers often sum to exactly 0 where all channels count the same, and rarely here, in whatever order a CPU adds."""
    torch.manual_seed(0)
    x = torch.randint(-64, 65, (100_000, 64)).float()
    rows = (torch.full((1, 64), LEAST_SIZE), half_switch(64, x.dtype))
    for order in (torch.arange(64), torch.randperm(64), torch.arange(64).view(8, 8).T.flatten()):
        constant, made = ((x[:, order] @ row[:, order].T == 0).sum().item() for row in rows)
        assert constant > 50
        assert made < 10


def test_it_has_128_sizes_which_bfloat16_holds() -> None:
    for dtype in DTYPES:
        row = half_switch(300, dtype)
        assert row.shape == (1, 300)
        assert row.unique().tolist() == [LEAST_SIZE * (1 + step / 128) for step in range(128)]
        assert torch.equal(row, row.bfloat16().to(row.dtype))
        assert str(row.dtype) == f"torch.{switch_dtype(str(dtype).removeprefix('torch.'))}"


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("name", "target"), [("llama", "qwen2_moe"), ("qwen3.5", "qwen3_5_moe_text")])
def test_every_target_with_a_switch_writes_it(
    pico: Callable[[str], Path], tmp_path: Path, name: str, target: str, dtype: str
) -> None:
    """Idle shared experts have one, too. Stock transformers computes the same logits with zeros in its place, bit for bit."""
    keys = {"target": target, "dtype": dtype, "tokenizer": "none", "method": "random_split"}
    for shared, experts in ((0, 4), (1, 3)):
        out = tmp_path / str(shared)
        sizes = {"experts": experts, "top_k": experts, "shared": shared}
        upcycle.convert(str(pico(name)), out, **keys, **sizes, verification={"enabled": False})
        folder = SafetensorsFolder(out)
        found = [folder.read(tensor) for tensor in folder.specs if "shared_expert_gate" in tensor]
        assert found
        for row in found:
            assert row.dtype == getattr(torch, switch_dtype(dtype))
            assert torch.equal(row, half_switch(row.shape[1], row.dtype))
    for computed in {dtype, "float32"}:
        model = AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, computed))
        switches = [p for name, p in model.named_parameters() if name.endswith("shared_expert_gate.weight")]
        with torch.no_grad():
            made = model(torch.arange(40)[None]).logits
            for switch in switches:
                switch.zero_()
            assert torch.equal(made, model(torch.arange(40)[None]).logits)
