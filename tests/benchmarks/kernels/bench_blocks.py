"""Whole steps of a sparse SmolLM2-135M against its dense parent: one token after a cached text, and a text of 256 tokens.

Random weights in the dense model's shape (hidden 576, FFN 1536, 30 layers, vocabulary 49152, tied), in the same model pruned to half
the FFN, and in qwen2_moe models whose first layer is dense, as EXPERTS/K/WIDTH/SHARED: 7/1/128/5 has seven routed experts of 128
neurons, one of which runs, beside a shared one of 5 x 128. Each runs its experts by torch's ``grouped_mm``, by ``upcycle``, and
its whole blocks by ``upcycle.use_kernels``. One thread, CPU time of this process (with more threads: wall time), contenders in an
order drawn anew every round; medians, and the best in brackets. A round is a few tokens of each: others' use of the machine comes and
goes within seconds.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

from measure import Row, report

import upcycle

COMMON: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
WIDTH = 1536
TEXT = 256
CACHED = 32  # tokens before those that are decoded
TARGET = 0.82  # of the dense model's decoding time, by whole blocks


class Contender:
    """A model, how it is made ready for its turn, and the milliseconds that its turns took."""

    def __init__(self, model: Any, prepare: Callable[[Any], object] = lambda _: None) -> None:
        self.model, self.prepare = model, prepare
        self.cache: Any = None
        self.prefill: list[float] = []
        self.decode: list[float] = []

    def read(self, ids: torch.Tensor, clock: Callable[[], float]) -> None:
        """Time a text."""
        self.prepare(self.model)
        started = clock()
        self.model(ids, use_cache=False, logits_to_keep=1)
        self.prefill.append(1e3 * (clock() - started))

    def start(self, ids: torch.Tensor) -> None:
        """Fill the cache."""
        self.cache = self.model(ids[:, :CACHED], use_cache=True, logits_to_keep=1).past_key_values

    def write(self, ids: torch.Tensor, steps: int, clock: Callable[[], float]) -> None:
        """Time tokens that follow those in the cache, each on its own."""
        self.prepare(self.model)
        for step in range(steps):
            started = clock()
            self.model(ids[:, step : step + 1], past_key_values=self.cache, use_cache=True)
            self.decode.append(1e3 * (clock() - started))


def dense(width: int, dtype: torch.dtype) -> Any:
    """A model of LLaMA's architecture whose FFN is ``width`` wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _filled(LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=width)), dtype)


def sparse(shape: Sequence[int], dtype: torch.dtype) -> Any:
    """A qwen2_moe model."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    experts, top_k, width, shared = shape
    config = Qwen2MoeConfig(
        **COMMON,
        intermediate_size=WIDTH,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=shared * width,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        qkv_bias=False,
    )
    return _filled(Qwen2MoeForCausalLM(config), dtype)


def _filled(model: Any, dtype: torch.dtype) -> Any:
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        norm = parameter.ndim == 1
        parameter.data.normal_(float(norm), 0.01 if norm else 0.03, generator=draw)
    return model.to(dtype).eval()


def grouped(model: Any) -> None:
    """Stock code."""
    upcycle.use_kernels(model, off=True)
    model.set_experts_implementation("grouped_mm")


def experts_alone(model: Any) -> None:
    """Stock blocks, with our experts."""
    upcycle.use_kernels(model, off=True)
    model.set_experts_implementation("upcycle")


WAYS = {"grouped_mm": grouped, "upcycle": experts_alone, "use_kernels": upcycle.use_kernels}


def contenders(shapes: Sequence[str], dtype: torch.dtype) -> dict[str, Contender]:
    """All of them by name; the ways of a shape share one model."""
    found = {"dense": Contender(dense(WIDTH, dtype)), f"pruned to {WIDTH // 2}": Contender(dense(WIDTH // 2, dtype))}
    for shape in shapes:
        model = sparse([int(number) for number in shape.split("/")], dtype)
        found.update({f"{shape} {name}": Contender(model, way) for name, way in WAYS.items()})
    return found


def rows(found: dict[str, Contender]) -> list[Row]:
    """Every contender's decoding and text, against the dense model's."""
    made = []
    for what in ("decode", "prefill"):
        if not getattr(found["dense"], what):
            continue
        base = median(getattr(found["dense"], what))
        for name, contender in found.items():
            taken = median(getattr(contender, what))
            most = TARGET if what == "decode" and name.endswith("use_kernels") else None
            passed = None if most is None else taken / base <= most
            target = f"at most {most}x" if most else ""
            best = min(getattr(contender, what))
            cells = (f"{taken:.1f} ({best:.1f}) ms", f"{base:.1f} ms", f"{taken / base:.2f}x")
            made.append(Row(f"{what} {name}", *cells, target, passed))
    return made


def main() -> int:
    """Measure, print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", metavar="EXPERTS/K/WIDTH/SHARED", help="of qwen2_moe models")
    parser.add_argument("--rounds", type=int, default=25, help="rounds of tokens that count (default: 25)")
    parser.add_argument("--steps", type=int, default=2, help="tokens of each in a round (default: 2)")
    parser.add_argument("--texts", type=int, default=5, help="rounds of texts that count; 0: none (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="more than one: wall time is measured (default: 1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    upcycle.register_kernels()
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    found = contenders(arguments.shapes, getattr(torch, arguments.dtype))
    ids = torch.randint(COMMON["vocab_size"], (1, TEXT), generator=torch.Generator().manual_seed(1))
    order, draw = list(found.values()), random.Random(0)
    with torch.no_grad():
        for contender in order:
            contender.start(ids)
        for rounds, turn in (
            (arguments.rounds, lambda one: one.write(ids, arguments.steps, clock)),
            (arguments.texts, lambda one: one.read(ids, clock)),
        ):
            for _ in range(rounds + 1 if rounds else 0):
                draw.shuffle(order)
                for contender in order:
                    turn(contender)
    for contender in order:  # the first round warmed up
        del contender.decode[: arguments.steps], contender.prefill[:1]
    what = "CPU time" if arguments.threads == 1 else "wall time"
    title = f"{arguments.dtype}, {arguments.threads} thread(s), {what}, medians (best) of {arguments.rounds} rounds"
    return report(title, ("time", "dense"), rows(found))


if __name__ == "__main__":
    raise SystemExit(main())
