"""Which dense architectures are read from ``.gguf`` files, and what is peculiar to each of them there.

These are those that transformers' own GGUF loader knows, since a conversion is verified against what that loader reads. Names of
tensors are llama.cpp's, which the gguf package translates (``TensorNameMap``); names of metadata keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class GgufArchitecture:
    """Describes one value of ``general.architecture``.

    Attributes:
        model_type: the family's name.
        interleaved: whether the rows of the query and key projections are in the order of a rotation of neighbours.
        biases: config key -> the GGUF names of a layer's projections that all have a bias if it is true.
        keys: metadata key -> config key, of keys that other architectures do not have or that must leave their function as it is.
        constant: config keys that the file does not hold.
        norms_add: what the architecture's norms add to the weights of a checkpoint, and these files to theirs.
        head: the only head size of which the file says all: the scale of attention scores is not in it.
    """

    model_type: str
    interleaved: bool = False
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    constant: Mapping[str, object] = field(default_factory=dict)
    norms_add: float = 0.0
    head: int | None = None


_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture(
        "llama",
        interleaved=True,
        biases={"attention_bias": _ATTENTION, "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down")},
    ),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3", biases={"attention_bias": _ATTENTION}),
    "phi3": GgufArchitecture(
        "phi3",
        keys={
            "attention.sliding_window": "sliding_window",
            "rope.scaling.original_context_length": "original_max_position_embeddings",
        },
        constant={"sliding_window": None, "pad_token_id": None},
    ),
    "gemma3": GgufArchitecture(
        "gemma3_text",
        keys={"attention.sliding_window": "sliding_window"},
        norms_add=1.0,
        head=256,
    ),
}
