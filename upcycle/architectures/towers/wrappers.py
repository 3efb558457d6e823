"""The models of parts whose text model may be of any family, and Qwen3.5; each line is one class of transformers."""

from __future__ import annotations

from functools import partial

from upcycle.architectures.towers import images
from upcycle.architectures.towers.wrapper import Wrapper, renamed_parts

llava = Wrapper("llava", "LLaVA 1.5", images.single)
llava_next = Wrapper("llava_next", "LLaVA-NeXT", images.tiled)
llava_next_video = Wrapper("llava_next_video", "LLaVA-NeXT-Video", images.tiled)
llava_onevision = Wrapper("llava_onevision", "LLaVA-OneVision", images.tiled)
vipllava = Wrapper("vipllava", "ViP-LLaVA", images.single)
mistral3 = Wrapper("mistral3", "Mistral Small 3.1", images.sized)
lighton_ocr = Wrapper("lighton_ocr", "LightOnOCR", images.sized)
internvl = Wrapper("internvl", "InternVL", images.single)
idefics2 = Wrapper("idefics2", "Idefics2", images.stacked, body="model.text_model")
idefics3 = Wrapper("idefics3", "Idefics3", images.stacked, body="model.text_model")
smolvlm = Wrapper("smolvlm", "SmolVLM", images.stacked, body="model.text_model")
aya_vision = Wrapper("aya_vision", "Aya Vision", images.single)
cohere2_vision = Wrapper("cohere2_vision", "Command A Vision", images.single)
got_ocr2 = Wrapper("got_ocr2", "GOT-OCR2", images.single)
ovis2 = Wrapper("ovis2", "Ovis2", images.single)
lfm2_vl = Wrapper("lfm2_vl", "LFM2-VL", images.masked_patches)
qwen3_5 = Wrapper(
    "qwen3_5",
    "Qwen3.5",
    images.patches,
    moe="qwen3_5_moe",
    typed=True,
    rewrite=partial(renamed_parts, "qwen3_5", "qwen3_5_moe"),
)
