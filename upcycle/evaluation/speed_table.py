"""Makes a table of speed and memory, the same for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.formatting import size

ON_KERNELS = "on upcycle's kernels"
_ROWS = (
    ("prefill, tokens/s", "prefill_tokens_per_second", "prefill_ratio"),
    ("decode, tokens/s", "decode_tokens_per_second", "decode_ratio"),
    ("peak memory", "peak_memory_bytes", "memory_ratio"),
)


def speed_rows(
    speed: Mapping[str, Any], names: tuple[str, str] = ("reference", "model")
) -> tuple[list[str], list[tuple[str, ...]], str]:
    """Return columns, rows, and a sentence about how they were measured.

    Args:
        speed: :class:`upcycle.evaluation.speed.Speed` as plain data.
        names: what the reference and the model are called.
    """
    model, reference, kernels = speed["model"], speed["reference"], speed.get("kernels")
    rows = []
    for title, key, ratio in _ROWS:
        text = size if key == "peak_memory_bytes" else _rate
        row = [title, text(model[key])]
        if reference:
            row = [title, text(reference[key]), text(model[key]), f"{speed[ratio]:.2f}x"]
        if kernels:
            row += [text(kernels[key])] if key in kernels else [""]
            row += [f"{kernels[ratio]:.2f}x" if ratio in kernels else ""] if reference else []
        rows.append(tuple(row))
    columns = ["", names[0], names[1], "ratio"] if reference else ["", names[1]]
    if kernels:
        columns += [ON_KERNELS, "ratio"] if reference else [ON_KERNELS]
    experts = f", experts by {model['experts']}" if model["experts"] else ""
    if kernels:
        experts += f", {ON_KERNELS} by {kernels['experts']}"
    threads = f" with {speed['threads']} thread{'s' * (speed['threads'] != 1)}" if speed["device"] == "cpu" else ""
    instructions = f" ({speed['instructions']})" if speed.get("instructions") else ""
    about = (
        f"prompt of {speed['prompt_tokens']} tokens, {speed['generated_tokens']} decoded, one sequence, {speed['dtype']} on "
        f"{speed['device']}{instructions}{threads}{experts}; medians of {speed['rounds']} rounds in turns"
    )
    return columns, rows, about


def _rate(value: float) -> str:
    return f"{value:,.1f}"
