"""Makes ``upcycle_moe`` known to transformers' Auto classes: no code comes with a checkpoint, and none is asked for."""

from __future__ import annotations


def register_wrapper() -> None:
    """Let ``AutoConfig`` read ``upcycle_moe``, in this process. Classes of models are made when a configuration of their base is.

    Calling this twice is the same as calling it once.
    """
    from transformers import AutoConfig

    from upcycle.models.own.configuration import MODEL_TYPE, UpcycleMoeConfig

    AutoConfig.register(MODEL_TYPE, UpcycleMoeConfig, exist_ok=True)
