"""Makes a table of speed and memory, the same for the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.formatting import size

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
    model, reference = speed["model"], speed["reference"]
    rows = []
    for title, key, ratio in _ROWS:
        text = size if key == "peak_memory_bytes" else _rate
        row = [title, text(model[key])]
        if reference:
            row = [title, text(reference[key]), text(model[key]), f"{speed[ratio]:.2f}x"]
        rows.append(tuple(row))
    columns = ["", names[0], names[1], "ratio"] if reference else ["", names[1]]
    experts = f", experts by {model['experts']}" if model["experts"] else ""
    threads = f" with {speed['threads']} thread{'s' * (speed['threads'] != 1)}" if speed["device"] == "cpu" else ""
    instructions = f" ({speed['instructions']})" if speed.get("instructions") else ""
    about = (
        f"prompt of {speed['prompt_tokens']} tokens, {speed['generated_tokens']} decoded, one sequence, {speed['dtype']} on "
        f"{speed['device']}{instructions}{threads}{experts}; medians of {speed['rounds']} rounds in turns"
    )
    return columns, rows, about


def _rate(value: float) -> str:
    return f"{value:,.1f}"
