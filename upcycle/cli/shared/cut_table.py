"""Presents a comparison of compressions: a table that fits the terminal, what is recommended and why, and a page in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.cli.shared.narrow_table import fitting
from upcycle.cli.shared.output import print_facts, print_table, stdout_width, warn
from upcycle.formatting import duration, size

if TYPE_CHECKING:
    from upcycle.evaluation.compressing.cut_comparison import CutComparison, CutResult

CUT_HEADING = "| kept | method | refit |"
_HOW = {"grouped_mm": "stock", "upcycle": "own"}


def show_cuts(found: CutComparison) -> None:
    """Print a comparison of compressions on the terminal."""
    columns, rows = _columns(found), [_cells(row, found) for row in found.results]
    domains = [Path(name).stem for name in found.uncut]
    speeds = [name for name in columns if name.endswith((" prefill", " decode"))]
    shown, left_out = fitting(
        columns, rows, stdout_width(), [*domains, *speeds, "KL", "took", "experts", "quality", "speed", "size"]
    )
    right = [place for place, i in enumerate(shown) if i > 2]
    print_table([columns[i] for i in shown], [[row[i] for i in shown] for row in rows], right=right)
    facts = cut_facts(found)
    if left_out:
        facts.insert(0, ("left out", f"{', '.join(left_out)}: a wider terminal, --out or --json shows them"))
    print_facts(facts)
    for note in found.warnings:
        warn(note)


def cut_page(found: CutComparison) -> str:
    """Return the whole table, and what :func:`show_cuts` says below it, as Markdown."""
    columns = _columns(found)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cells(row, found)) + " |" for row in found.results]
    commands = {row.command for row in found.recommended}
    facts = [
        f"- {name}: {value}" if name else f"  `{value}`" if value in commands else f"  {value}"
        for name, value in cut_facts(found)
    ]
    return "\n".join([*lines, "", *facts, *(f"- warning: {note}" for note in found.warnings), ""])


def _columns(found: CutComparison) -> list[str]:
    unseen = ["unseen"] if found.unseen else []
    speeds = ["speed", *(f"{how} {part}" for how in _HOW.values() for part in ("prefill", "decode"))]
    return [
        "kept",
        "method",
        "refit",
        "size",
        "seen",
        *unseen,
        "quality",
        "same",
        "KL",
        *(Path(name).stem for name in found.uncut),
        *(speeds if found.timing else []),
        "experts",
        "took",
    ]


def _cells(row: CutResult, found: CutComparison) -> list[str]:
    mark = "*" if row.recommended else "+" if row.frontier else ""
    unseen = ["-" if row.unseen_ratio is None else f"{row.unseen_ratio:.3f}x"] if found.unseen else []
    speeds: list[str] = []
    if row.speeds is not None and row.speed is not None:
        each = (row.speeds[how][part] for how in _HOW for part in ("prefill", "decode"))
        speeds = [f"{row.speed:.2f}x", *(f"{one:.2f}x" for one in each)]
    return [
        f"{row.keep:.0%}",
        f"{row.method} {mark}".rstrip(),
        "-" if row.refit == "none" else row.refit,
        f"{row.size_ratio:.0%}",
        f"{row.ratio:.3f}x",
        *unseen,
        f"{row.quality:.3f}x",
        f"{row.agreement:.0%}",
        f"{row.kl:.3f}",
        *(f"{row.perplexity[name]:.2f}" for name in found.uncut),
        *speeds,
        f"{row.experts} x {row.expert_width}, top-{row.top_k}",
        duration(row.seconds),
    ]


def cut_facts(found: CutComparison) -> list[tuple[str, str]]:
    """Return what is said below the table: what the numbers are, and the recommendations with their commands."""
    uncut = ", ".join(f"{Path(name).stem} {value:.2f}" for name, value in found.uncut.items())
    facts = [
        (
            "uncut",
            f"perplexity {uncut} ({found.evaluation_tokens:,} tokens nothing was fitted to), {size(found.uncut_bytes)}",
        ),
        ("seen", "perplexity relative to the uncut model's, on what was held out of the calibration texts"),
    ]
    if found.unseen:
        facts.append(("unseen", f"the same on text of a kind that was not calibrated on ({', '.join(found.unseen)})"))
    facts += [
        ("quality", "the geometric mean of both, by which rows are ranked" if found.unseen else "as seen"),
        (
            "same",
            f"tokens that are those of the uncut model, of {found.continuation_tokens} that each writes behind "
            f"{found.continuations} beginnings",
        ),
        ("*, +", "recommended; on the frontier of quality against size"),
    ]
    if found.timing:
        facts.append(("speed", _how_timed(found.timing)))
    facts.append(("observed", f"once, on {found.calibration_tokens:,} tokens, in {duration(found.observe_seconds)}"))
    for best in found.recommended:
        facts += [(f"at {best.keep:.0%}", f"{_named(best)} {best.reason}"), ("", best.command or "")]
    return facts


def _named(row: CutResult) -> str:
    return row.method if row.refit == "none" else f"{row.method} with refit"


def _how_timed(timing: dict[str, Any]) -> str:
    sequences = "one sequence" if timing["batch"] == 1 else f"{timing['batch']} sequences"
    threads = f"{timing['threads']} thread{'s' * (timing['threads'] != 1)}"
    return (
        f"tokens/s relative to the uncut model, which reads {timing['prompt_tokens']} tokens in {timing['prefill_seconds']:.3g} s and "
        f"writes one in {timing['decode_seconds']:.3g} s with stock kernels; a whole request, each with its faster kernels; "
        f"{sequences}, {timing['dtype']} on this {timing['device']} ({timing['instructions']}, {threads}), with random weights"
    )
