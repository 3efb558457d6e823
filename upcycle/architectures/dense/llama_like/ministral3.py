"""Ministral 3: Mistral's block, whose attention scores grow with the position behind the length that it was first trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.dense.llama_like.mistral import Mistral
from upcycle.errors import CheckpointError
from upcycle.files.formats.settings import SIZE, is_number

_ROPE = {
    "type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


class Ministral3(Mistral):
    """Describes Ministral 3: queries are multiplied by ``1 + beta log(1 + floor(position / length))``, which is 1 up to ``length``.

    ``length`` is ``original_max_position_embeddings``, and ``beta`` is ``llama_4_scaling_beta``; both are in ``rope_parameters``.
    """

    name = "ministral3"
    title = "Ministral 3"
    defaults = {
        **Mistral.defaults,
        "vocab_size": 131072,
        "num_hidden_layers": 34,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-05,
    }
    keys = {"sliding_window": SIZE.optional, "head_dim": SIZE}
    token_defaults = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11}

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Return the window, by default none."""
        return (raw.get("sliding_window"),) * layers

    def rope(self, raw: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the rope; without any, the class's own."""
        if raw.get("rope_parameters") is None and raw.get("rope_scaling") is None:
            own = {**_ROPE, "max_position_embeddings": values["max_position_embeddings"]}
            raw = {**{key: value for key, value in raw.items() if key != "rope_scaling"}, "rope_parameters": own}
        return super().rope(raw, values, where)

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the feature that no target has."""
        return {"special": frozenset({Feature.GROWING_SCORES})}

    def _check_together(self, config: DenseConfig, raw: Mapping[str, Any], where: str) -> None:
        """Refuse a rope without the two numbers that the stock class reads of every such model.

        Raises:
            CheckpointError: as the base class, and for that.
        """
        super()._check_together(config, raw, where)
        beta, length = (
            config.rope_parameters.get(key) for key in ("llama_4_scaling_beta", "original_max_position_embeddings")
        )
        if not is_number(beta) or length is None:
            raise CheckpointError(
                f"{where}: 'rope_parameters' (or 'rope_scaling') must have 'llama_4_scaling_beta', a number, and "
                f"'original_max_position_embeddings', got {beta} and {length}: the stock class does not run without them",
                hint="correct the key, or download config.json again",
            )
