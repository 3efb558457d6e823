"""Lists the stock MoE architectures that upcycle reads as sources, and what tells one from another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upcycle.errors import RefusalError
from upcycle.files.formats import settings
from upcycle.files.formats.settings import LAYERS, SIZE, check_value
from upcycle.registry import FAMILIES


@dataclass(frozen=True)
class MoeFamily:
    """Describes what tells one MoE architecture from another.

    Attributes:
        name: its ``model_type``.
        experts_key: the configuration key with the number of routed experts.
        top_k_key: the configuration key with the number of experts per token.
        sigmoid: scores are sigmoids of the logits; unless they are normalised, their sum depends on how many are chosen.
        epsilon: what is added to the sum that normalised weights are divided by, where a float can tell.
        normalized: whether the chosen experts' weights sum to 1; None: the configuration says.
        renames: pairs of texts, the second of which replaces the first in a stored name to give the stock module's name.
        sparse_mixer: whether routers weigh by SparseMixer (arXiv 2409.12136), which always chooses two experts.
        clamped: whether experts are GPT-OSS's: with biases, a clamped SwiGLU, and inputs before outputs, gate and up in turns.
        parts: whether the MoE is the text model inside a class with other parts, such as an encoder of images.
        transposes: whether transformers takes the matrices of all experts the other way round, too.
    """

    name: str
    experts_key: str = "num_experts"
    top_k_key: str = "num_experts_per_tok"
    sigmoid: bool = False
    epsilon: float = 0.0
    normalized: bool | None = None
    renames: tuple[tuple[str, str], ...] = ()
    sparse_mixer: bool = False
    clamped: bool = False
    parts: bool = False
    transposes: bool = False

    def text(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the keys of ``config.json`` that describe the MoE: of a model of parts, those of its text model."""
        inner: Mapping[str, Any] = raw.get(_TEXT) or {}
        return inner if self.parts else raw

    def with_text(self, raw: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``config.json`` with these keys changed, and without what names code."""
        config = {key: value for key, value in raw.items() if key != "auto_map"}
        return {**config, _TEXT: {**self.text(raw), **changed}} if self.parts else {**config, **changed}


_TEXT = "text_config"
_GRANITE = (
    (".block_sparse_moe.router.layer.weight", ".block_sparse_moe.router.weight"),
    (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
)
_OLD_BLOCK = (".block_sparse_moe.", ".mlp.")
_PHI = ((".block_sparse_moe.gate.weight", ".mlp.router.weight"), _OLD_BLOCK)
_LISTED = (
    MoeFamily("mixtral", "num_local_experts", renames=(_OLD_BLOCK,)),
    MoeFamily("qwen2_moe"),
    MoeFamily("qwen3_moe"),
    MoeFamily("qwen3_next"),
    MoeFamily("qwen3_5_moe_text"),
    MoeFamily("qwen3_5_moe", parts=True),
    MoeFamily("qwen3_vl_moe", parts=True, transposes=True),
    MoeFamily("olmoe"),
    MoeFamily("flex_olmo"),
    MoeFamily("mellum"),
    MoeFamily("cohere2_moe"),
    MoeFamily("granitemoe", "num_local_experts", renames=_GRANITE),
    MoeFamily("granitemoeshared", "num_local_experts", renames=_GRANITE),
    MoeFamily("granitemoe_swa", "num_local_experts"),
    MoeFamily("granitemoehybrid", "num_local_experts", renames=_GRANITE),
    MoeFamily("gpt_oss", "num_local_experts", normalized=True, clamped=True),
    MoeFamily("phimoe", "num_local_experts", normalized=False, renames=_PHI, sparse_mixer=True),
    MoeFamily("hunyuan_v1_moe", top_k_key="moe_topk"),
    MoeFamily("lfm2_moe", sigmoid=True, epsilon=1e-6),
    MoeFamily("glm4_moe", "n_routed_experts", sigmoid=True),
    MoeFamily("dots1", "n_routed_experts", sigmoid=True),
    MoeFamily("solar_open", "n_routed_experts", sigmoid=True),
    MoeFamily("deepseek_v3", "n_routed_experts", sigmoid=True),
    MoeFamily("deepseek_v2", "n_routed_experts", normalized=False),
    MoeFamily("glm4_moe_lite", "n_routed_experts", sigmoid=True),
    MoeFamily(
        "exaone_moe", sigmoid=True, renames=((".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),)
    ),
    MoeFamily("minimax_m2", "num_local_experts", sigmoid=True, normalized=True, renames=(_OLD_BLOCK,)),
    MoeFamily(
        "ernie4_5_moe",
        "moe_num_experts",
        "moe_k",
        normalized=True,
        renames=((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
    ),
)
MOES = {family.name: family for family in _LISTED}


def describes_moe(raw: Mapping[str, Any]) -> bool:
    """Return whether a configuration is that of a MoE of these; some architectures are dense where they have no experts."""
    family = MOES.get(str(raw.get("model_type")))
    return family is not None and (family.name not in FAMILIES or bool(family.text(raw).get(family.experts_key, 1)))


def moe_family(raw: Mapping[str, Any], where: str) -> MoeFamily:
    """Return the architecture of a configuration.

    Raises:
        RefusalError: it is a dense model, a quantized one, or a MoE of an unknown architecture.
    """
    model_type = settings.model_type(raw, where)
    if model_type in FAMILIES and not describes_moe(raw):
        raise RefusalError(
            f"{where} is a dense '{model_type}' model, and a Mixture-of-Experts is needed",
            hint="make one of it first: upcycle convert MODEL OUT --method sparse_upcycling --experts 8",
        )
    if model_type not in MOES:
        raise RefusalError(
            f"cannot grow the experts of a '{model_type}' model: this version does not know how it stores them",
            hint=f"known ones: {', '.join(MOES)}",
        )
    family = MOES[model_type]
    own, place = family.text(raw), f"{where}: config.json" + (f": {_TEXT}" if family.parts else "")
    check_value("num_hidden_layers", own.get("num_hidden_layers", 1), LAYERS, place)
    check_value(family.experts_key, own.get(family.experts_key, 1), SIZE, place)
    return family
