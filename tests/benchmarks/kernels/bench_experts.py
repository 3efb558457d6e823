"""Experts on the CPU: the ``upcycle`` path against transformers' ``eager``, ``grouped_mm`` and ``batched_mm``, on the same modules.

One thread, CPU time of this process, contenders in an order drawn anew every round, medians. A contender that takes half a second,
and ten times as long as the fastest, is timed once; ``batched_mm`` is left out where the weights it copies for every row
would take more than 4 GB. Routings are random (balanced), by Zipf's law, or of 1 to K experts per token (dynamic; the others get
the missing ones as sentinels).
The last column is a limit, and how far the best of three is above it: for few tokens the time of reading the chosen experts'
weights, otherwise that of torch's matrix products alone, from and into memory that is there already.
Beside them always the dense FFN of the same FLOPs, K I wide. ``--only`` takes some of the parts.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

from measure import Row, report

from upcycle.kernels.entry.transformers_experts import register_kernels

NAMES = ("eager", "grouped_mm", "batched_mm", "upcycle")
MOST_COPIED = 4 * 2**30
SLOW = 10
LONG = 500  # milliseconds; what takes less may only have been loaded
ROUTINGS = 50  # with other loads; of all their shapes, more than the library keeps code for
SKIPPED: set[str] = set()
PARTS = ("fp32", "routings", "bf16", "decode", "split")


@dataclass(frozen=True)
class Shape:
    """T tokens, H hidden, I width, E experts, K per token."""

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"({self.tokens}, {self.hidden}, {self.width}, {self.experts}, {self.top_k})"


SHAPES = {
    "8 experts": Shape(1024, 256, 256, 8, 2),
    "32 small": Shape(1024, 256, 64, 32, 8),
    "64": Shape(512, 512, 128, 64, 4),
    "64, 8 tokens": Shape(8, 512, 128, 64, 4),
    "SmolLM2 copies": Shape(512, 576, 1536, 4, 2),
    "SmolLM2 slices": Shape(512, 576, 192, 8, 4),
    "Mixtral-like": Shape(512, 1024, 3584, 8, 2),
}


class Layer:
    """One stock experts module, its inputs, and the dense FFN of the same FLOPs."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32, dispatch: str = "balanced") -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        torch.manual_seed(0)
        self.shape = shape
        config = MixtralConfig(hidden_size=shape.hidden, intermediate_size=shape.width, num_local_experts=shape.experts)
        config._experts_implementation = "eager"
        with torch.device("meta"):
            module: Any = MixtralExperts(config)
        self.module = module.to_empty(device="cpu").to(dtype)
        for parameter in self.module.parameters():
            parameter.data.normal_(0, 0.02)
        dense = shape.top_k * shape.width
        self.gate_up = torch.nn.Parameter(torch.randn(2 * dense, shape.hidden).mul_(0.02).to(dtype))
        self.down = torch.nn.Parameter(torch.randn(shape.hidden, dense).mul_(0.02).to(dtype))
        self.x = torch.randn(shape.tokens, shape.hidden).to(dtype).requires_grad_()
        self.grad = torch.randn(shape.tokens, shape.hidden).to(dtype)
        self.ids, scores = route(shape, dispatch)
        self.scores = scores.to(dtype).requires_grad_()
        self.anew: Iterator[tuple[torch.Tensor, torch.Tensor]] = iter(())
        self.module._is_expert_parallel = dispatch == "dynamic"

    def contenders(self, backward: bool) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        shape, size = self.shape, self.x.element_size()
        copied = shape.tokens * shape.top_k * 3 * shape.width * shape.hidden * size
        names = [name for name in NAMES if name not in SKIPPED and (name != "batched_mm" or copied <= MOST_COPIED)]
        found = {name: lambda name=name: self.run(lambda: self.experts(name), backward) for name in names}
        return {**found, "dense": lambda: self.run(self.dense, backward)}

    def experts(self, name: str) -> torch.Tensor:
        """The module's output by one implementation."""
        self.module.config._experts_implementation = name
        made: torch.Tensor = self.module(self.x, self.ids, self.scores)
        return made

    def dense(self) -> torch.Tensor:
        """The dense FFN's."""
        gate, up = functional.linear(self.x, self.gate_up).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, self.down)

    def route_anew(self) -> None:
        """From now on every pass has another routing, as in training and in serving, so that every expert sees other rows."""
        routings = [route(self.shape, "balanced", seed) for seed in range(ROUTINGS)]
        self.anew = cycle((ids, scores.to(self.x.dtype).requires_grad_()) for ids, scores in routings)

    def read(self) -> None:
        """Every weight of the chosen experts, once."""
        for expert in self.ids.unique().tolist():
            self.module.gate_up_proj.data[expert].sum()
            self.module.down_proj.data[expert].sum()

    def products(self, backward: bool) -> Callable[[], object]:
        """The products of every expert's rows with its weights, nothing between them: what all implementations compute."""
        shape, tasks = self.shape, []
        counts = torch.bincount(self.ids[self.ids < shape.experts], minlength=shape.experts).tolist()
        for expert, count in enumerate(counts):
            up, down = self.module.gate_up_proj.data[expert], self.module.down_proj.data[expert]
            x, z = torch.randn(count, shape.hidden), torch.randn(count, 2 * shape.width)
            h, y = torch.randn(count, shape.width), torch.randn(count, shape.hidden)
            tasks += [(x, up.T, z), (h, down.T, y)]
            if backward:
                tasks += [(y, down, h), (y.T, h, torch.zeros_like(down))]
                tasks += [(z, up, x), (z.T, x, torch.zeros_like(up))]

        def multiply() -> None:
            with torch.no_grad():
                for left, right, out in tasks:
                    torch.mm(left, right, out=out)

        return multiply

    def run(self, function: Callable[[], torch.Tensor], backward: bool) -> None:
        """Once, as in a training step that starts without gradients, or without autograd."""
        if routed := next(self.anew, None):
            self.ids, self.scores = routed
        with torch.set_grad_enabled(backward):
            made = function()
        if backward:
            made.backward(self.grad)
            self.module.zero_grad()
            self.gate_up.grad = self.down.grad = self.x.grad = self.scores.grad = None

    def kept_bytes(self, name: str) -> int:
        """What the forward pass keeps for the backward one, without weights, ids and scores."""
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if tensor.is_floating_point():
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            made = self.experts(name)
        for tensor in (*self.module.parameters(), self.scores):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        del made
        return sum(kept.values())


def route(shape: Shape, kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights ``[T, K]``; what a token has no expert for has the id E and the weight 0."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape.tokens, shape.experts, generator=draw)
    if kind == "zipf":
        logits -= torch.arange(1, shape.experts + 1).log()
    scores, ids = logits.softmax(-1).topk(shape.top_k)
    if kind == "dynamic":
        number = torch.randint(1, shape.top_k + 1, (shape.tokens, 1), generator=draw)
        none = torch.arange(shape.top_k) >= number
        ids, scores = ids.masked_fill(none, shape.experts), scores.masked_fill(none, 0)
    return ids, scores / scores.sum(-1, keepdim=True)


def medians(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of CPU time; everyone's first run warms it up, and counts for those alone that are far behind, and long."""
    first = {name: timed(function) for name, function in contenders.items()}
    slow = {name for name, taken in first.items() if taken > max(LONG, SLOW * min(first.values()))}
    taken: dict[str, list[float]] = {name: [first[name]] if name in slow else [] for name in contenders}
    order, draw = [name for name in contenders if name not in slow], random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)  # who comes before leaves memory and caches in one state or another
        for name in order:
            taken[name].append(timed(contenders[name]))
    return {name: median(values) for name, values in taken.items()}


def timed(function: Callable[[], object]) -> float:
    """Milliseconds of this process's CPU time."""
    started = time.process_time_ns()
    function()
    return (time.process_time_ns() - started) / 1e6


def line(what: str, found: dict[str, float], kept: str = "") -> str:
    """A row of the table."""
    best = min(value for name, value in found.items() if name not in ("upcycle", "dense"))
    cells = [f"{found[name]:.2f}" if name in found else "-" for name in (*NAMES, "dense")]
    ratios = [f"{best / found['upcycle']:.2f}x", f"{found['grouped_mm'] / found['upcycle']:.2f}x"]
    slower = f"{found['upcycle'] / found['dense']:.2f}x" if "dense" in found else "-"
    return "| " + " | ".join([what, *cells, *ratios, slower, kept]) + " |"


def header() -> None:
    """The table's head."""
    names = [
        "layer (T, H, I, E, K), ms",
        *NAMES,
        "dense",
        "best / upcycle",
        "grouped_mm / upcycle",
        "upcycle / dense",
        "kept; limit",
    ]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|", flush=True)


def ratios(found: Sequence[dict[str, float]]) -> tuple[float, float]:
    """The least best / upcycle, and the geometric mean of grouped_mm / upcycle."""
    least = min(min(v for n, v in one.items() if n not in ("upcycle", "dense")) / one["upcycle"] for one in found)
    logs = [math.log(one["grouped_mm"] / one["upcycle"]) for one in found]
    return least, math.exp(sum(logs) / len(logs))


def fp32(rounds: int) -> list[Row]:
    """Forward, and forward and backward, on every shape; what is kept between them."""
    header()
    forward, training, worst_kept = [], [], 0.0
    for name, shape in SHAPES.items():
        layer = Layer(shape)
        found, limit = limited(layer, False, rounds)
        forward.append(found)
        print(line(f"{name} {shape} forward", found, limit), flush=True)
        found, limit = limited(layer, True, rounds)
        training.append(found)
        kept = {impl: layer.kept_bytes(impl) for impl in ("eager", "grouped_mm", "upcycle")}
        formula = 4 * (shape.tokens * shape.hidden + 2 * shape.tokens * shape.top_k * shape.width)
        worst_kept = max(worst_kept, kept["upcycle"] / formula)
        text = " / ".join(f"{value / 2**20:.1f}" for value in kept.values()) + " MiB"
        print(line(f"{name} {shape} forward and backward", found, f"{text}; {limit}"), flush=True)
    (least, _), (least_both, mean) = ratios(forward), ratios(training)
    return [
        _at_least("fp32 forward, worst shape", least, 1.0, "the best of three"),
        _at_least("fp32 forward and backward, worst shape", least_both, 1.0, "the best of three"),
        _at_least("fp32 forward and backward, geometric mean", mean, 1.15, "grouped_mm"),
        Row("kept for the backward pass", "", "", f"{worst_kept:.3f}x", "at most 1x b(TH + 2RI)", worst_kept <= 1),
    ]


def limited(layer: Layer, backward: bool, rounds: int) -> tuple[dict[str, float], str]:
    """Medians, and what the products alone take."""
    timings = medians({**layer.contenders(backward), "products": layer.products(backward)}, rounds)
    products = timings.pop("products")
    best = min(timings[other] for other in timings.keys() & set(NAMES[:3]))
    return timings, f"products: {products:.2f} ms, {best / products:.2f}x"


def routings(rounds: int) -> list[Row]:
    """Skewed loads and numbers of experts that differ."""
    header()
    found = []
    for kind in ("zipf", "dynamic"):
        for name in ("8 experts", "32 small", "64"):
            layer = Layer(SHAPES[name], dispatch=kind)
            timings = {n: f for n, f in layer.contenders(True).items() if n != "batched_mm"}
            found.append(medians(timings, rounds))
            print(line(f"{name}, {kind}, forward and backward", found[-1]), flush=True)
    least, mean = ratios(found)
    return [
        _at_least("Zipf and dynamic-k, forward and backward, worst", least, 1.0, "the best of two"),
        _at_least("Zipf and dynamic-k, geometric mean", mean, 1.15, "grouped_mm"),
    ]


def bf16(rounds: int) -> list[Row]:
    """16-bit storage, against ``grouped_mm`` alone: the others take as long or longer. Every pass has another routing: the library
    that multiplies makes code for every shape it has not met, which a benchmark of one routing would not show.
    """
    header()
    found = []
    for name in ("8 experts", "32 small", "64"):
        layer = Layer(SHAPES[name], torch.bfloat16)
        layer.route_anew()
        for backward, what in ((False, "forward"), (True, "forward and backward")):
            timings = {n: f for n, f in layer.contenders(backward).items() if n in ("grouped_mm", "upcycle", "dense")}
            found.append(medians(timings, min(rounds, 3)))
            print(line(f"bf16, {name}, {what}", found[-1]), flush=True)
    return [_at_least("bf16, 8 and more rows per expert, worst", ratios(found)[0], 4.0, "grouped_mm")]


def decode(rounds: int) -> list[Row]:
    """One token, and eight; and how much faster than the best of three it is to only read the chosen experts' weights, once."""
    header()
    rows = []
    for tokens in (1, 8):
        found = []
        for name, shape in SHAPES.items():
            if name == "64, 8 tokens":
                continue
            layer = Layer(Shape(tokens, shape.hidden, shape.width, shape.experts, shape.top_k))
            timings = medians({**layer.contenders(False), "read": layer.read}, 3 * rounds)
            read = timings.pop("read")
            found.append(timings)
            best = min(timings[other] for other in timings.keys() & set(NAMES[:3]))
            print(line(f"{name} {layer.shape}", timings, f"read: {read:.2f} ms, {best / read:.2f}x"), flush=True)
        rows.append(_at_least(f"decode, {tokens} token(s), worst shape", ratios(found)[0], 1.3, "the best of three"))
    return rows


def split(rounds: int) -> list[Row]:
    """A dense FFN of d 4096 and F 11008 against 16 slices of it, 4 per token, with their router."""
    rows = []
    for tokens in (1, 256):
        layer = Layer(Shape(tokens, 4096, 688, 16, 4))
        parent = Layer(Shape(tokens, 4096, 11008, 1, 1))  # whose dense FFN is the parent
        router = torch.randn(16, 4096)

        def sparse(layer: Layer = layer, router: torch.Tensor = router) -> None:
            with torch.no_grad():
                scores, layer.ids = (layer.x @ router.T).softmax(-1).topk(4)
                layer.scores = scores
                layer.experts("upcycle")

        found = medians({"upcycle": sparse, "dense": parent.contenders(False)["dense"]}, rounds)
        ratio = found["dense"] / found["upcycle"]
        print(
            f"split, {tokens} tokens: dense {found['dense']:.1f} ms, 4 of 16 slices {found['upcycle']:.1f} ms",
            flush=True,
        )
        rows.append(_at_least(f"25% of F 11008 at d 4096, {tokens} token(s)", ratio, 2.5, "its dense parent"))
        del layer, parent
    return rows


def _at_least(what: str, ratio: float, target: float, than: str) -> Row:
    return Row(what, "", than, f"{ratio:.2f}x", f"at least {target}x", ratio >= target)


def main() -> int:
    """Measure, print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (default: 9)")
    parser.add_argument(
        "--skip", nargs="+", choices=NAMES[:3], default=[], help="contenders to leave out, such as batched_mm"
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="of fp32 (default: all)"
    )
    arguments = parser.parse_args()
    for name in set(SHAPES) - set(arguments.shapes):
        del SHAPES[name]
    SKIPPED.update(arguments.skip)
    torch.set_num_threads(1)
    register_kernels()
    rows: list[Row] = []
    for part in arguments.only:
        rows += {"fp32": fp32, "routings": routings, "bf16": bf16, "decode": decode, "split": split}[part](
            arguments.rounds
        )
    capability = torch.backends.cpu.get_cpu_capability()
    title = f"experts on one thread ({capability}, torch {torch.__version__}), medians of {arguments.rounds}"
    return report(title, ("", "against"), rows)


if __name__ == "__main__":
    raise SystemExit(main())
