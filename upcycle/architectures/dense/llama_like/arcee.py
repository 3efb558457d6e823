"""Arcee (AFM 4.5B): Llama's block with an FFN of squared ReLU, without a gate."""

from __future__ import annotations

from upcycle.architectures.dense.llama_like.llama import Llama


class Arcee(Llama):
    """Describes Arcee. Its FFN is written as gated experts whose gate and up are equal; training may then tell them apart."""

    name = "arcee"
    title = "Arcee (AFM)"
    targets = ("mixtral", "granitemoe")
    gated = False
    defaults = {
        **Llama.defaults,
        "hidden_size": 2560,
        "intermediate_size": 18432,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
    }
    token_defaults = {"bos_token_id": 128000, "eos_token_id": 128001}
