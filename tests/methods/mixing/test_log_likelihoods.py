"""Log likelihoods against transformers' own logits, in memory and streamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.errors import CheckpointError
from upcycle.methods.mixing import log_likelihoods as likelihood
from upcycle.methods.mixing.log_likelihoods import log_likelihoods
from upcycle.progress import SILENT

IDS = torch.randint(4096, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("streamed", [False, True])
def test_against_the_softmax_of_stock_logits(
    streamed: bool, pico: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "available_memory", lambda: 1 if streamed else 1 << 40)
    # Two windows at a time.
    monkeypatch.setattr(likelihood, "_LOGIT_BYTES", 8 * 12 * 4096 * 2 // (8 if streamed else 1))
    found = log_likelihoods(DenseCheckpoint.open(str(pico("llama"))), IDS, "keep", SILENT)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(pico("llama"))(IDS).logits.double().numpy()
    assert found.shape == (5, 11)
    assert found.dtype == torch.float64
    for n in range(5):
        for t in range(11):
            row = logits[n, t]
            expected = row[IDS[n, t + 1]] - np.log(np.exp(row - row.max()).sum()) - row.max()
            # Logits are fp32 sums of 32 products, computed in other batches: some roundings of 2^-24 of the largest.
            assert abs(found[n, t].item() - expected) < 64 * 2.0**-24 * np.abs(row).max()


def test_likelihoods_that_are_not_finite(pico: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("llama"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="a likelihood that is not finite"):
        log_likelihoods(DenseCheckpoint.open(str(folder)), IDS, "keep", SILENT)
