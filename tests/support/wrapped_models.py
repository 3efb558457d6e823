"""Tiny random models of every described architecture, and the same with experts in the place of their FFNs, built by hand.

Nothing of the conversion takes part: experts are cut and packed here, from the stock model's own modules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

import upcycle.models  # noqa: F401
from upcycle.architectures.described.find_ffns import FoundFfn, find_ffns
from upcycle.architectures.stock_classes import may_be_missing
from upcycle.models.own.configuration import wrapped_config
from upcycle.models.own.modeling import wrapped_model_class
from upcycle.models.own.replaced_ffn import ReplacedFfn
from upcycle.models.own.routing.base import RouterRule
from upcycle.models.own.routing.top_k import TopKRule
from upcycle.registry import load

D, F = 32, 64
_PLAIN = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {
    **_PLAIN,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_N = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_TOWERS = {
    "vocab_size": 96, "max_position_embeddings": 64, "d_model": D, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": F, "decoder_ffn_dim": F,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
_IMAGE = {**_PLAIN, "image_size": 8, "patch_size": 4}
_T5 = {"d_model": D, "d_ff": F, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 2, **_N}
_SOUND = {
    **_PLAIN, "conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [16, 20], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 96, "mask_time_length": 2,
    "layerdrop": 0.0,
}  # fmt: skip
_CLIP = {
    "text_config": {**_TEXT, "eos_token_id": 95, "projection_size": D},
    "vision_config": _IMAGE,
    "projection_dim": D,
}
# name -> (model_type, Auto class, configuration)
SMALL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "CausalLM", {"n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": F, **_N}),
    "gpt_neo": (
        "gpt_neo",
        "CausalLM",
        {"hidden_size": D, "intermediate_size": F, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
         "attention_types": [[["global", "local"], 1]], "window_size": 4, **_N},
    ),
    "gptj": (
        "gptj",
        "CausalLM",
        {"n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": F, "rotary_dim": 4, **_N},
    ),
    "gpt_neox": ("gpt_neox", "CausalLM", _TEXT),
    "gpt_neox-sequential": ("gpt_neox", "CausalLM", {**_TEXT, "use_parallel_residual": False}),
    "opt": (
        "opt",
        "CausalLM",
        {"hidden_size": D, "ffn_dim": F, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": D,
         "max_position_embeddings": 64, **_N},
    ),
    "bloom": ("bloom", "CausalLM", {"hidden_size": D, "n_layer": 2, "n_head": 4, **_N}),
    "phi": ("phi", "CausalLM", _TEXT),
    "falcon": (
        "falcon",
        "CausalLM",
        {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": F, **_N},
    ),
    "falcon-new": (
        "falcon",
        "CausalLM",
        {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": F,
         "new_decoder_architecture": True, "bias": True, **_N},
    ),
    "gemma2": ("gemma2", "CausalLM", {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}),
    "gemma3_text": (
        "gemma3_text",
        "CausalLM",
        {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 4,
         "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "embedding_gemma": (
        "gemma3_text",
        "Model",
        {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 6,
         "layer_types": ["sliding_attention", "full_attention"], "use_bidirectional_attention": True},
    ),
    "olmo3": ("olmo3", "CausalLM", {**_TEXT, "sliding_window": 4}),
    "glm4": ("glm4", "CausalLM", {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "attention_bias": True}),
    "exaone4": (
        "exaone4",
        "CausalLM",
        {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    ),
    "hyperclovax": (
        "hyperclovax",
        "CausalLM",
        {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "use_post_norm": True, "residual_multiplier": 0.5,
         "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "gemma4_text": (
        "gemma4_text",
        "CausalLM",
        {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 4,
         "vocab_size_per_layer_input": 4096, "final_logit_softcapping": 5.0},
    ),
    "bert": ("bert", "MaskedLM", _TEXT),
    "roberta": ("roberta", "MaskedLM", _TEXT),
    "xlm-roberta": ("xlm-roberta", "SequenceClassification", _TEXT),
    "electra": ("electra", "MaskedLM", {**_TEXT, "embedding_size": 16}),
    "mpnet": ("mpnet", "MaskedLM", _TEXT),
    "distilbert": ("distilbert", "MaskedLM", {"dim": D, "hidden_dim": F, "n_layers": 2, "n_heads": 4, **_N}),
    "albert": ("albert", "MaskedLM", {**_TEXT, "embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2}),
    "modernbert": ("modernbert", "MaskedLM", {**_TEXT, "mlp_bias": True, "cls_token_id": 3, "sep_token_id": 4}),
    "t5": ("t5", "Seq2SeqLM", _T5),
    "flan-t5": ("t5", "Seq2SeqLM", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("bart", "Seq2SeqLM", {**_TOWERS, "forced_eos_token_id": None}),
    "whisper": (
        "whisper",
        "SpeechSeq2Seq",
        {**_TOWERS, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "suppress_tokens": None,
         "begin_suppress_tokens": None},
    ),
    "deberta": ("deberta", "MaskedLM", {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": (
        "deberta-v2",
        "MaskedLM",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    ),
    "mt5": ("mt5", "Seq2SeqLM", {**_T5, "tie_word_embeddings": False}),
    "umt5": ("umt5", "Seq2SeqLM", _T5),
    "t5-encoder": ("t5", "TextEncoding", _T5),
    "mbart": ("mbart", "Seq2SeqLM", {**_TOWERS, "forced_eos_token_id": None}),
    "pegasus": ("pegasus", "Seq2SeqLM", {**_TOWERS, "forced_eos_token_id": None}),
    "marian": ("marian", "Seq2SeqLM", {**_TOWERS, "forced_eos_token_id": None, "decoder_vocab_size": 96}),
    "apertus": ("apertus", "CausalLM", {**_TEXT, "num_key_value_heads": 2}),
    "vit": ("vit", "ImageClassification", _IMAGE),
    "deit": ("deit", "ImageClassification", {**_IMAGE, "architectures": ["DeiTForImageClassification"]}),
    "dinov2": ("dinov2", "ImageClassification", {**_IMAGE, "mlp_ratio": 2}),
    "dinov3": ("dinov3_vit", "Model", {**_IMAGE, "num_register_tokens": 2}),
    "dinov3-gated": ("dinov3_vit", "Model", {**_IMAGE, "use_gated_mlp": True, "hidden_act": "silu"}),
    "dinov3-convnext": ("dinov3_convnext", "Model", {"image_size": 32, "hidden_sizes": [D, 2 * D], "depths": [1, 2]}),
    "swin": (
        "swin",
        "ImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": D, "depths": [1, 2], "num_heads": [2, 4], "window_size": 2,
         "mlp_ratio": 2.0},
    ),
    "convnext": (
        "convnext",
        "ImageClassification",
        {"image_size": 32, "hidden_sizes": [D, 2 * D], "depths": [1, 2], "num_stages": 2},
    ),
    "wav2vec2": ("wav2vec2", "Model", _SOUND),
    "wav2vec2-stable": ("wav2vec2", "Model", {**_SOUND, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    "hubert": ("hubert", "Model", _SOUND),
    "clip": ("clip", "Model", _CLIP),
    "siglip": ("siglip", "Model", _CLIP),
}  # fmt: skip


def auto_class(name: str) -> Any:
    """The Auto class of a small model."""
    kind = SMALL[name][1]
    return getattr(transformers, "AutoModel" if kind == "Model" else f"AutoModelFor{kind}")


def small_model(name: str, **changes: Any) -> Any:
    """A stock model whose every weight is random, norms and biases included."""
    model_type, _, settings = SMALL[name]
    torch.manual_seed(0)
    model = auto_class(name).from_config(transformers.AutoConfig.for_model(model_type, **{**settings, **changes}))
    generator = torch.Generator().manual_seed(1)
    computed = may_be_missing(model)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if computed.search(key):
                continue
            near_one = any(word in key.lower() for word in ("norm", "ln_", "layrnorm")) and key.endswith("weight")
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * drawn if near_one else 0.15 * drawn)
    return model.eval()


def inputs_of(name: str, length: int = 9) -> dict[str, Any]:
    """What a small model reads."""
    generator = torch.Generator().manual_seed(2)
    model_type, kind, settings = SMALL[name]
    ids = torch.randint(5, 94, (2, length), generator=generator)
    side = settings.get("image_size", 8)
    pixels = torch.randn(2, 3, side, side, generator=generator)
    match load("described", model_type).reads, kind:
        case "images", _:
            return {"pixel_values": pixels}
        case "sounds", _:
            return {"input_values": torch.randn(2, 4000, generator=generator)}
        case "images and text", _:
            return {"input_ids": ids, "pixel_values": pixels}
        case "speech", _:
            return {"input_features": torch.randn(2, 8, 32, generator=generator), "decoder_input_ids": ids}
        case "pairs", "Seq2SeqLM":
            return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
        case _:
            return {"input_ids": ids}


def output_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Logits, hidden states, or what the text and image towers together give."""
    with torch.no_grad():
        made = model(**inputs)
    if "logits" in made:
        logits: torch.Tensor = made.logits
        return logits
    return torch.cat([made.text_embeds, made.image_embeds]) if "text_embeds" in made else made.last_hidden_state


def wrapped(
    dense: Any,
    pieces: int = 1,
    experts: int = 4,
    rule: RouterRule | None = None,
    shared: int = 0,
    widths: tuple[int, ...] | None = None,
    bias_of: str = "down",
) -> Any:
    """The dense model with experts.

    Args:
        dense: of :func:`small_model`.
        pieces: of each FFN; a copy of it consists of so many experts.
        experts: how many, if not ``pieces``.
        rule: of routing; default: all at equal weight.
        shared: neurons, the first ones, of the shared expert.
        widths: of the experts, which are then cut so, or where an FFN is wider, in proportion.
        bias_of: ``down``: every expert has the second projection's bias; ``output``: it is added once.
    """
    found = find_ffns(dense, load("described", dense.config.model_type))
    replaced = []
    for ffn in found:
        unit = ffn.width // sum(widths or (ffn.width,))
        cut = tuple(unit * width for width in widths or ()) or ((ffn.width - shared) // pieces,) * (
            experts if pieces == 1 else pieces
        )
        biases = {bias_of if part == "down" else part for part in ffn.biases}
        replaced.append(
            ReplacedFfn(
                (ffn.replaced,),
                ffn.hidden,
                ffn.activation,
                ffn.place.gated,
                frozenset(biases),
                cut,
                shared,
                False,
                rule or TopKRule(len(cut)),
                ffn.dropout,
            )
        )
    config = wrapped_config(dense.config, replaced)
    model = wrapped_model_class(type(dense), type(config))(config).eval()
    _, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    gone = {f"{_prefix(dense)}{ffn.path(part)}." for ffn in found for part in ("gate", "up", "down")}
    gone |= {f"{_prefix(dense)}{ffn.layer}.{ffn.place.learned}." for ffn in found if ffn.place.learned}
    assert all(name.startswith(tuple(gone)) for name in unexpected)
    for ffn, entry in zip(found, replaced, strict=True):
        _fill(model.base_model.get_submodule(ffn.replaced[0]), dense.base_model, ffn, entry, pieces == 1 and not widths)
    model.tie_weights()
    return model


def _prefix(model: Any) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


@torch.no_grad()
def _fill(block: Any, base: Any, ffn: FoundFfn, entry: ReplacedFfn, copies: bool) -> None:
    weights = ffn_weights(base, ffn)
    first = entry.shared_width
    if first:
        for part in ("gate", "up"):
            linear = getattr(block, f"shared_{part}", None)
            if linear is not None:
                linear.weight.copy_(weights[part][:first])
                if linear.bias is not None:
                    linear.bias.copy_(weights[f"{part}_bias"][:first])
        block.shared_down.weight.copy_(weights["down"][:, :first])
        if block.shared_down.bias is not None:
            block.shared_down.bias.zero_()
    ups, downs, biases = [], [], []
    scale = 1.0 if copies or not isinstance(entry.rule, TopKRule) else float(entry.experts)
    for width in entry.widths:
        some = slice(0, width) if copies else slice(first, first + width)
        first += width
        parts = ["gate", "up"] if entry.gated else ["up"]
        ups.append(torch.stack([weights[part][some] for part in parts], 1).flatten(0, 1))
        zero = torch.zeros(width)
        biases.append(torch.stack([weights.get(f"{part}_bias", weights["zero"])[some] for part in parts], 1).flatten())
        assert len(biases[-1]) == len(zero) * len(parts)
        downs.append(scale * weights["down"][:, some].T)
    experts = block.experts
    if ffn.place.learned:
        experts.act.load_state_dict(base.get_submodule(f"{ffn.layer}.{ffn.place.learned}").state_dict())
    (experts.gate_up if entry.gated else experts.up).copy_(torch.cat(ups))
    experts.down.copy_(torch.cat(downs))
    if experts.up_bias is not None:
        experts.up_bias.copy_(torch.cat(biases))
    if experts.down_bias is not None:
        experts.down_bias.copy_(weights["down_bias"].expand(entry.experts, -1))
    if block.output_bias is not None:
        block.output_bias.copy_(weights["down_bias"])
    block.router.weight.zero_()
    if block.router.bias is not None:
        block.router.bias.zero_()


def ffn_weights(base: Any, ffn: FoundFfn) -> dict[str, torch.Tensor]:
    """gate, up ``[F, d]``, down ``[d, F]`` and their biases, of the modules that a description names."""
    found: dict[str, torch.Tensor] = {"zero": torch.zeros(ffn.width)}
    for part in ("gate", "up", "down") if ffn.place.gated else ("up", "down"):
        module: nn.Module = base.get_submodule(ffn.path(part))
        weight: Any = module.weight.T if ffn.place.columns else module.weight
        bias: Any = module.bias
        if ffn.place.fused and part != "down":
            half = ffn.place.fused.split().index(part)
            weight, bias = weight.chunk(2)[half], None if bias is None else bias.chunk(2)[half]
        found[part] = weight.detach()
        if bias is not None:
            found[f"{part}_bias"] = bias.detach()
    return found


def with_rule(entry: ReplacedFfn, rule: RouterRule) -> ReplacedFfn:
    """The same FFNs with another rule."""
    return replace(entry, rule=rule)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of a difference, by norms."""
    return float((found - expected).norm() / expected.norm())
