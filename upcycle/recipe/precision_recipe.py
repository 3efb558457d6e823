"""The part of a recipe that says in how many bits a compressed Mixture-of-Experts is stored."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from upcycle.plugins import StrictSettings

FP8_BITS = "fp8"
_MIXED = "mixed:"


class PrecisionRecipe(StrictSettings):
    """Says how the weights are stored; without ``bits``, as numbers of the recipe's dtype."""

    bits: str | None = Field(
        None,
        description="of a compressed MoE: bits per weight of its experts, 2 to 8, fp8, or mixed:2.5 (a mean); scales come in addition",
    )
    attention_bits: int = Field(
        8,
        ge=2,
        le=16,
        description="with bits: bits per weight of attention, shared experts and dense FFNs, 2 to 8; 16: they stay as they are",
    )
    rounding: Literal["gptq", "nearest"] = Field(
        "gptq",
        description="with bits below 8: gptq (on calibration text; per matrix, where it beats nearest on held-out text), or nearest",
    )
    allocation: Literal["layers", "mc_moe", "first", "frequency", "outliers", "even"] = Field(
        "layers",
        description="of bits mixed: which get more. One width per layer: layers (least change of their outputs), first (layers), even "
        "(alternating); one per expert: mc_moe (the paper's integer programme), frequency, outliers",
    )
    group: int = Field(128, ge=16, le=4096, description="with bits: the most columns of a row that share a scale")

    @field_validator("bits", mode="before")
    @classmethod
    def _bits_are_known(cls, value: Any) -> Any:
        if value is None:
            return None
        text = str(value).strip().lower()
        mean = text.removeprefix(_MIXED)
        if text == FP8_BITS or re.fullmatch("[2-8]", text):
            return text
        if text.startswith(_MIXED) and re.fullmatch(r"\d+(\.\d+)?", mean) and 2 < float(mean) < 8:
            return text
        raise ValueError(f"'{value}' is no precision: write 2 to 8, fp8, or mixed:2.5 (a mean between 2 and 8)")

    @field_validator("attention_bits")
    @classmethod
    def _whole_or_few(cls, value: int) -> int:
        if 8 < value < 16:
            raise ValueError(f"{value} bits are no width that linear layers are stored in: 2 to 8, or 16")
        return value

    @property
    def mean(self) -> float | None:
        """The mean number of bits of ``mixed:``; None: all experts have the same."""
        return float(self.bits.removeprefix(_MIXED)) if self.bits and self.bits.startswith(_MIXED) else None

    @property
    def looks(self) -> bool:
        """Whether calibration text decides how weights are rounded, or in how many bits."""
        if self.bits is None:
            return False
        if self.mean is not None and self.allocation not in ("even", "first"):
            return True
        few = self.mean is not None or (self.bits != FP8_BITS and int(self.bits) < 8)
        return self.rounding == "gptq" and (few or self.attention_bits < 8)
