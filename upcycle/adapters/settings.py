"""Reads ``adapter_config.json``, by which PEFT says what a folder of LoRA weights means.

Nothing in it is run: ``auto_mapping`` and other names of code are not read. A key that is not known here, and is set, is refused,
as it may change what the weights mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upcycle.errors import CheckpointError, RefusalError
from upcycle.files.formats.folder_contents import shortened
from upcycle.files.formats.parsing import read_json
from upcycle.files.locate_adapted import ADAPTER_CONFIG

_LONGEST_PATTERN = 1000  # characters of a regular expression that a folder may bring
_MOST_RANK = 1 << 16
# Keys that say how training went, where the weights lie (their names say it, too), or what a run of PEFT does with them.
_WITHOUT_MEANING = (
    *(
        "task_type",
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
    ),
    *(
        "layers_to_transform",
        "layers_pattern",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
    ),
    *(
        "lora_ga_config",
        "velora_config",
        "runtime_config",
        "qalora_group_size",
        "fan_in_fan_out",
        "bias",
        "ensure_weight_tying",
    ),
    "modules_to_save",
)
_READ = (
    *("peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern"),
    *("alpha_pattern", "init_lora_weights", "target_parameters"),
)
# Ways to begin that leave the base as it is. Others (PiSSA, OLoRA, CorDA, LoftQ ...) change the base when the adapter is made.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraSettings:
    """What a LoRA folder's settings say.

    Attributes:
        base: the model that it was trained on, as its author called it; None: not said.
        revision: of that model, on the hub.
        rank, alpha: of every target that no pattern names.
        ranks, alphas: regular expressions that the end of a target's path matches, as PEFT reads them, with another number.
        rslora: whether the product is scaled by ``alpha / sqrt(rank)`` in place of ``alpha / rank``
            (https://arxiv.org/abs/2312.03732).
        dora: whether rows are brought to a learned length (https://arxiv.org/abs/2402.09353).
        parameters: ends of the names of parameters that are no layer's ``weight``, such as fused experts.
    """

    rank: int
    alpha: float
    base: str | None = None
    revision: str | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    parameters: tuple[str, ...] = ()

    def rank_of(self, path: str) -> int:
        """Return the rank of the target with this dotted path."""
        return int(_patterned(self.ranks, path, self.rank))

    def scale_of(self, path: str) -> float:
        """Return what the product of a target's matrices is multiplied by."""
        rank, alpha = self.rank_of(path), _patterned(self.alphas, path, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def targets_parameter(self, name: str) -> bool:
        """Return whether ``target_parameters`` names a parameter."""
        return any(name == end or name.endswith(f".{end}") for end in self.parameters)


def read_settings(folder: Path) -> LoraSettings:
    """Read the ``adapter_config.json`` of a folder.

    Raises:
        CheckpointError: it is missing, or a value is not of the kind that PEFT writes.
        RefusalError: it is no LoRA adapter, or one that cannot be added to weights; the message names the key.
    """
    path = folder / ADAPTER_CONFIG
    raw = read_json(path)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise RefusalError(
            f"{path}: 'peft_type' is {shortened(kind)}, and only LoRA adapters can be added to weights",
            hint="if peft itself can merge it: merge_and_unload(), save_pretrained(FOLDER), and name FOLDER",
        )
    if raw.get("init_lora_weights", True) not in _PLAIN_BEGINNINGS:
        raise RefusalError(
            f"{path}: 'init_lora_weights' is {shortened(raw['init_lora_weights'])}, which changes the base model, too",
            hint="save it as a plain LoRA: save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...) of peft",
        )
    for key, value in raw.items():
        if key not in (*_WITHOUT_MEANING, *_READ) and value not in (None, False, [], {}, ""):
            raise RefusalError(
                f"{path}: '{shortened(key)}' is {shortened(value)}, and weights with it cannot be merged, or are not known",
                hint="only plain LoRA, rsLoRA and DoRA are added to weights",
            )
    return LoraSettings(
        rank=_rank(raw.get("r", 8), "r", path),
        alpha=_number(raw.get("lora_alpha", 8), "lora_alpha", path),
        base=_text(raw, "base_model_name_or_path", path),
        revision=_text(raw, "revision", path),
        ranks={key: _rank(value, f"rank_pattern.{key}", path) for key, value in _pattern(raw, "rank_pattern", path)},
        alphas={
            key: _number(value, f"alpha_pattern.{key}", path) for key, value in _pattern(raw, "alpha_pattern", path)
        },
        rslora=_switch(raw, "use_rslora", path),
        dora=_switch(raw, "use_dora", path),
        parameters=_names(raw, "target_parameters", path),
    )


def _patterned(patterns: Mapping[str, float], path: str, otherwise: float) -> float:
    return next((number for key, number in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)


def _wrong(path: Path, key: str, wanted: str, value: object) -> CheckpointError:
    return CheckpointError(
        f"{path}: '{shortened(key)}' must be {wanted}, got {shortened(value)}", hint="copy the adapter's folder again"
    )


def _rank(value: object, key: str, path: Path) -> int:
    if type(value) is not int or not 0 < value <= _MOST_RANK:
        raise _wrong(path, key, "a positive integer", value)
    return value


def _number(value: object, key: str, path: Path) -> float:
    if type(value) not in (int, float):
        raise _wrong(path, key, "a number", value)
    return float(value)  # type: ignore[arg-type]


def _switch(raw: Mapping[str, Any], key: str, path: Path) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise _wrong(path, key, "true or false", value)
    return bool(value)


def _text(raw: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise _wrong(path, key, "a name", value)
    return value or None


def _names(raw: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise _wrong(path, key, "a list of names", value)
    return tuple(value)


def _pattern(raw: Mapping[str, Any], key: str, path: Path) -> list[tuple[str, Any]]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise _wrong(path, key, "a mapping", value)
    for pattern in value:
        try:
            if len(pattern) > _LONGEST_PATTERN:
                raise re.error("it is too long")
            re.compile(pattern)
        except re.error as error:
            raise _wrong(path, f"{key}.{pattern}", f"named by a regular expression ({error})", pattern) from None
    return list(value.items())
