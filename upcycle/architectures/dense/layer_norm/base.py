"""What families with LayerNorms in the place of RMSNorms share: biases of norms, and FFNs under other names or without a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import CheckpointError, RefusalError


class LayerNormFamily(Family):
    """Describes a family that norms by LayerNorm, before attention and before the FFN, one after the other.

    Norms are called as Llama's, and have a weight and a bias. ``ffn_modules`` are the projections of the FFN in a layer; one
    without ``gate`` computes ``down(act(up x))``.
    """

    targets: tuple[str, ...] = ("phimoe",)
    ffn_modules: ClassVar[Mapping[str, str]] = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    parallel: ClassVar[bool] = False  # attention and FFN run side by side unless the configuration says otherwise

    def _refuse_unheld(self, raw: Mapping[str, Any], where: str) -> None:
        super()._refuse_unheld(raw, where)
        if raw.get("use_parallel_residual", self.parallel):
            said = "is true" if "use_parallel_residual" in raw else "is true where it is not given"
            raise RefusalError(
                f"{where}: 'use_parallel_residual' {said}: attention and FFN of this {self.name} model run in parallel, and no stock "
                "MoE architecture converted here has that block",
                hint=f"{self.name} models with 'use_parallel_residual' false are converted",
            )

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return that there are LayerNorms."""
        return {"special": frozenset({Feature.LAYER_NORMS})}

    def _check_together(self, config: DenseConfig, raw: Mapping[str, Any], where: str) -> None:
        """Refuse heads that the stock class cannot run, beside what every family refuses.

        Raises:
            CheckpointError: two values disagree; the message names the keys and both values.
        """
        super()._check_together(config, raw, where)
        heads, hidden, head = config.num_attention_heads, config.hidden_size, raw.get("head_dim")
        turned = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        wrong = None
        if self.must_divide and head is not None and head != hidden // heads:
            wrong = f"'head_dim' is {head}, and heads of a {self.name} model have 'hidden_size' {hidden} / {heads} dimensions"
        elif turned % 2 or config.head_dim % 2 or not turned:
            wrong = f"'partial_rotary_factor' turns {turned} of 'head_dim' {config.head_dim} dimensions, and a rotation needs pairs"
        if wrong:
            raise CheckpointError(f"{where}: {wrong}", hint="correct the key, or download config.json again")

    def ffn_names(self, layer: int) -> dict[str, str]:
        """Return the names of the projections that exist, and of the norm's weight."""
        prefix = self.module_paths.layer(layer)
        names = {part: f"{prefix}.{module}.weight" for part, module in self.ffn_modules.items()}
        return {**names, "norm": f"{prefix}.post_attention_layernorm.weight"}

    def layer_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return Llama's layer, with a bias for each norm."""
        return _with_biases(super().layer_specs(config, layer))

    def last_specs(self, config: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the final norm, with a bias, and the head."""
        return _with_biases(super().last_specs(config))

    def ffn_origins(self, config: DenseConfig, layer: int) -> dict[str, Origin]:
        """Return where the tensors of the FFN and of the norm before it come from, the norm's bias included."""
        origins = super().ffn_origins(config, layer)
        norm = self.ffn_names(layer)["norm"]
        return {**origins, "norm_bias": self.origin(config, norm.removesuffix("weight") + "bias")}


def _with_biases(specs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return specs with a bias behind the weight of every norm."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in specs.items():
        found[name] = shape
        if name.endswith("norm.weight"):
            found[name.removesuffix("weight") + "bias"] = shape
    return found
