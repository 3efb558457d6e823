"""Checks ``config.json`` key by key: what each key's value must be, which keys cannot change the function, and which are refused.

A key is read by the family, or cannot change what its stock class computes, or must have the one value with which that class
computes something that targets can hold. Otherwise it is refused by name. Keys that a stock class does not know are ignored, as
the class does. A contract test compares all this with the fields of the stock classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from upcycle.errors import CheckpointError, RefusalError
from upcycle.files.formats.folder_contents import shortened

# A hundred times what any transformer has. Without a bound, a wrong number would cost memory before it could be refused.
MOST_LAYERS = 10_000
_MOST = 2**31 - 1
_FURTHEST_ID = 2**62


@dataclass(frozen=True)
class ValueKind:
    """Describes what the value of a key can be, in words and as a test; ``null`` says whether it may be null."""

    what: str
    fits: Callable[[Any], bool]
    null: bool = False

    @property
    def optional(self) -> ValueKind:
        """This kind, with null allowed."""
        return ValueKind(f"{self.what} or null", self.fits, null=True)


def is_number(value: object) -> bool:
    """Return whether a value of JSON is a finite number."""
    if type(value) is int:
        return abs(value) <= _FURTHEST_ID  # larger integers cannot all be turned into floats
    return isinstance(value, float) and math.isfinite(value)


def _is_integer(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _all(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _is_numbered(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and key.isdecimal() for key in value)


ANY = ValueKind("anything", lambda _: True, null=True)
SIZE = ValueKind("a positive integer", lambda v: _is_integer(v, 1, _MOST))
LAYERS = ValueKind(f"a positive integer up to {MOST_LAYERS}", lambda v: _is_integer(v, 1, MOST_LAYERS))
COUNT = ValueKind("an integer that is not negative", lambda v: _is_integer(v, 0, _MOST))
FLAG = ValueKind("true or false", lambda v: isinstance(v, bool))
NUMBER = ValueKind("a number", is_number)
POSITIVE = ValueKind("a positive number", lambda v: is_number(v) and v > 0)
DECIMAL = ValueKind(
    "a positive number with a decimal point", lambda v: isinstance(v, float) and math.isfinite(v) and v > 0
)
FRACTION = ValueKind("a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1)
SPREAD = ValueKind("a number from 0.0 to 1.0 with a decimal point", lambda v: isinstance(v, float) and 0 <= v <= 1)
PART = ValueKind("a number above 0 and up to 1", lambda v: is_number(v) and 0 < v <= 1)
NAME = ValueKind("text", lambda v: isinstance(v, str))
NAMES = ValueKind("a list of text", lambda v: _all(v, lambda name: isinstance(name, str)))
COUNTS = ValueKind("a list of integers that are not negative", lambda v: _all(v, lambda n: _is_integer(n, 0, _MOST)))
MAPPING = ValueKind("a mapping", lambda v: isinstance(v, Mapping))
TOKEN = ValueKind("a token id", lambda v: _is_integer(v, -_FURTHEST_ID, _FURTHEST_ID), null=True)
TOKENS = ValueKind(
    "a token id or a list of them",
    lambda v: TOKEN.fits(v) or _all(v, TOKEN.fits),
    null=True,
)
# All names in transformers' own table, except those of functions that have weights.
STOCK_ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"),
    *("gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2"),
    *("relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh"),
)
ACTIVATION = ValueKind(
    f"one of {', '.join(STOCK_ACTIVATIONS)}", lambda v: isinstance(v, str) and v in STOCK_ACTIVATIONS
)
DTYPE = ValueKind("float64, float32, float16 or bfloat16", lambda v: v in ("float64", "float32", "float16", "bfloat16"))

# Keys by the names that DenseConfig has; a family may spell them in another way.
COMMON: Mapping[str, ValueKind] = {
    "model_type": NAME,
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": SIZE.optional,
    "hidden_act": ACTIVATION,
    "max_position_embeddings": SIZE,
    "initializer_range": SPREAD,
    "rms_norm_eps": DECIMAL,
    "attention_dropout": FRACTION,
    "tie_word_embeddings": FLAG,
    "rope_parameters": MAPPING.optional,
    "rope_scaling": MAPPING.optional,
    "rope_theta": POSITIVE.optional,
    "partial_rotary_factor": PART.optional,
    "original_max_position_embeddings": SIZE.optional,
    "bos_token_id": TOKEN,
    "eos_token_id": TOKENS,
    "pad_token_id": TOKEN,
    "dtype": DTYPE.optional,
    "torch_dtype": DTYPE.optional,
    "no_rope_layers": ValueKind("a list of 0 and 1", lambda v: _all(v, lambda n: n in (0, 1))).optional,
}
# Keys of stock classes that do not change the function, or that matter only in training or generation.
HARMLESS: Mapping[str, ValueKind] = {
    "architectures": NAMES.optional,
    "chunk_size_feed_forward": ANY,
    "eod_token_id": TOKEN,
    "embd_pdrop": FRACTION,
    "id2label": ValueKind("a mapping of numbers to labels", _is_numbered).optional,
    "is_encoder_decoder": ANY,
    "label2id": MAPPING.optional,
    "output_hidden_states": ANY,
    "pretraining_tp": ValueKind("an integer", lambda v: type(v) is int),
    "problem_type": ANY,
    "resid_pdrop": FRACTION,
    "residual_dropout": FRACTION,
    "return_dict": ANY,
    "transformers_version": ANY,
    "use_cache": FLAG,
}
# Keys that stock code reads for any model: the values that leave the function that of the class, and why others are refused.
_FIXED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((True, None), "it attends in both directions, and every target here is causal"),
    "per_layer_config": ((None, {}), "its layers have configurations of their own, and no target here can hold that"),
    "transformers_weights": ((None, "model.safetensors"), "the weights are in a file of another name: rename it"),
    "fusion_config": ((None, {}), "its modules are to be replaced by others"),
}


def checked(
    raw: Mapping[str, Any], own: Mapping[str, ValueKind], aliases: Mapping[str, str], where: str
) -> dict[str, Any]:
    """Return the keys of ``config.json`` that a family reads, after checking that each value is of its kind.

    Args:
        raw: the content of the file.
        own: the kinds of the family's own keys, and of common keys that are different for it.
        aliases: common key -> the family's spelling of it.
        where: the file, for messages.

    Raises:
        CheckpointError: a value is of another kind; the message names file, key and value.
        RefusalError: a key asks for something that no target can hold.
    """
    kinds = {**HARMLESS, **{aliases.get(key, key): kind for key, kind in COMMON.items()}, **own}
    for key, value in raw.items():
        if key in _FIXED and value not in _FIXED[key][0]:
            raise RefusalError(f"{where}: '{key}' is {shortened(value)}: {_FIXED[key][1]}")
        if key in kinds:
            check_value(key, value, kinds[key], where)
    return {key: value for key, value in raw.items() if key in kinds}


_CORRECT = "correct the key, or download config.json again"


def model_type(raw: Mapping[str, Any], where: str) -> str:
    """Return the ``model_type`` of a configuration, which names its architecture.

    Raises:
        CheckpointError: it is missing, or not text.
    """
    if not raw.get("model_type"):
        raise CheckpointError(
            f"{where}: config.json has no 'model_type'", hint="name the folder of a Hugging Face checkpoint"
        )
    check_value("model_type", raw["model_type"], NAME, f"{where}: config.json")
    return str(raw["model_type"])


def check_value(key: str, value: object, kind: ValueKind, where: str, hint: str = _CORRECT) -> None:
    """Check that the value of ``key`` is of its kind.

    Raises:
        CheckpointError: it is not; the message names file and key.
    """
    fits = kind.null if value is None else kind.fits(value)
    if not fits:
        raise CheckpointError(
            f"{where}: '{key}' must be {kind.what}, got {shortened(repr(value))}",
            hint=hint,
        )


def base_type(config: Any) -> str:
    """Return the ``model_type`` of a configuration or of its file's content; one of upcycle's own classes has that of its base."""
    value = config.get if isinstance(config, Mapping) else partial(_attribute, config)
    return str(value("base_model_type") or value("model_type"))


def _attribute(config: Any, name: str) -> Any:
    return getattr(config, name, None)
