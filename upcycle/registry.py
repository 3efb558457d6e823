"""Lists every plug-in explicitly, and loads one when it is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from upcycle.errors import UsageError

METHODS = {
    "sparse_upcycling": "upcycle.methods.copying.sparse_upcycling:SparseUpcycling",
    "virtual_groups": "upcycle.methods.copying.virtual_groups:VirtualGroups",
    "drop_upcycling": "upcycle.methods.copying.drop_upcycling:DropUpcycling",
    "qwen_fine_grained": "upcycle.methods.copying.qwen_fine_grained:QwenFineGrained",
    "shared_plus_routed": "upcycle.methods.copying.shared_plus_routed:SharedPlusRouted",
    "branch_train_mix": "upcycle.methods.mixing.branch_train_mix:BranchTrainMix",
    "symphony": "upcycle.methods.mixing.symphony:Symphony",
    "model_glue": "upcycle.methods.mixing.model_glue:ModelGlue",
    "branch_train_merge": "upcycle.methods.mixing.branch_train_merge:BranchTrainMerge",
    "static_prune": "upcycle.methods.compressing.inside.static_prune:StaticPrune",
    "modegpt": "upcycle.methods.compressing.inside.modegpt:ModeGpt",
    "depth_stack": "upcycle.methods.growing.depth_stack:DepthStack",
    "masked_growth": "upcycle.methods.growing.masked_growth:MaskedGrowth",
    "frequency": "upcycle.methods.compressing.dropping.frequency:Frequency",
    "reap": "upcycle.methods.compressing.dropping.reap:Reap",
    "naee": "upcycle.methods.compressing.dropping.naee:Naee",
    "hc_smoe": "upcycle.methods.compressing.merging.hc_smoe:HcSmoe",
    "m_smoe": "upcycle.methods.compressing.merging.m_smoe:MSmoe",
    "moe_i2": "upcycle.methods.compressing.dropping.moe_i2:MoeI2",
    "layer_drop": "upcycle.methods.compressing.dropping.layer_drop:LayerDrop",
    "block_drop": "upcycle.methods.compressing.dropping.block_drop:BlockDrop",
    "eep": "upcycle.methods.compressing.merging.eep:Eep",
    "ream": "upcycle.methods.compressing.merging.ream:Ream",
    "to_dense": "upcycle.methods.compressing.to_dense:ToDense",
    "slim": "upcycle.methods.compressing.inside.slim:Slim",
    "sparse_experts": "upcycle.methods.compressing.inside.sparse_experts:SparseExperts",
    "resplit": "upcycle.methods.compressing.inside.resplit:Resplit",
    "lower_top_k": "upcycle.methods.compressing.lower_top_k:LowerTopK",
    "low_rank": "upcycle.methods.compressing.low_rank:LowRank",
    "skip": "upcycle.methods.compressing.skip:Skip",
    "qmoe": "upcycle.methods.compressing.qmoe_codec.qmoe:Qmoe",
    "random_experts": "upcycle.methods.compressing.dropping.random_experts:RandomExperts",
    "quantize": "upcycle.methods.compressing.quantize:Quantize",
    "add_expert": "upcycle.methods.growing.add_expert:AddExpert",
    "expert_upcycling": "upcycle.methods.growing.expert_upcycling:ExpertUpcycling",
    "mocle": "upcycle.methods.beside.mocle:Mocle",
    "pesc": "upcycle.methods.beside.pesc:Pesc",
    "random_split": "upcycle.splitters.random_split:RandomSplit",
    "contiguous_split": "upcycle.splitters.contiguous_split:ContiguousSplit",
    "weight_kmeans": "upcycle.splitters.weight_kmeans:WeightKMeans",
    "coactivation_graph": "upcycle.splitters.coactivation_graph:CoactivationGraph",
    "coactivation_kmeans": "upcycle.splitters.coactivation_kmeans:CoactivationKMeans",
    "importance": "upcycle.splitters.importance:Importance",
    "cmoe": "upcycle.splitters.cmoe:CMoE",
    "factor": "upcycle.splitters.factor:Factor",
    "d2d": "upcycle.splitters.d2d:D2D",
    "alternating": "upcycle.splitters.alternating:Alternating",
}
ROUTERS = {
    "random": "upcycle.routers.random_rows:RandomRouter",
    "zero": "upcycle.routers.zero:ZeroRouter",
    "cool": "upcycle.routers.cool:CoolRouter",
    "centroid": "upcycle.routers.calibrated.centroid:CentroidRouter",
    "ridge": "upcycle.routers.calibrated.ridge:RidgeRouter",
    "representative": "upcycle.routers.calibrated.representative:RepresentativeRouter",
    "distilled": "upcycle.routers.calibrated.distilled:DistilledRouter",
    "moefication": "upcycle.routers.calibrated.moefication:MoeficationRouter",
    "d2d_norms": "upcycle.routers.calibrated.d2d_norms:NormRouter",
    "orthogonal": "upcycle.routers.orthogonal:OrthogonalRouter",
    "hidden": "upcycle.routers.for_mixing.hidden:HiddenRouter",
    "cheap_embed": "upcycle.routers.for_mixing.cheap_embed:CheapEmbedRouter",
    "domain_ridge": "upcycle.routers.for_mixing.domain_ridge:DomainRidgeRouter",
}
FAMILIES = {
    "llama": "upcycle.architectures.dense.llama_like.llama:Llama",
    "mistral": "upcycle.architectures.dense.llama_like.mistral:Mistral",
    "qwen2": "upcycle.architectures.dense.llama_like.qwen2:Qwen2",
    "qwen3": "upcycle.architectures.dense.llama_like.qwen3:Qwen3",
    "qwen3_5_text": "upcycle.architectures.dense.mixed_layers.qwen3_5_text:Qwen35Text",
    "granite": "upcycle.architectures.dense.llama_like.granite:Granite",
    "granitemoehybrid": "upcycle.architectures.dense.mixed_layers.granitemoehybrid:GraniteMoeHybrid",
    "olmo2": "upcycle.architectures.dense.rearranged.olmo2:Olmo2",
    "phi3": "upcycle.architectures.dense.rearranged.phi3:Phi3",
    "gemma": "upcycle.architectures.dense.rearranged.gemma:Gemma",
    "cohere2": "upcycle.architectures.dense.rearranged.cohere2:Cohere2",
    "ernie4_5": "upcycle.architectures.dense.llama_like.ernie4_5:Ernie45",
    "hunyuan_v1_dense": "upcycle.architectures.dense.llama_like.hunyuan_v1_dense:HunyuanV1Dense",
    "seed_oss": "upcycle.architectures.dense.llama_like.seed_oss:SeedOss",
    "helium": "upcycle.architectures.dense.rearranged.helium:Helium",
    "smollm3": "upcycle.architectures.dense.llama_like.smollm3:SmolLm3",
    "ministral": "upcycle.architectures.dense.llama_like.ministral:Ministral",
    "granite_swa": "upcycle.architectures.dense.llama_like.granite_swa:GraniteSwa",
    "internlm3": "upcycle.architectures.dense.llama_like.internlm3:InternLm3",
    "arcee": "upcycle.architectures.dense.llama_like.arcee:Arcee",
    "hyperclovax": "upcycle.architectures.dense.llama_like.hyperclovax:HyperClovaX",
    "ministral3": "upcycle.architectures.dense.llama_like.ministral3:Ministral3",
    "glm": "upcycle.architectures.dense.rearranged.glm:Glm",
    "cohere": "upcycle.architectures.dense.rearranged.cohere:Cohere",
    "youtu": "upcycle.architectures.dense.rearranged.youtu:Youtu",
    "minicpm3": "upcycle.architectures.dense.rearranged.minicpm3:MiniCpm3",
    "lfm2": "upcycle.architectures.dense.mixed_layers.lfm2:Lfm2",
    "starcoder2": "upcycle.architectures.dense.layer_norm.starcoder2:Starcoder2",
    "gpt_neox": "upcycle.architectures.dense.layer_norm.gpt_neox:GptNeoX",
    "stablelm": "upcycle.architectures.dense.layer_norm.stablelm:StableLm",
    "nemotron": "upcycle.architectures.dense.layer_norm.nemotron:Nemotron",
    "jais2": "upcycle.architectures.dense.layer_norm.jais2:Jais2",
    "olmo": "upcycle.architectures.dense.layer_norm.olmo:Olmo",
}
TARGETS = {
    "mixtral": "upcycle.architectures.moe.softmax.mixtral:Mixtral",
    "qwen2_moe": "upcycle.architectures.moe.softmax.qwen2_moe:Qwen2Moe",
    "qwen3_moe": "upcycle.architectures.moe.softmax.qwen3_moe:Qwen3Moe",
    "qwen3_5_moe_text": "upcycle.architectures.moe.mixed_layers.qwen3_5_moe_text:Qwen35MoeText",
    "granitemoe": "upcycle.architectures.moe.softmax.granitemoe:GraniteMoe",
    "granitemoeshared": "upcycle.architectures.moe.softmax.granitemoeshared:GraniteMoeShared",
    "granitemoe_swa": "upcycle.architectures.moe.softmax.granitemoe_swa:GraniteMoeSwa",
    "flex_olmo": "upcycle.architectures.moe.softmax.flex_olmo:FlexOlmo",
    "gpt_oss": "upcycle.architectures.moe.softmax.gpt_oss:GptOss",
    "glm4_moe": "upcycle.architectures.moe.sigmoid.glm4_moe:Glm4Moe",
    "deepseek_v3": "upcycle.architectures.moe.sigmoid.deepseek_v3:DeepseekV3",
    "dots1": "upcycle.architectures.moe.sigmoid.dots1:Dots1",
    "solar_open": "upcycle.architectures.moe.sigmoid.solar_open:SolarOpen",
    "mellum": "upcycle.architectures.moe.softmax.mellum:Mellum",
    "cohere2_moe": "upcycle.architectures.moe.softmax.cohere2_moe:Cohere2Moe",
    "ernie4_5_moe": "upcycle.architectures.moe.softmax.ernie4_5_moe:Ernie45Moe",
    "hunyuan_v1_moe": "upcycle.architectures.moe.softmax.hunyuan_v1_moe:HunyuanV1Moe",
    "phimoe": "upcycle.architectures.moe.softmax.phimoe:PhiMoe",
    "lfm2_moe": "upcycle.architectures.moe.mixed_layers.lfm2_moe:Lfm2Moe",
}
# Models of parts, by their model_type; those whose MoE is a class of its own under both names.
WRAPPERS = {
    "llava": "upcycle.architectures.towers.wrappers:llava",
    "llava_next": "upcycle.architectures.towers.wrappers:llava_next",
    "llava_next_video": "upcycle.architectures.towers.wrappers:llava_next_video",
    "llava_onevision": "upcycle.architectures.towers.wrappers:llava_onevision",
    "vipllava": "upcycle.architectures.towers.wrappers:vipllava",
    "mistral3": "upcycle.architectures.towers.wrappers:mistral3",
    "lighton_ocr": "upcycle.architectures.towers.wrappers:lighton_ocr",
    "internvl": "upcycle.architectures.towers.wrappers:internvl",
    "idefics2": "upcycle.architectures.towers.wrappers:idefics2",
    "idefics3": "upcycle.architectures.towers.wrappers:idefics3",
    "smolvlm": "upcycle.architectures.towers.wrappers:smolvlm",
    "aya_vision": "upcycle.architectures.towers.wrappers:aya_vision",
    "cohere2_vision": "upcycle.architectures.towers.wrappers:cohere2_vision",
    "got_ocr2": "upcycle.architectures.towers.wrappers:got_ocr2",
    "gemma3": "upcycle.architectures.towers.wrappers:gemma3",
    "gemma4": "upcycle.architectures.towers.wrappers:gemma4",
    "ovis2": "upcycle.architectures.towers.wrappers:ovis2",
    "lfm2_vl": "upcycle.architectures.towers.wrappers:lfm2_vl",
    "voxtral": "upcycle.architectures.towers.wrappers:voxtral",
    "glmasr": "upcycle.architectures.towers.wrappers:glmasr",
    "qwen2_5_vl": "upcycle.architectures.towers.qwen2_5_vl:qwen2_5_vl",
    "glm46v": "upcycle.architectures.towers.qwen2_5_vl:qwen2_5_vl",
    "qwen3_vl": "upcycle.architectures.towers.qwen3_vl:qwen3_vl",
    "qwen3_vl_moe": "upcycle.architectures.towers.qwen3_vl:qwen3_vl",
    "qwen3_5": "upcycle.architectures.towers.wrappers:qwen3_5",
    "qwen3_5_moe": "upcycle.architectures.towers.wrappers:qwen3_5",
}
DESCRIBED = {  # dense architectures that are described by their FFNs alone, for the wrapper
    "gpt2": "upcycle.architectures.described.decoders:GPT2",
    "gpt_neo": "upcycle.architectures.described.decoders:GPT_NEO",
    "gptj": "upcycle.architectures.described.decoders:GPTJ",
    "gpt_neox": "upcycle.architectures.described.decoders:GPT_NEOX",
    "opt": "upcycle.architectures.described.decoders:OPT",
    "bloom": "upcycle.architectures.described.decoders:BLOOM",
    "phi": "upcycle.architectures.described.decoders:PHI",
    "falcon": "upcycle.architectures.described.decoders:FALCON",
    "gemma2": "upcycle.architectures.described.decoders:GEMMA2",
    "gemma3_text": "upcycle.architectures.described.decoders:GEMMA3_TEXT",
    "olmo3": "upcycle.architectures.described.decoders:OLMO3",
    "apertus": "upcycle.architectures.described.decoders:APERTUS",
    "glm4": "upcycle.architectures.described.normed_decoders:GLM4",
    "exaone4": "upcycle.architectures.described.normed_decoders:EXAONE4",
    "hyperclovax": "upcycle.architectures.described.normed_decoders:HYPERCLOVAX",
    "gemma4_text": "upcycle.architectures.described.normed_decoders:GEMMA4_TEXT",
    "bert": "upcycle.architectures.described.encoders:BERT",
    "roberta": "upcycle.architectures.described.encoders:ROBERTA",
    "xlm-roberta": "upcycle.architectures.described.encoders:XLM_ROBERTA",
    "electra": "upcycle.architectures.described.encoders:ELECTRA",
    "mpnet": "upcycle.architectures.described.encoders:MPNET",
    "deberta": "upcycle.architectures.described.encoders:DEBERTA",
    "deberta-v2": "upcycle.architectures.described.encoders:DEBERTA_V2",
    "distilbert": "upcycle.architectures.described.encoders:DISTILBERT",
    "albert": "upcycle.architectures.described.encoders:ALBERT",
    "modernbert": "upcycle.architectures.described.encoders:MODERNBERT",
    "t5": "upcycle.architectures.described.encoder_decoders:T5_MODELS",
    "mt5": "upcycle.architectures.described.encoder_decoders:MT5",
    "umt5": "upcycle.architectures.described.encoder_decoders:UMT5",
    "bart": "upcycle.architectures.described.encoder_decoders:BART",
    "mbart": "upcycle.architectures.described.encoder_decoders:MBART",
    "pegasus": "upcycle.architectures.described.encoder_decoders:PEGASUS",
    "marian": "upcycle.architectures.described.encoder_decoders:MARIAN",
    "whisper": "upcycle.architectures.described.encoder_decoders:WHISPER",
    "vit": "upcycle.architectures.described.vision:VIT",
    "deit": "upcycle.architectures.described.vision:DEIT",
    "dinov2": "upcycle.architectures.described.vision:DINOV2",
    "dinov3_vit": "upcycle.architectures.described.vision:DINOV3",
    "dinov3_convnext": "upcycle.architectures.described.vision:DINOV3_CONVNEXT",
    "swin": "upcycle.architectures.described.vision:SWIN",
    "convnext": "upcycle.architectures.described.vision:CONVNEXT",
    "clip": "upcycle.architectures.described.vision:CLIP",
    "siglip": "upcycle.architectures.described.vision:SIGLIP",
    "wav2vec2": "upcycle.architectures.described.sounds:WAV2VEC2",
    "hubert": "upcycle.architectures.described.sounds:HUBERT",
}
FOUND: dict[str, Any] = {}  # descriptions that this process has found out, as --family auto-wrap asks for
# Targets that are classes of upcycle's own; every family may name them.
OWN_TARGETS = {"upcycle_moe": "upcycle.architectures.moe.wrapper:UpcycleMoe"}
LOSSES = {
    "switch_balance": "upcycle.trainers.losses.switch_balance:SwitchBalance",
    "device_balance": "upcycle.trainers.losses.device_balance:DeviceBalance",
    "cluster_variance": "upcycle.trainers.losses.cluster_variance:ClusterVariance",
    "relu_l1": "upcycle.trainers.losses.relu_l1:ReluL1",
    "skywork_balance": "upcycle.trainers.losses.skywork_balance:SkyworkBalance",
    "importance_cv2": "upcycle.trainers.losses.importance_cv2:ImportanceCV2",
    "load_cv2": "upcycle.trainers.losses.load_cv2:LoadCV2",
    "mutual_information": "upcycle.trainers.losses.mutual_information:MutualInformation",
    "router_z": "upcycle.trainers.losses.router_z:RouterZ",
    "hoyer": "upcycle.trainers.losses.hoyer:Hoyer",
    "choice_prediction": "upcycle.trainers.losses.choice_prediction:ChoicePrediction",
}
KINDS = {
    "method": METHODS,
    "router": ROUTERS,
    "family": FAMILIES,
    "described": DESCRIBED,
    "own_target": OWN_TARGETS,
    "target": TARGETS,
    "wrapper": WRAPPERS,
    "loss": LOSSES,
}


def load(kind: str, name: str) -> Any:
    """Return the class registered as ``name`` among the plug-ins of ``kind``.

    Raises:
        UsageError: when nothing has that name; the hint suggests the nearest one.
    """
    names = KINDS[kind]
    if name not in names:
        raise UsageError(f"unknown {kind} '{name}'", hint=suggestion(name, names))
    module, _, attribute = names[name].partition(":")
    return getattr(import_module(module), attribute)


def find(kind: str, name: str) -> Any | None:
    """Return the same class, or None when nothing has that name: for models that need not be anybody's plug-in."""
    if kind == "described" and name in FOUND and name not in DESCRIBED:
        return FOUND[name]
    return load(kind, name) if name in KINDS[kind] else None


def suggestion(name: str, available: Any) -> str:
    """Return a hint with the name in ``available`` that the user may have meant, and all names."""
    known = sorted(available)
    return f"{did_you_mean(name, known)}available: {', '.join(known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question after the name in ``known`` that is most alike, with a space behind it; empty where none is."""
    close = difflib.get_close_matches(name, [*known], n=1)
    return f"did you mean '{close[0]}'? " if close else ""
