"""``upcycle compare``: measures ways to split a model, and recommends one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import ProgressBars, print_facts, print_json, print_table, warn
from upcycle.errors import UsageError
from upcycle.files.atomic_files import write_text_whole
from upcycle.files.output.ownership import cannot_write, check_overwritable, holds_keys
from upcycle.formatting import count, duration, size


def _list(_: Any, __: Any, value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _fractions(context: Any, option: Any, value: str) -> list[float]:
    try:
        return [float(part) for part in _list(context, option, value)]
    except ValueError:
        raise UsageError(f"--active takes fractions, got '{value}'", hint="--active 0.75,0.5,0.25") from None


@click.command("compare", short_help="Find the best split of a model")
@click.argument("source")
@click.option(
    "--methods", default="all", callback=_list, help="splitting methods: NAME or NAME:KEY=VALUE  [default: all]"
)
@click.option("--routers", default="all", callback=_list, help="router initialisers  [default: all]")
@click.option(
    "--active",
    default="0.75,0.5,0.25",
    callback=_fractions,
    help="fractions of the FFN neurons that run per token, over all layers  [default: 0.75,0.5,0.25]",
)
@click.option(
    "--calibration", default="demo", callback=_list, help="texts to calibrate on, one per domain  [default: demo]"
)
@click.option("--calibration-tokens", default=6144, help="tokens to calibrate on  [default: 6144]")
@click.option("--window", default=256, help="tokens per window  [default: 256]")
@click.option(
    "--text",
    default="",
    callback=_list,
    help="texts to measure on  [default: the last quarter of each calibration text]",
)
@click.option("--tokens", default=2048, help="tokens to measure on, per text  [default: 2048]")
@click.option(
    "--pieces", default=24, help="about how many experts an FFN is split into, shared ones included  [default: 24]"
)
@click.option(
    "--layers", default="except-first:1", help="layers that are split; the others stay dense  [default: except-first:1]"
)
@click.option(
    "--grid",
    type=click.Choice(["staged", "full"]),
    default="staged",
    help="staged: all methods with one router, then all routers with the best method; full: every combination  [default: staged]",
)
@click.option("--seed", default=0, help="seed of every random choice  [default: 0]")
@click.option("--out", type=click.Path(path_type=Path), help="save the table as JSON, or as Markdown (.md)")
@quiet_option
@common_options
def command(source: str, out: Path | None, quiet: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Compare splitting methods, routers and refits on SOURCE, and recommend a command.

    No checkpoint is written: layers are split and run in memory, one by one. Every row of the table is measured on text that
    nothing was fitted to. Static pruning with the same refit, and routing by an oracle, are always among the rows.

    \b
    upcycle compare demo
    upcycle compare ./llama --calibration docs.txt,code.txt,news.txt --active 0.5
    upcycle compare ./llama --methods coactivation_kmeans,coactivation_kmeans:features=gram --routers ridge
    """
    from upcycle.evaluation.compare import compare

    if out:
        check_overwritable(out, _is_table if out.suffix == ".md" else holds_keys("source", "dense", "results"))
    calibration = options.pop("calibration")
    found = compare(source, calibration=calibration, progress=ProgressBars(quiet), **options)
    for note in found.skipped:
        warn(f"left out: {note}")
    if out:
        text = comparison_table(found) if out.suffix == ".md" else json.dumps(found.as_dict(), indent=2) + "\n"
        try:
            write_text_whole(out, text)
        except OSError as error:
            raise cannot_write(out, error) from None
    if as_json:
        print_json(found.as_dict())
        return
    right = range(4, 12)
    print_table(_columns(found), [_cells(row, found) for row in found.results], right=right)
    print_facts(_verdicts(found))


def _is_table(text: str) -> bool:
    return text.startswith("| active | method | router | refit |")


def _columns(found: Any) -> list[str]:
    domains = [Path(name).stem for name in found.dense]
    return [
        "active",
        "method",
        "router",
        "refit",
        *domains,
        "ratio",
        "KL",
        "captured",
        "parameters",
        "FLOPs",
        "time",
        "memory",
    ]


def _cells(row: Any, found: Any) -> list[str]:
    return [
        f"{row.active:.0%}",
        row.method + (" *" if row.recommended else ""),
        row.router,
        row.refit,
        *(f"{row.perplexity[name]:.2f}" for name in found.dense),
        f"{row.ratio:.3f}x",
        f"{row.kl:.3f}",
        "-" if row.captured is None else f"{row.captured:.0%}",
        count(row.parameters_active),
        f"{row.flops_ratio:.2f}x",
        duration(row.seconds),
        size(row.peak_memory_bytes),
    ]


def _verdicts(found: Any) -> list[tuple[str, str]]:
    dense = ", ".join(f"{Path(name).stem} {value:.2f}" for name, value in found.dense.items())
    facts = [("dense", f"perplexity {dense} ({found.evaluation_tokens:,} tokens nothing was fitted to)")]
    for active in dict.fromkeys(row.active for row in found.results):
        best, static = found.best(active), found.baseline(active, "static")
        beats = "beats" if best.ratio < static.ratio else "does NOT beat"
        facts.append(
            (
                f"at {active:.0%}",
                f"{best.method}, {best.router}: {best.ratio:.3f}x; {beats} static pruning ({static.ratio:.3f}x)",
            )
        )
        facts.append(("", best.command or ""))
    return facts


def comparison_table(found: Any) -> str:
    """Return the table, with the recommendations below it, as Markdown."""
    columns = _columns(found)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cells(row, found)) + " |" for row in found.results]
    facts = [f"- {name}: {value}" if name else f"  `{value}`" for name, value in _verdicts(found)]
    return "\n".join([*lines, "", *facts, ""])
