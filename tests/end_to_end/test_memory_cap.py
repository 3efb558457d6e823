"""A model larger than the memory it may use is calibrated, refitted and converted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from upcycle.files.locate import DEMO_FOLDER

LAYERS, HIDDEN, WIDTH, VOCABULARY = 12, 768, 1024, 4096
ROOM = 190_000_000  # bytes of address space beyond what the interpreter has mapped

CHILD = """
import json, resource, sys
import torch, transformers, safetensors.torch, sklearn.cluster, scipy.optimize
import upcycle, upcycle.models.stock_model, upcycle.calibration.calibrate, upcycle.conversion.convert
from transformers import LlamaForCausalLM, MixtralForCausalLM
torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = mapped + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    torch.empty(int(sys.argv[4]), dtype=torch.uint8)
    raise SystemExit("the cap does not hold")
except RuntimeError:
    pass
result = upcycle.convert(
    sys.argv[1], sys.argv[2], method="coactivation_kmeans", experts=8, top_k=3, target="mixtral",
    calibration={"text": "demo", "tokens": 512, "window": 64}, verification={"enabled": False},
)
print(json.dumps([layer["error_after"] / layer["error_before"] for layer in result.layers]))
"""


def big_model(folder: Path) -> int:
    """A Llama whose layers are written one by one; returns the bytes of its weights in fp32."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / "model" / name, folder / name)
    torch.manual_seed(0)
    outside = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    total, weight_map = 0, {}
    for index in range(-1, LAYERS):
        tensors = outside
        if index >= 0:
            d, f = HIDDEN, WIDTH
            shapes = {
                **{f"self_attn.{name}_proj": (d, d) for name in "qkvo"},
                **{"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)},
            }
            tensors = {
                f"model.layers.{index}.{name}.weight": torch.randn(s) / s[1] ** 0.5 for name, s in shapes.items()
            }
            norms = ("input_layernorm", "post_attention_layernorm")
            tensors |= {f"model.layers.{index}.{name}.weight": torch.ones(d) for name in norms}
        file = f"part-{index + 1}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


@pytest.mark.long
def test_calibration_under_a_cap_that_the_model_does_not_fit_into(tmp_path: Path) -> None:
    total = big_model(tmp_path / "dense")
    assert total > 1.2 * ROOM
    # One arena, and every tensor in a mapping of its own: tensors on the heap leave holes there whose size is chance, 20 to 50 MB.
    glibc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**os.environ, **glibc, "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path / "dense"), str(tmp_path / "out"), str(ROOM), str(total)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    improved = json.loads(done.stdout.splitlines()[-1])
    assert len(improved) == LAYERS
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > total
