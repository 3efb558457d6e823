"""The models of parts whose text model may be of any family, and Qwen3.5; each line is one class of transformers."""

from __future__ import annotations

from functools import partial

from upcycle.architectures.towers import samples
from upcycle.architectures.towers.wrapper import Wrapper, renamed_parts

llava = Wrapper("llava", "LLaVA 1.5", samples.single)
llava_next = Wrapper("llava_next", "LLaVA-NeXT", samples.tiled)
llava_next_video = Wrapper("llava_next_video", "LLaVA-NeXT-Video", samples.tiled)
llava_onevision = Wrapper("llava_onevision", "LLaVA-OneVision", samples.tiled)
vipllava = Wrapper("vipllava", "ViP-LLaVA", samples.single)
mistral3 = Wrapper("mistral3", "Mistral Small 3.1", samples.sized)
lighton_ocr = Wrapper("lighton_ocr", "LightOnOCR", samples.sized)
internvl = Wrapper("internvl", "InternVL", samples.single)
idefics2 = Wrapper("idefics2", "Idefics2", samples.stacked, body="model.text_model")
idefics3 = Wrapper("idefics3", "Idefics3", samples.stacked, body="model.text_model")
smolvlm = Wrapper("smolvlm", "SmolVLM", samples.stacked, body="model.text_model")
aya_vision = Wrapper("aya_vision", "Aya Vision", samples.single)
cohere2_vision = Wrapper("cohere2_vision", "Command A Vision", samples.single)
got_ocr2 = Wrapper("got_ocr2", "GOT-OCR2", samples.single)
gemma3 = Wrapper("gemma3", "Gemma 3", samples.single, typed="token_type_ids")
gemma4 = Wrapper("gemma4", "Gemma 4", samples.placed_patches, typed="mm_token_type_ids")
ovis2 = Wrapper("ovis2", "Ovis2", samples.single)
lfm2_vl = Wrapper("lfm2_vl", "LFM2-VL", samples.masked_patches)
voxtral = Wrapper("voxtral", "Voxtral", samples.spectrum, kind="sound")
glmasr = Wrapper("glmasr", "GLM-ASR", samples.masked_spectrum, kind="sound")
qwen3_5 = Wrapper(
    "qwen3_5",
    "Qwen3.5",
    samples.patches,
    moe="qwen3_5_moe",
    typed="mm_token_type_ids",
    rewrite=partial(renamed_parts, "qwen3_5", "qwen3_5_moe"),
)
