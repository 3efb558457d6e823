"""Which of our targets inference engines run as stock transformers does: a tiny model of every one, through ``upcycle verify --with``.

Prints a table and leaves it in ``docs/measured/serving_targets.md`` (``--out`` for another file). The models are random, with
SmolLM2's tokenizer, which llama.cpp knows; half of four experts run, and routers are random, so that what an engine does with their
weights shows. llama.cpp: ``LLAMA_CPP`` names its folder (docs/guides/serving.md).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
from smollm2 import dense_folder
from transformers import AutoConfig, AutoModelForCausalLM

import upcycle
from upcycle.registry import FAMILIES, TARGETS, load

TABLE = Path(__file__).resolve().parents[3] / "docs" / "measured" / "serving_targets.md"
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
OWN_KEYS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "hunyuan_v1_dense": {"head_dim": 32},
}


def dense_model(family: str, folder: Path) -> Path:
    """A random model of a family, large enough in every weight that an error shows."""
    torch.manual_seed(0)
    changes = SHAPE | OWN_KEYS.get(family, {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.dim() > 1:
                parameter.normal_(std=0.08)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(dense_folder() / name, folder / name)
    return folder


def family_of(target: str) -> str:
    """The family whose preferred target it is, or the first that can be written as one."""
    able = {name: load("family", name).targets for name in FAMILIES}
    return min(
        (names.index(target), order, name) for order, (name, names) in enumerate(able.items()) if target in names
    )[2]


def check(target: str, engine: str, python: str | None, work: Path) -> str:
    """What the engine does with a model of a target."""
    family = family_of(target)
    source, out = dense_model(family, work / "dense"), work / "moe"
    keys = {"method": "random_split", "experts": 4, "top_k": 2, "router": "random", "target": target}
    upcycle.convert(str(source), out, **keys, verification={"enabled": False})
    found = upcycle.verify_with(out, engine, tokens=64, python=python)
    return f"| `{target}` | {family} | {found.verdict} | {found.explanation.replace('|', '/')} |"


def main() -> int:
    """All targets, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with", dest="engine", default="llama.cpp", help="llama.cpp or vllm (default: llama.cpp)")
    parser.add_argument("--engine-python", help="the Python that has it")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: all)")
    parser.add_argument("--out", type=Path, default=TABLE, help="where the table goes")
    arguments = parser.parse_args()
    lines = ["| target | from | verdict | why |", "|---|---|---|---|"]
    for target in arguments.targets.split(","):
        with tempfile.TemporaryDirectory() as work:
            lines.append(check(target, arguments.engine, arguments.engine_python, Path(work)))
        print(lines[-1], flush=True)
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
