"""Any model that can be named, dense or MoE, in memory as stock transformers runs it."""

from __future__ import annotations

from typing import Any

import torch

from upcycle.architectures import stock
from upcycle.errors import EnvironmentFault
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.locate import locate
from upcycle.hardware.memory import available_memory
from upcycle.models.stock_model import use_eager_experts


def load_model(name: str, dtype: Any = torch.float32, eager_experts: bool = True) -> Any:
    """A stock causal language model in evaluation mode.

    Args:
        name: folder, hub id, ``.gguf`` file or ``demo``.
        dtype: of its weights; ``auto``: as stored. A ``.gguf`` file is read in fp32.
        eager_experts: run experts one after another, as ``verify`` does, and not with transformers' default kernel.

    Raises:
        UsageError: there is no such model.
        CheckpointError: transformers cannot load it.
        EnvironmentFault: it does not fit in memory, or the hub cannot be reached.
    """
    path = locate(name).path
    if path.is_file():
        return stock.load_model(path, torch.float32).eval()
    specs = SafetensorsFolder(path).specs.values()
    needed = sum(spec.nbytes if dtype == "auto" else spec.elements * dtype.itemsize for spec in specs)
    if needed > 0.9 * available_memory():
        raise EnvironmentFault(
            f"{name} needs about {needed / 1e9:.0f} GB, and {available_memory() / 1e9:.0f} GB are available",
            hint="use a machine with more memory",
        )
    model = stock.load_model(path, dtype, surplus=True).eval()
    return use_eager_experts(model) if eager_experts else model
