"""Times the experts' kernels on a GPU: ``python -m upcycle.kernels.gpu.timing.bench``.

Torch's ``grouped_mm`` with gathered rows, and one dense FFN of the same FLOPs, are timed on the same numbers. The columns are
median milliseconds of Triton's ``do_bench``, TFLOP/s, the milliseconds of a forward pass replayed as a CUDA graph (without the
time in which the host starts kernels), and peak memory beyond the inputs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F  # noqa: N812

from upcycle.errors import UpcycleError
from upcycle.kernels.gpu.compile_gate.roofline import SHAPES, Shape, total
from upcycle.kernels.layout.devices import gpu
from upcycle.kernels.layout.dispatch import Dispatch, route
from upcycle.kernels.layout.expert_weights import ExpertWeights, Gradients

TimedRun = tuple[str, Callable[[], object]]


def layer(
    shape: Shape, device: torch.device, skew: float = 0.0
) -> tuple[torch.Tensor, ExpertWeights, Dispatch, torch.Tensor]:
    """Random x, packed bf16 weights, dispatch and scores of a shape.

    ``skew`` is the exponent of Zipf's law by which experts are chosen; 0: evenly.
    """
    rng = torch.Generator(device).manual_seed(0)

    def draw(*size: int, fan_in: int = 1) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(*size, generator=rng, device=device) * fan_in**-0.5
        return drawn.bfloat16()

    neurons = shape.experts * shape.width
    up, down = draw(2 * neurons, shape.hidden, fan_in=shape.hidden), draw(neurons, shape.hidden, fan_in=shape.width)
    weights = ExpertWeights(up, down, interleaved=True, widths=(shape.width,) * shape.experts)
    popularity = torch.arange(1, shape.experts + 1, device=device, dtype=torch.float32) ** -skew
    ids = torch.multinomial(popularity.expand(shape.tokens, -1), shape.top_k, generator=rng)
    scores = torch.rand(ids.shape, generator=rng, device=device).softmax(1).flatten()
    return draw(shape.tokens, shape.hidden), weights, route(ids, shape.experts), scores


def ours(
    x: torch.Tensor, weights: ExpertWeights, dispatch: Dispatch, scores: torch.Tensor, training: bool
) -> Callable[[], object]:
    """A function that runs these kernels: a forward pass, or forward and backward."""
    from upcycle.kernels.gpu.backend import backward, forward

    needs = Gradients(x=x, up=weights.up, down=weights.down, scores=scores)

    def run() -> object:
        output, z = forward(x, weights, dispatch, scores, training)
        return backward(output, x, weights, dispatch, scores, z, needs) if training else output

    return run


def grouped_products(
    x: torch.Tensor, weights: ExpertWeights, dispatch: Dispatch, scores: torch.Tensor, training: bool
) -> Callable[[], object]:
    """A function that runs the same layer on torch's grouped products, differentiated by autograd."""
    experts, width = weights.num_experts, weights.width(0)
    up = weights.up.view(experts, 2 * width, -1).detach().requires_grad_(training)
    down = weights.down.view(experts, width, -1).detach().requires_grad_(training)
    x, scores = x.detach().requires_grad_(training), scores.detach().requires_grad_(training)
    ends, tokens, slots = dispatch.offsets[1:].int(), dispatch.row_token.long(), dispatch.row_slot.long()

    def run() -> object:
        with torch.set_grad_enabled(training):
            z = F.grouped_mm(x[tokens], up.mT, offs=ends)
            values = F.grouped_mm(F.silu(z[:, 0::2]) * z[:, 1::2], down, offs=ends)
            output = torch.zeros_like(x).index_add(0, tokens, (values * scores[slots, None]).to(x.dtype))
        return torch.autograd.grad(output, (x, up, down, scores), output.detach()) if training else output

    return run


def dense(shape: Shape, device: torch.device, training: bool) -> Callable[[], object]:
    """A function that runs one dense FFN of as many FLOPs."""
    width = shape.width * shape.top_k
    x = torch.randn(shape.tokens, shape.hidden, device=device, dtype=torch.bfloat16)
    up = torch.randn(2 * width, shape.hidden, device=device, dtype=torch.bfloat16).div_(shape.hidden**0.5)
    down = torch.randn(shape.hidden, width, device=device, dtype=torch.bfloat16).div_(width**0.5)
    leaves = [tensor.requires_grad_(training) for tensor in (x, up, down)]

    def run() -> object:
        with torch.set_grad_enabled(training):
            gate, value = (x @ up.T).chunk(2, 1)
            output = (F.silu(gate) * value) @ down.T
        return torch.autograd.grad(output, leaves, output.detach()) if training else output

    return run


def rows(shape: Shape, device: torch.device, skew: float, training: bool) -> list[list[str]]:
    """One line per candidate: name, milliseconds, TFLOP/s, milliseconds of a replayed graph, MiB."""
    from triton.testing import do_bench, do_bench_cudagraph

    arguments = layer(shape, device, skew)
    runs: list[TimedRun] = [("upcycle", ours(*arguments, training)), ("dense", dense(shape, device, training))]
    if hasattr(F, "grouped_mm"):
        runs.insert(1, ("torch grouped_mm", grouped_products(*arguments, training)))
    flops, found = total(shape, training).flops, []
    for name, run in runs:
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated() - before
        milliseconds = do_bench(run, return_mode="median")
        replayed = "-" if training else f"{do_bench_cudagraph(run, return_mode='median'):.3f}"
        numbers = f"{milliseconds:.3f}", f"{flops / milliseconds / 1e9:.0f}", replayed, f"{memory / 2**20:.0f}"
        found.append([name, *numbers])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of all shapes."""
    parser = argparse.ArgumentParser(
        prog="python -m upcycle.kernels.gpu.timing.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--skew", type=float, default=0.0, help="Zipf exponent of how often experts are chosen")
    options = parser.parse_args(arguments)
    device = gpu()
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, skew {options.skew}\n")
    print("| shape | pass | | ms | TFLOP/s | replayed ms | MiB |\n|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for training in (False, True):
            for row in rows(shape, device, options.skew, training):
                print(f"| {shape.name} | {'forward + backward' if training else 'forward'} | {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UpcycleError as error:
        print(f"error: {error.message}\n\nhint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
