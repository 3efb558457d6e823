"""Any model that can be named, dense or MoE, in memory as stock transformers runs it."""

from __future__ import annotations

from typing import Any

import torch

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.runtime import available_memory, quiet_transformers, use_eager_experts
from upcycle.sources import locate
from upcycle.tensor_files import SafetensorsFolder


def load_model(name: str) -> Any:
    """A stock causal language model in fp32, in evaluation mode, its experts run one after another.

    Args:
        name: folder, hub id, ``.gguf`` file or ``demo``.

    Raises:
        UsageError: there is no such model, or transformers cannot load it.
        EnvironmentFault: it does not fit in memory, or the hub cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    path = locate(name).path
    if path.is_file():
        from upcycle.checkpoint import DenseCheckpoint
        from upcycle.runtime import dense_model

        return dense_model(DenseCheckpoint.open(name), "float32", streamed=False).model
    needed = 4 * sum(spec.elements for spec in SafetensorsFolder(path).specs.values())
    if needed > 0.9 * available_memory():
        raise EnvironmentFault(
            f"{name} needs about {needed / 1e9:.0f} GB in fp32, and {available_memory() / 1e9:.0f} GB are available",
            hint="evaluate on a machine with more memory",
        )
    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"transformers cannot load {name}: {str(error).splitlines()[0]}") from None
    return use_eager_experts(model.eval())
