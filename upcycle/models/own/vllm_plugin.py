"""The plug-in of vLLM: lets it run wrapped causal language models on its backend for models of transformers.

vLLM calls :func:`register` in every process that it starts, as ``setup.cfg`` names it below ``vllm.general_plugins``
(https://docs.vllm.ai/en/latest/design/plugin_system/). Its backend builds the model with ``AutoModel``, and puts its own attention
and linear layers into it; routers and experts stay what they are in transformers.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from upcycle.models.own.registration import register_wrapper
from upcycle.models.own.replaced_ffn import replaced_in

_CLASS = "WrappedCausalModel"
_OTHER_SHAPES = ("gpt2",)  # vLLM 0.32: dense GPT-2 does not run on its backend for models of transformers, either


def register() -> None:
    """Let transformers and vLLM know ``upcycle_moe``: of every causal language model of transformers the class ``UpcycleMoe...``."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    register_wrapper()
    known = ModelRegistry.get_supported_archs()
    for stock in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())):
        if f"UpcycleMoe{stock}" not in known:
            ModelRegistry.register_model(f"UpcycleMoe{stock}", f"{__name__}:{_CLASS}")


def __getattr__(name: str) -> Any:
    """Make the class that :func:`register` names, where vLLM asks for it: it needs vLLM."""
    if name == _CLASS:
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _model_class() -> Any:
    from vllm.model_executor.models.transformers import TransformersForCausalLM

    class WrappedCausalModel(TransformersForCausalLM):  # type: ignore[misc]
        """vLLM's backend for models of transformers, which says what it cannot run before it tries."""

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            if why := what_prevents(vllm_config.model_config.hf_config):
                raise ValueError(why)
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    return WrappedCausalModel


def what_prevents(config: Any) -> str | None:
    """Return why vLLM's backend cannot run the model of a wrapped configuration; None: nothing is known that prevents it."""
    from transformers import MODEL_MAPPING

    wrapped: Any = MODEL_MAPPING[type(config)]
    if config.base_model_type in _OTHER_SHAPES:
        return f"{wrapped.__name__}: a {config.base_model_type} model reads the output of attention by other axes than vLLM gives it"
    if not wrapped._supports_attention_backend:
        return f"{wrapped.__name__}: in transformers, a {config.base_model_type} model cannot take vLLM's attention"
    if "position_ids" not in inspect.signature(wrapped.forward).parameters:
        return f"{wrapped.__name__}: in transformers, a {config.base_model_type} model takes no positions, which vLLM gives it"
    if getattr(config, "adapted_ffns", None):
        why = "it has experts of low rank beside FFNs, and vLLM does not show what they read: which texts a batch is of"
        return f"{wrapped.__name__}: {why}"
    if any(getattr(ffn.rule, "protected", 0.0) for ffn in replaced_in(config)):
        why = "its rule protects tokens by their attention, and vLLM's does not give its weights: set 'protected' to 0"
        return f"{wrapped.__name__}: {why}"
    return None
