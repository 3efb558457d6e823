"""What else makes SmolLM2-135M cheaper without training, on the texts on which ``split_quality.py`` measures splits.

- **TEAL** (arXiv 2408.14690): what enters a matrix is set to zero where its magnitude is below a threshold, which is the
  quantile of that matrix's inputs on the calibration text that leaves the wanted part, the same part everywhere. ``FFN``: the three
  matrices of every FFN; ``all``: attention's projections, too. Quality is simulated. Each token has zeros of its own, so that a
  prompt is not read faster with any products of today; writing a token reads that part of the weights, if a kernel gathers it.
- **Attention dropped** (Dense2MoE, arXiv 2605.26496, drops attention where it is redundant): the layers whose
  attention turns the stream least, by the cosine of the stream before and after it, lose it.
- **Layers dropped** (ShortGPT, arXiv 2403.03853): the layers that turn the stream least, by the same measure, are left out.

The last two are timed against the dense model in turns, one thread, fp32: reading 256 tokens, and writing one.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
from domains import DOMAINS, FOREIGN, texts
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from upcycle.architectures.stock import load_stock_model, load_tokenizer
from upcycle.text.mixture import mixed_windows

WINDOW, PROMPT, WRITTEN = 512, 256, 8
FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
KEPT, DROPPED_ATTENTION, DROPPED_LAYERS = (0.75, 0.5, 0.25), (2, 5, 10), (1, 3, 6)


def forward(model: Any, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the logits ``[4, W, V]`` of four windows at a time."""
    with torch.no_grad():
        for some in windows.split(4):
            yield model(some, use_cache=False).logits


def losses(model: Any, domains: dict[str, torch.Tensor]) -> list[float]:
    """Return the mean loss per token of every domain."""
    found = []
    for windows in domains.values():
        pairs = zip(forward(model, windows), windows.split(4), strict=True)
        each = [cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") for out, ids in pairs]
        found.append(torch.stack(each).sum().item() / (windows.numel() - len(windows)))
    return found


def thresholds(model: Any, windows: torch.Tensor, kept: float, names: Sequence[str]) -> dict[nn.Module, float]:
    """Return, for every matrix, the magnitude that the wanted part of its inputs reaches."""
    found: dict[nn.Module, list[float]] = {}

    def note(module: nn.Module, given: tuple[torch.Tensor]) -> None:
        magnitudes = given[0].detach().abs().flatten()
        found.setdefault(module, []).append(
            magnitudes.kthvalue(max(1, round((1 - kept) * len(magnitudes)))).values.item()
        )

    hooks = [m.register_forward_pre_hook(note) for n, m in model.named_modules() if n.rpartition(".")[2] in names]
    for _ in forward(model, windows):
        pass
    for hook in hooks:
        hook.remove()
    return {module: sum(each) / len(each) for module, each in found.items()}


@contextmanager
def thresholded(limits: dict[nn.Module, float]) -> Iterator[None]:
    """Set what enters a matrix to zero below its threshold."""

    def cut(limit: float) -> Callable[..., tuple[torch.Tensor]]:
        return lambda _, given: (given[0] * (given[0].abs() > limit),)

    hooks = [module.register_forward_pre_hook(cut(limit)) for module, limit in limits.items()]
    yield
    for hook in hooks:
        hook.remove()


class NoAttention(nn.Module):
    """Adds nothing to the stream."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Return zeros."""
        return torch.zeros_like(hidden_states), None


def redundancy(model: Any, windows: torch.Tensor) -> tuple[list[int], list[int]]:
    """Return the layers in the order in which their attention, and they themselves, turn the stream: least first."""
    layers = model.model.layers
    turned = torch.zeros(2, len(layers), dtype=torch.float64)
    before: dict[int, torch.Tensor] = {}

    def hooks(index: int, layer: Any) -> list[Any]:
        def start(_: nn.Module, given: tuple[torch.Tensor]) -> None:
            before[index] = given[0]

        def attended(_: nn.Module, given: tuple[Any], made: tuple[torch.Tensor]) -> None:
            stream = before[index]
            turned[0, index] += (1 - cosine_similarity(stream, stream + made[0], dim=-1)).double().sum()

        def end(_: nn.Module, given: tuple[Any], made: Any) -> None:
            after = made if isinstance(made, torch.Tensor) else made[0]
            turned[1, index] += (1 - cosine_similarity(before.pop(index), after, dim=-1)).double().sum()

        return [
            layer.register_forward_pre_hook(start),
            layer.self_attn.register_forward_hook(attended),
            layer.register_forward_hook(end),
        ]

    registered = [hook for index, layer in enumerate(layers) for hook in hooks(index, layer)]
    for _ in forward(model, windows):
        pass
    for hook in registered:
        hook.remove()
    return turned[0].argsort().tolist(), turned[1].argsort().tolist()


@contextmanager
def without(model: Any, layers: Sequence[int], whole: bool) -> Iterator[None]:
    """Leave out the attention of some layers, or these layers themselves."""
    body = model.model
    every, attentions = body.layers, [layer.self_attn for layer in body.layers]
    if whole:
        body.layers = nn.ModuleList(layer for index, layer in enumerate(every) if index not in layers)
        for index, layer in enumerate(body.layers):
            layer.self_attn.layer_idx = index
    else:
        for index in layers:
            every[index].self_attn = NoAttention()
    model.config.num_hidden_layers = len(body.layers)
    yield
    body.layers, model.config.num_hidden_layers = every, len(every)
    for index, attention in enumerate(attentions):
        every[index].self_attn, attention.layer_idx = attention, index


def seconds(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Return how long the model takes to read a prompt and to write one token after it."""
    with torch.no_grad():
        started = process_time()
        made = model(ids, use_cache=True, logits_to_keep=1)
        read = process_time()
        for _ in range(WRITTEN):
            made = model(ids[:, :1], past_key_values=made.past_key_values, use_cache=True)
        return read - started, (process_time() - read) / WRITTEN


def relative_times(model: Any, layers: Sequence[int], whole: bool, rounds: int) -> tuple[float, float]:
    """Return the time of reading and of writing relative to the dense model's, in turns: medians over rounds."""
    ids = torch.randint(model.config.vocab_size, (1, PROMPT))
    pairs = []
    for _ in range(rounds + 1):
        dense = seconds(model, ids)
        with without(model, layers, whole):
            less = seconds(model, ids)
        pairs.append((less[0] / dense[0], less[1] / dense[1]))
    read, write = (median(column) for column in zip(*pairs[1:], strict=True))  # the first round warms up
    return read, write


def line(name: str, nats: Sequence[float], dense: Sequence[float], time: str) -> str:
    """Return one row of the table: perplexities, their mean ratio over what was calibrated on, news, time."""
    ratios = [math.exp(mine - theirs) for mine, theirs in zip(nats, dense, strict=True)]
    mean = math.prod(ratios[: len(DOMAINS)]) ** (1 / len(DOMAINS))
    return (
        f"{name:28} "
        + ", ".join(f"{math.exp(n):8.2f}" for n in nats)
        + f"  {mean:6.3f}x, news {ratios[-1]:6.3f}x  {time}"
    )


def main() -> int:
    """Measure all rivals and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation-tokens", type=int, default=4096, help="per domain  [default: 4096]")
    parser.add_argument(
        "--calibration-tokens", type=int, default=6144, help="for thresholds and order  [default: 6144]"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each timing  [default: 7]")
    wanted = parser.parse_args()
    smollm2 = [sys.executable, "-P", Path(__file__).resolve().parents[2] / "support" / "smollm2.py"]
    path = Path(subprocess.run(smollm2, capture_output=True, text=True, check=True).stdout.split("\n")[-2])
    model, tokenizer = load_stock_model(path, torch.float32).eval(), load_tokenizer(path)
    calibration, evaluation = texts()
    _, (foreign,) = texts([FOREIGN])
    read = {str(file): file.read_text() for file in calibration}
    windows = mixed_windows(read, tokenizer, wanted.calibration_tokens, WINDOW)
    domains = {
        name: mixed_windows({name: file.read_text()}, tokenizer, wanted.evaluation_tokens, WINDOW)
        for name, file in zip((*DOMAINS, FOREIGN), (*evaluation, foreign), strict=True)
    }
    dense = losses(model, domains)
    print(
        f"SmolLM2-135M; perplexity on {', '.join(domains)}; reading {PROMPT} tokens and writing one, relative to dense"
    )
    print(line("dense", dense, dense, ""))
    for name, modules in (("FFN", FFN), ("all", (*FFN, *ATTENTION))):
        for kept in KEPT:
            with thresholded(thresholds(model, windows, kept, modules)):
                print(line(f"TEAL, {name}, {kept:.0%} kept", losses(model, domains), dense, ""), flush=True)
    torch.set_num_threads(1)
    for what, order, whole, counts in zip(
        ("attention", "layers"),
        redundancy(model, windows),
        (False, True),
        (DROPPED_ATTENTION, DROPPED_LAYERS),
        strict=True,
    ):
        for count in counts:
            with without(model, order[:count], whole):
                nats = losses(model, domains)
            reading, writing = relative_times(model, order[:count], whole, wanted.rounds)
            print(line(f"without {count} {what}", nats, dense, f"{reading:.2f}x, {writing:.2f}x"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
