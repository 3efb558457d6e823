"""What models read, made from token ids or seeds, and what of their output is compared. N inputs, T tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from upcycle.architectures.stock_auto import is_encoder, reads_of
from upcycle.errors import RefusalError
from upcycle.registry import FOUND

_SAMPLES = 16_000  # of a sound: a second at the rate of most models
_IMAGES = "pixel_values"


class ModelRun:
    """Runs a stock model on token ids: what else it reads is random, and depends on these alone.

    Args:
        model: a stock model, or one of upcycle's own.

    Attributes:
        gives_states: whether there are no logits of a next token to compare, but states, or embeddings of images and texts.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._reads = model, reads_of(model.config)
        self.gives_states = is_encoder(model.config)

    def inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the arguments of the model for token ids ``[N, T]``, or for seeds ``[N, 1]`` where it reads no text.

        A decoder reads the same text as its encoder.
        """
        config, seeds = self._model.config, ids.sum(-1)
        match self._reads:
            case "images":
                return {_IMAGES: ids if ids.dim() > 2 else random_images(seeds, config)}
            case "sounds":
                return {"input_values": _normal(seeds, (_SAMPLES,))}
            case "images and text":
                return {"input_ids": ids, _IMAGES: random_images(seeds, config.vision_config)}
            case "speech":
                shape = config.num_mel_bins, 2 * config.max_source_positions  # convolutions halve the length
                return {"input_features": _normal(seeds, shape), "decoder_input_ids": ids}
            case "pairs" if "decoder_input_ids" in _arguments(self._states_from()):
                return {"input_ids": ids, "decoder_input_ids": ids}
            case _:
                return {"input_ids": ids}

    def compared(
        self, ids: torch.Tensor, last: int = 0, given: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return fp32 logits ``[N, T, V]``, or states, or where there are two towers their embeddings ``[N, 2, P]``.

        With ``last``, of the last positions alone. ``given`` are the model's arguments, where they are more than ``ids`` tell.
        """
        if given is not None:
            return self._compared(given, last)
        if self._model.config.model_type not in FOUND:
            return self._compared(self.inputs(ids), last)
        try:
            return self._compared(self.inputs(ids), last)
        except RuntimeError as error:  # nobody knows which lengths and sizes it takes
            first = (str(error).strip().splitlines() or [""])[0]
            raise RefusalError(
                f"a {self._model.config.model_type} model does not run on {self._reads} of shape {list(ids.shape)}: {first}",
                hint="another number of tokens to verify on, --verify-tokens, or describe it (docs/develop/describe_a_model.md)",
            ) from None

    def _compared(self, inputs: Mapping[str, torch.Tensor], last: int) -> torch.Tensor:
        with torch.no_grad():
            if not self.gives_states:
                logits: torch.Tensor = self._model(**inputs, use_cache=False, **self._kept(last)).logits
                return logits[:, -last:] if last else logits
            made = self._states_from()(**inputs)
        if "image_embeds" in made:
            return torch.stack([made.text_embeds, made.image_embeds], 1)
        found = [made.get("encoder_last_hidden_state"), made.get("last_hidden_state")]
        found = [states for states in found if states is not None] or [made.logits]
        found = [states.flatten(2).transpose(1, 2) if states.dim() == 4 else states for states in found]  # [N, d, H, W]
        states = torch.cat(found, 1)
        return states[:, -last:] if last else states

    def _kept(self, last: int) -> dict[str, int]:
        return {"logits_to_keep": last} if "logits_to_keep" in _arguments(self._model) else {}

    def _states_from(self) -> Any:
        return states_model(self._model) if self.gives_states else self._model


def states_model(model: Any) -> Any:
    """Return the model whose states are compared: without a head, where the part without one reads what the whole reads."""
    if type(model).__name__.endswith("Model"):  # whose own base model can be a part of it
        return model
    return model.base_model if model.main_input_name in _arguments(model.base_model) else model


def random_images(seeds: torch.Tensor, config: Any) -> torch.Tensor:
    """Return normal numbers ``[N, channels, height, width]`` for seeds; an image depends on its seed alone."""
    size = config.image_size
    return _normal(seeds, (config.num_channels, *((size, size) if isinstance(size, int) else size)))


def _normal(seeds: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds.flatten()]
    return torch.stack(drawn)


def _arguments(model: Any) -> Any:
    return inspect.signature(model.forward).parameters
