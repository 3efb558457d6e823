"""Granite 4 dense: the class of Granite 4's hybrid MoEs, without experts and with attention in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.dense.llama_like.granite import MULTIPLIERS, Granite
from upcycle.architectures.module_paths import ModulePaths
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import CheckpointError, RefusalError
from upcycle.files.formats.settings import COUNT, DECIMAL, FLAG, NAME, NAMES, POSITIVE, SIZE, ValueKind, is_number


def _are_limits(value: object) -> bool:
    """Return whether a value is two numbers; infinity is written as a mapping, as JSON has none."""
    infinite = {"__float__": "Infinity"}
    return isinstance(value, list) and len(value) == 2 and all(is_number(n) or n == infinite for n in value)


class GraniteMoeHybrid(Granite):
    """Describes dense Granite 4: Granite's block, whose FFN is stored as a shared expert, with gate and up in one tensor.

    A model with experts is a MoE already; one with Mamba layers has no target here.
    """

    name = "granitemoehybrid"
    title = "Granite 4 dense"
    targets = (*Granite.targets, "granitemoe_swa")
    elsewhere = {Feature.MLP_BIAS: "no stock architecture with multipliers has biases in its experts"}
    module_paths = ModulePaths(blocks=("shared_mlp",))
    aliases = {"intermediate_size": "shared_intermediate_size"}
    defaults = {**Granite.defaults, "intermediate_size": 1024}
    keys = {
        "attention_bias": FLAG,
        **{key: kind.optional for key, kind in MULTIPLIERS.items()},
        "num_local_experts": COUNT.optional,
        "layer_types": NAMES.optional,
        "position_embedding_type": NAME.optional,
        # Keys of experts and of Mamba layers, which a dense model lacks.
        "intermediate_size": SIZE,
        "num_experts_per_tok": COUNT.optional,
        "output_router_logits": FLAG.optional,
        "router_aux_loss_coef": DECIMAL.optional,
        "mamba_n_heads": SIZE,
        "mamba_n_groups": SIZE.optional,
        "mamba_d_state": SIZE.optional,
        "mamba_d_head": ValueKind("a positive integer or auto", lambda v: v == "auto" or SIZE.fits(v)),
        "mamba_d_conv": SIZE.optional,
        "mamba_expand": SIZE,
        "mamba_chunk_size": SIZE.optional,
        "mamba_conv_bias": FLAG.optional,
        "mamba_proj_bias": FLAG.optional,
        "time_step_limit": ValueKind("a list of two numbers", _are_limits, null=True),
        "time_step_min": POSITIVE.optional,
        "time_step_max": POSITIVE.optional,
    }
    layer_kinds = ("attention", "full_attention")

    def config(self, raw: Mapping[str, Any], where: str = "config.json") -> DenseConfig:
        """Read the configuration; ``layers_block_type`` is the older name of ``layer_types``."""
        older = raw.get("layers_block_type")
        return super().config({**raw, "layer_types": older} if older else raw, where)

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return Granite's details, without biases in the FFN.

        Raises:
            RefusalError: the model has experts, or layers without attention.
            CheckpointError: the sizes of its Mamba layers contradict one another, though it has none.
        """
        experts = raw.get("num_local_experts", 8)
        if experts:
            raise RefusalError(
                f"cannot convert this 'granitemoehybrid' model: it is a Mixture-of-Experts already ('num_local_experts' {experts})",
                hint="without experts ('num_local_experts' 0) and with attention in every layer it is dense, and is converted",
            )
        kinds = raw.get("layer_types")
        others = values["num_hidden_layers"] if kinds is None else sum(kind not in self.layer_kinds for kind in kinds)
        if others:
            raise RefusalError(
                f"cannot convert this 'granitemoehybrid' model: {others} of its {values['num_hidden_layers']} layers are Mamba "
                "layers ('layer_types'), and every target here attends in every layer",
                hint="dense Granite 4 models with attention in every layer are converted (granite-4.0-350m, granite-4.0-1b)",
            )
        heads, width = raw.get("mamba_n_heads", 128), raw.get("mamba_expand", 2) * values["hidden_size"]
        head = raw.get("mamba_d_head", "auto")
        if width % heads or head not in ("auto", width // heads):
            # The stock class compares them although there is no Mamba layer, and would not load.
            raise CheckpointError(
                f"'mamba_n_heads' {heads} times 'mamba_d_head' {head} is not 'mamba_expand' times 'hidden_size', {width}",
                hint="correct the keys, or download config.json again",
            )
        given = {key: value for key, value in raw.items() if value is not None or key not in MULTIPLIERS}
        return super().details(given, values)

    def thetas(self, raw: Mapping[str, Any], layers: int, theta: float) -> tuple[float, ...]:
        """Return theta 0 for all layers unless ``position_embedding_type`` is ``rope``: they have no rotary embedding."""
        return () if raw.get("position_embedding_type") == "rope" else (0,) * layers

    def stored_specs(self, config: DenseConfig, layer: int | None) -> dict[str, tuple[int, ...]]:
        """Return the stored tensors: gate and up in one below ``shared_mlp``, down in another."""
        specs = super().stored_specs(config, layer)
        if layer is None:
            return specs
        ours = self.ffn_specs(config, layer)
        prefix, d, width = self.module_paths.block_of(layer), config.hidden_size, config.intermediate_size
        fused = {f"{prefix}.input_linear.weight": (2 * width, d), f"{prefix}.output_linear.weight": (d, width)}
        return {**{name: shape for name, shape in specs.items() if name not in ours}, **fused}

    def origin(self, config: DenseConfig, name: str) -> Origin:
        """Return rows of the fused tensor for gate and up, and down under its other name."""
        prefix, _, part = name.removesuffix(".weight").rpartition(".mlp.")
        width = config.intermediate_size
        rows = {"gate_proj": (0, width), "up_proj": (width, width)}
        if part in rows:
            return Origin(f"{prefix}.{self.module_paths.block}.input_linear.weight", rows=rows[part])
        if part == "down_proj":
            return Origin(f"{prefix}.{self.module_paths.block}.output_linear.weight")
        return super().origin(config, name)
