"""Training steps of a stock Qwen3-MoE of four layers of Qwen3-30B-A3B's shape on one GPU (bf16, four rows of 2,048 tokens; forward and
backward, without an optimizer): transformers' own implementations of the experts and the Triton kernels, the same weights and tokens.

    python -P tests/benchmarks/kernels/gpu_model.py
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch

from upcycle.kernels.entry.transformers_experts import register_kernels
from upcycle.kernels.layout.devices import gpu

ROWS, LENGTH, VOCABULARY = 4, 2048, 32_000


def model(layers: int, device: torch.device) -> Any:
    """Random weights, the same every time."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        use_cache=False,
    )
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def main() -> None:
    """Print a line per implementation."""
    from triton.testing import do_bench

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--experts", default="grouped_mm,upcycle,upcycle_lean,eager", help="which, the first one is compared with"
    )
    options = parser.parse_args()
    device = gpu()
    register_kernels()
    made = model(options.layers, device)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), device=device)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}\n")
    print(
        "| experts | step, ms | tokens/s | forward, ms | peak, GiB | loss | logits differ by |\n|---|---|---|---|---|---|---|"
    )
    first = None
    for name in options.experts.split(","):
        made.set_experts_implementation(name)

        def step() -> torch.Tensor:
            made.zero_grad(set_to_none=True)
            loss: torch.Tensor = made(ids, labels=ids).loss
            loss.backward()
            return loss.detach()

        for _ in range(2):
            loss = step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        took = do_bench(step, warmup=100, rep=600, return_mode="median")
        with torch.no_grad():
            logits = made(ids[:1]).logits.float()
            forward = do_bench(lambda: made(ids, logits_to_keep=1), warmup=50, rep=300, return_mode="median")
        first = logits if first is None else first
        differ = float((logits - first).norm() / first.norm())
        times = f"{took:.1f} | {1e3 * ids.numel() / took:,.0f} | {forward:.1f}"
        print(f"| {name} | {times} | {peak / 2**30:.2f} | {float(loss):.4f} | {differ:.1e} |", flush=True)
        del logits
        gc.collect()


if __name__ == "__main__":
    main()
