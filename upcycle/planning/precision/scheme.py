"""Works out which matrices of a compressed Mixture-of-Experts are stored in few bits, how, and what ``config.json`` says of it.

Experts are written one by one, as checkpoints for vLLM are: ``experts.0.up_proj.weight_packed``. Stock transformers multiplies them
by their scales when it loads them, before it joins them, and leaves other linear layers packed until they first run. Routers,
norms, embeddings and the head are never rounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upcycle.architectures.stock_classes import expert_leaves, linear_layers
from upcycle.architectures.stored_moe import MoeModel, expert_index, matrix_of
from upcycle.checkpoints.output_layout import OutputEntry
from upcycle.errors import RefusalError, UsageError
from upcycle.files.formats.packed_bits import words_of
from upcycle.files.formats.packed_folder import METHOD
from upcycle.precision.allocation import evenly, widths_of
from upcycle.precision.grid import NumberGrid
from upcycle.recipe.precision_recipe import FP8_BITS, PrecisionRecipe

_LEAST_GROUP = 16  # columns; below that, scales take as much as values, and a row has one
_ROUTERS = re.compile(r"(.*\.)?(gate|router|shared_expert_gate|wg|layer)")  # linear layers that choose or weigh experts


@dataclass(frozen=True)
class Matrix:
    """Describes a matrix ``[rows, columns]`` that is stored in few bits.

    Attributes:
        name: its stored name, which ends in ``.weight``.
        grid: the numbers that it is rounded to.
        shape: rows and columns.
        module: the linear layer of the stock decoder layer that it belongs to; empty: it is an expert's.
        expert: which expert; -1: none.
        part: gate, up or down of an expert.
    """

    name: str
    grid: NumberGrid
    shape: tuple[int, int]
    module: str = ""
    expert: int = -1
    part: str = ""


@dataclass(frozen=True)
class Scheme:
    """Describes how the matrices of a model are stored.

    Attributes:
        bits: of every expert, by layer; 0: FP8.
        linear_bits: of other linear layers; 16: they are not rounded.
        expert_group: columns per scale of experts; 0: all.
        linear_group: likewise of the others.
        linears: the paths of the linear layers in the stock model that are rounded.
        leaves: the stored names of an expert's gate, up and down.
        kept: the last names of the linear layers that are not rounded.
    """

    bits: Mapping[int, tuple[int, ...]]
    linear_bits: int
    expert_group: int
    linear_group: int
    linears: frozenset[str]
    leaves: tuple[str, str, str]
    kept: tuple[str, ...]

    @property
    def widths(self) -> list[int]:
        """The widths of experts, ascending."""
        return sorted({bits for layer in self.bits.values() for bits in layer})

    @property
    def mixed(self) -> bool:
        """Whether experts have several widths."""
        return len(self.widths) > 1

    def grid(self, bits: int, dtype: str, expert: bool) -> NumberGrid:
        """Return the numbers that a matrix is rounded to, stored in ``dtype`` if it were not."""
        group = self.expert_group if expert else self.linear_group
        return NumberGrid(bits, group if bits else 0, dtype, wide=not expert)

    def matrices(self, model: MoeModel, layer: int, entry: OutputEntry) -> list[Matrix]:
        """Return the matrices that an output tensor of a layer holds, if they are stored in few bits."""
        spec = entry.spec
        if (part := matrix_of(entry.name)) and layer in self.bits:
            if (expert := expert_index(entry.name)) is not None:
                grid = self.grid(self.bits[layer][expert], spec.dtype, True)
                return [Matrix(entry.name, grid, (spec.shape[0], spec.shape[1]), expert=expert, part=part)]
            prefix = entry.name[: entry.name.rindex(".experts.") + len(".experts.")]
            names = dict(zip(("gate", "up", "down"), self.leaves, strict=True))
            parts = ("gate", "up") if part == "gate_up" else ("down",)
            return [
                Matrix(
                    f"{prefix}{expert}.{names[each]}.weight",
                    self.grid(self.bits[layer][expert], spec.dtype, True),
                    (spec.shape[1] // len(parts), spec.shape[2]),
                    expert=expert,
                    part=each,
                )
                for expert in range(spec.shape[0])
                for each in parts
            ]
        path = model.stock_name(entry.name).removesuffix(".weight")
        if path not in self.linears or self.linear_bits > 8:
            return []
        module = path.removeprefix(f"{model.module_paths.layer(layer)}.")
        return [
            Matrix(entry.name, self.grid(self.linear_bits, spec.dtype, False), (spec.shape[0], spec.shape[1]), module)
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """The ``quantization_config`` of the result."""
        groups = [self._group(targets, bits, True) for bits, targets in self._expert_targets().items()]
        if self.linear_bits <= 8 and self.linears:
            ends = sorted({re.sub(r"^.*\.layers\.\d+\.", "", path) for path in self.linears})
            groups.append(self._group([f"re:.*\\.{re.escape(end)}$" for end in ends], self.linear_bits, False))
        formats = {group["format"] for group in groups}
        return {
            "quant_method": METHOD,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {f"group_{place}": group for place, group in enumerate(groups)},
            "ignore": ["lm_head", *(f"re:.*\\.{re.escape(name)}$" for name in self.kept)],
        }

    def _expert_targets(self) -> dict[int, list[str]]:
        """Return what matches the experts of each width."""
        if not self.mixed:
            return {self.widths[0]: [r"re:.*\.experts\.\d+\..*"]}
        found: dict[int, list[str]] = {}
        for bits in self.widths:
            whole = [layer for layer, own in self.bits.items() if set(own) == {bits}]
            targets = [rf"re:.*\.layers\.({'|'.join(map(str, whole))})\..*\.experts\.\d+\..*"] if whole else []
            for layer, own in self.bits.items():
                some = [expert for expert, each in enumerate(own) if each == bits]
                if some and layer not in whole:
                    targets.append(rf"re:.*\.layers\.{layer}\..*\.experts\.({'|'.join(map(str, some))})\..*")
            found[bits] = targets
        return found

    def _group(self, targets: list[str], bits: int, expert: bool) -> dict[str, Any]:
        grid = self.grid(bits, "bfloat16", expert)
        weights: dict[str, Any] = {
            "num_bits": bits or 8,
            "type": "int" if bits else "float",
            "symmetric": True,
            "strategy": "group" if grid.group else "channel",
            "group_size": grid.group or None,
            "dynamic": False,
        }
        group = {"targets": targets, "format": "pack-quantized" if bits else "float-quantized", "weights": weights}
        if (
            not bits
        ):  # vLLM runs FP8 experts on inputs in FP8 alone; stock transformers leaves inputs of experts as they are
            inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
            group["input_activations"] = inputs
        return group


def scheme_of(
    model: MoeModel, config: Mapping[str, Any], recipe: PrecisionRecipe, bits: Mapping[int, tuple[int, ...]] | None
) -> Scheme:
    """Return how the result of a compression is stored.

    Args:
        model: the source.
        config: the result's ``config.json``.
        recipe: what the user wants.
        bits: what was decided of every expert, by layer; None: nothing is decided, and any choice takes as many bytes.

    Raises:
        RefusalError: stock transformers holds no experts of this architecture in few bits.
        UsageError: matrices are too narrow for the widths.
    """
    where = f"a compressed {model.family.name}"
    leaves = expert_leaves(config)
    if leaves is None:
        raise RefusalError(
            f"precision: stock transformers reads the experts of '{model.family.name}' from one tensor per layer, and "
            "multiplies integers by their scales only where experts are stored one by one: no checkpoint in few bits loads",
            hint="an architecture that stores experts one by one, such as mixtral or qwen3_moe",
        )
    linears = linear_layers(config)
    rounded = {path: sizes for path, sizes in linears.items() if not _ROUTERS.fullmatch(path)}
    kept = {path.rpartition(".")[2] for path in linears if path not in rounded}
    kept |= {"gate", "router"}  # which some loaders have as linear layers
    if recipe.attention_bits > 8:
        kept |= {path.rpartition(".")[2] for path in rounded}
        rounded = {}
    experts = int(config_experts(model, config))
    width, hidden = expert_width(model, config), model.hidden_size
    if bits is None:
        widths = _planned(recipe, len(model.moe_layers), experts)
        bits = {layer: tuple(own) for layer, own in zip(model.moe_layers, widths, strict=True)}
    made = Scheme(
        bits=bits,
        linear_bits=recipe.attention_bits,
        expert_group=_group(recipe.group, [hidden, width]),
        linear_group=_group(recipe.group, [columns for _, columns in rounded.values()]),
        linears=frozenset(rounded),
        leaves=leaves,
        kept=tuple(sorted(kept)),
    )
    tried = widths_of(recipe.mean) if recipe.mean is not None else made.widths
    _check_told_apart(made, tried, {hidden, width}, where)
    return made


def config_experts(model: MoeModel, config: Mapping[str, Any]) -> int:
    """Return how many experts a layer of the result has."""
    from upcycle.architectures.module_paths import text_config
    from upcycle.architectures.stock import build_config

    return int(getattr(text_config(build_config(config, "config.json")), model.family.experts_key))


def expert_width(model: MoeModel, config: Mapping[str, Any]) -> int:
    """Return how many neurons an expert of the result has."""
    from upcycle.architectures.stock_classes import stock_shapes

    return next(shape[-1] for name, shape in stock_shapes(config).items() if name.endswith("experts.down_proj"))


def _planned(recipe: PrecisionRecipe, layers: int, experts: int) -> list[list[int]]:
    if recipe.mean is not None:
        return evenly(layers, experts, recipe.mean)
    return [[0 if recipe.bits == FP8_BITS else int(recipe.bits or 16)] * experts] * layers


def _group(most: int, columns: list[int]) -> int:
    """Return how many columns share a scale: the most that divide every matrix' columns; 0: all."""
    whole = math.gcd(*columns) if columns else 0
    best = max((size for size in range(1, min(most, whole) + 1) if whole % size == 0), default=0)
    return best if best >= _LEAST_GROUP else 0


def _check_told_apart(scheme: Scheme, widths: Sequence[int], columns: set[int], where: str) -> None:
    """Refuse widths that the sizes of the stored matrices do not tell apart."""
    for count in columns:
        words = [words_of(count, bits) for bits in widths if bits]
        if len(set(words)) < len(words) or (scheme.mixed and not scheme.expert_group):
            raise UsageError(
                f"precision: {where} has matrices of {count} columns, too few for experts in {', '.join(map(str, widths))} bits",
                hint="--bits 4",
            )
