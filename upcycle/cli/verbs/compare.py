"""``upcycle compare``: measures ways to split a dense model, or to compress a MoE, and recommends one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import ProgressBars, print_facts, print_json, print_table, warn
from upcycle.errors import UsageError
from upcycle.evaluation.timed_dtype import AUTO, TIMED_DTYPES
from upcycle.files.atomic_files import write_text_whole
from upcycle.files.output.ownership import cannot_write, check_overwritable, holds_keys
from upcycle.formatting import duration, size


def _list(_: Any, __: Any, value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _fractions(context: Any, option: Any, value: str) -> list[float]:
    try:
        return [float(part) for part in _list(context, option, value)]
    except ValueError:
        raise UsageError(f"--{option.name} takes fractions, got '{value}'", hint=f"--{option.name} 0.75,0.5") from None


# What is compared of a dense model, and of a MoE: options that the other does not have.
_SPLITS = ("methods", "routers", "active", "pieces", "layers", "grid")
_CUTS = ("compress", "keep")
_COMMON_KEYS = ("source", "results", "skipped", "timing", "goal")  # of the JSON of either


@click.command("compare", short_help="Find the best split of a model, or the best compression of a MoE")
@click.argument("source")
@click.option(
    "--compress",
    default="all",
    callback=_list,
    help="of a MoE: methods that compress it, NAME or NAME:KEY=VALUE  [default: all]",
)
@click.option(
    "--keep", default="0.75,0.5", callback=_fractions, help="of a MoE: the parts that are kept  [default: 0.75,0.5]"
)
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
    "--calibration",
    default="demo",
    callback=_list,
    help="texts to calibrate on, one per domain; self: the model writes it  [default: demo]",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(16),
    help="tokens to calibrate on  [default: 6144, of a MoE 8192]",
)
@click.option("--window", type=click.IntRange(8), default=256, help="tokens per window  [default: 256]")
@click.option(
    "--text",
    default="",
    callback=_list,
    help="texts to measure on  [default: the last quarter of each calibration text; of self none, so the embedded ones]",
)
@click.option("--tokens", type=click.IntRange(2), default=2048, help="tokens to measure on, per text  [default: 2048]")
@click.option(
    "--pieces", default=12, help="about how many experts an FFN is split into, shared ones included  [default: 12]"
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
@click.option(
    "--faster",
    type=float,
    metavar="X",
    help="recommend the best quality among those at least X times as fast as the source",
)
@click.option(
    "--within",
    type=float,
    metavar="X",
    help="recommend the fastest (of a MoE: the smallest) with a perplexity of at most X times the source's",
)
@click.option(
    "--batch", type=click.IntRange(1), default=1, help="sequences at a time, where speed is measured  [default: 1]"
)
@click.option(
    "--dtype",
    type=click.Choice(TIMED_DTYPES),
    default=AUTO,
    help="that speed is measured in  [default: auto, the stored one where this machine multiplies it natively, else float32]",
)
@click.option("--no-time", "timed", is_flag=True, flag_value=False, default=True, help="measure no speed")
@click.option("--seed", default=0, help="seed of every random choice  [default: 0]")
@click.option("--out", type=click.Path(path_type=Path), help="save the table as JSON, or as Markdown (.md)")
@quiet_option
@common_options
def command(source: str, out: Path | None, quiet: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Compare ways to split the dense model SOURCE, or to compress the MoE SOURCE, and recommend a command.

    Of a dense model, no checkpoint is written: layers are split and run in memory, one by one. Every row of the table is measured on
    text that nothing was fitted to, and models of its shape are timed beside the dense one. Static pruning with the same refit, and
    routing by an oracle, are always among the rows.

    A MoE is observed once. Every method then cuts it to every size, with and without the refit, into a temporary folder, one at a
    time: perplexity on kinds of text that were calibrated on and on another, what it writes, size and speed are compared with the
    uncut model's. Random experts are always among the rows.

    \b
    upcycle compare demo
    upcycle compare ./llama --calibration docs.txt,code.txt,news.txt --faster 1.25
    upcycle compare ./llama --calibration docs.txt,code.txt,news.txt --within 1.10
    upcycle compare ./llama --methods coactivation_kmeans,coactivation_kmeans:features=gram --routers ridge
    upcycle compare ./moe --compress all --keep 0.75,0.5 --calibration docs.txt,code.txt
    """
    from upcycle.evaluation.compressing.compare_compressions import is_moe

    moe = is_moe(source)
    _check_options(source, moe)
    for name in _SPLITS if moe else _CUTS:
        del options[name]
    if options["calibration_tokens"] is None:
        del options["calibration_tokens"]
    if out:
        check_overwritable(out, _is_table if out.suffix == ".md" else holds_keys(*_COMMON_KEYS))
    (_compare_cuts if moe else _compare_splits)(source, out, as_json, ProgressBars(quiet), options)


def _check_options(source: str, moe: bool) -> None:
    """Refuse options that belong to the other kind of model."""
    given = click.get_current_context().get_parameter_source
    wrong = [name for name in (_SPLITS if moe else _CUTS) if given(name) is not click.core.ParameterSource.DEFAULT]
    if not wrong:
        return
    names = ", ".join(f"--{name}" for name in wrong)
    if moe:
        raise UsageError(
            f"{source} is a Mixture-of-Experts, and {names} of a split: its experts are compressed",
            hint=f"upcycle compare {source} --compress all --keep 0.75,0.5",
        )
    raise UsageError(
        f"{source} is no Mixture-of-Experts that can be compressed, which {names} asks for: its FFNs are split",
        hint=f"upcycle compare {source} --active 0.75,0.5, or make a MoE first: upcycle convert {source} MOE",
    )


def _compare_cuts(
    source: str, out: Path | None, as_json: bool, progress: ProgressBars, options: dict[str, Any]
) -> None:
    from upcycle.cli.shared.cut_table import cut_page, show_cuts
    from upcycle.evaluation.compressing.compare_compressions import compare_compressions

    found = compare_compressions(source, progress=progress, **options)
    _finish(found, out, as_json, cut_page, show_cuts)


def _compare_splits(
    source: str, out: Path | None, as_json: bool, progress: ProgressBars, options: dict[str, Any]
) -> None:
    from upcycle.evaluation.compare import compare

    _finish(compare(source, progress=progress, **options), out, as_json, comparison_table, _show_splits)


def _finish(
    found: Any, out: Path | None, as_json: bool, page: Callable[[Any], str], show: Callable[[Any], None]
) -> None:
    """Say what was left out, and save and print the comparison."""
    for note in found.skipped:
        warn(f"left out: {note}")
    if out:
        text = page(found) if out.suffix == ".md" else json.dumps(found.as_dict(), indent=2) + "\n"
        try:
            write_text_whole(out, text)
        except OSError as error:
            raise cannot_write(out, error) from None
    if as_json:
        print_json(found.as_dict())
    else:
        show(found)


def _show_splits(found: Any) -> None:
    print_table(_columns(found), [_cells(row, found) for row in found.results], right=range(4, 14 + len(found.dense)))
    print_facts(_verdicts(found))
    for note in _warnings(found):
        warn(note)


def _is_table(text: str) -> bool:
    from upcycle.cli.shared.cut_table import CUT_HEADING

    return text.startswith(("| active | method | router | refit |", CUT_HEADING))


def _seen(found: Any) -> list[str]:
    """Return the domains that rows are compared by."""
    return [name for name in found.dense if name not in found.unseen]


def _columns(found: Any) -> list[str]:
    domains = [Path(name).stem for name in _seen(found)]
    unseen = ["unseen"] if found.unseen else []
    times = ["prefill", "decode"] if found.timing else []
    return [
        "active",
        "method",
        "router",
        "refit",
        *domains,
        "ratio",
        *unseen,
        "KL",
        "captured",
        "FLOPs",
        *times,
        "to convert",
        "memory",
    ]


def _cells(row: Any, found: Any) -> list[str]:
    times = ["prefill", "decode"] if found.timing else []
    best = row.times[row.fastest] if row.times else {}
    return [
        f"{row.active:.0%}",
        row.method + (" *" if row.recommended else ""),
        row.router,
        row.refit,
        *(f"{row.perplexity[name]:.2f}" for name in _seen(found)),
        f"{row.ratio:.3f}x",
        *([f"{row.unseen_ratio:.2f}x"] if found.unseen else []),
        f"{row.kl:.3f}",
        "-" if row.captured is None else f"{row.captured:.0%}",
        f"{row.flops_ratio:.2f}x",
        *(f"{best[each]:.2f}x" if best else "-" for each in times),
        duration(row.seconds),
        size(row.peak_memory_bytes),
    ]


def _verdicts(found: Any) -> list[tuple[str, str]]:
    dense = ", ".join(f"{Path(name).stem} {value:.2f}" for name, value in found.dense.items())
    facts = [("dense", f"perplexity {dense} ({found.evaluation_tokens:,} tokens nothing was fitted to)")]
    if found.timing:
        facts.append(("times", _how_timed(found.timing)))
    for best in found.recommended:
        goal = "".join(f"{key} {value:g}: " for key, value in found.goal.items())
        facts.append(
            (f"at {best.active:.0%}", f"{goal}{best.method}, {best.router}, refit {best.refit}: {best.ratio:.3f}x")
        )
        if best.times:
            facts += [("", f"{_NAMES[how]}: {_times_text(times)}") for how, times in best.times.items()]
        static = found.baseline(best.active, "static")
        beats = "beats" if best.ratio < static.ratio else "does NOT beat"
        pruned = f" at {static.time:.2f}x the time" if static.time is not None and best.time is not None else ""
        mine = f" at {best.time:.2f}x" if pruned else ""
        facts.append(("", f"{beats} static pruning: {best.ratio:.3f}x{mine} against {static.ratio:.3f}x{pruned}"))
        if best.unseen_ratio is not None:
            facts.append(("", f"on text of other kinds ({', '.join(found.unseen)}): {best.unseen_ratio:.2f}x"))
        facts.append(("", best.command or ""))
    return facts


_NAMES = {"grouped_mm": "transformers' kernels", "upcycle": "upcycle's kernels"}


def _times_text(times: dict[str, float]) -> str:
    return f"reads a prompt in {times['prefill']:.2f}x, writes a token in {times['decode']:.2f}x the dense model's time"


def _how_timed(timing: dict[str, Any]) -> str:
    sequences = "one sequence" if timing["batch"] == 1 else f"{timing['batch']} sequences"
    threads = f"{timing['threads']} thread{'s' * (timing['threads'] != 1)}"
    return (
        f"relative to the dense model's {timing['prefill_seconds']:.3g} s for {timing['prompt_tokens']} tokens and "
        f"{timing['decode_seconds']:.3g} s per token, {sequences}, {timing['dtype']} on this {timing['device']} "
        f"({timing['instructions']}, {threads}), with random weights"
    )


def _warnings(found: Any) -> list[str]:
    """Return what a user must know of the recommended rows: that routing is worth nothing, saves no time, or where quality is lost."""
    from upcycle.verification.verdict import MUCH_WORSE

    notes = []
    for best in found.recommended:
        if best.time is not None and best.time >= 1:
            notes.append(
                f"at {best.active:.0%}, the split is not faster than the dense model on this machine: {best.time:.2f}x its time"
            )
        if best.unseen_ratio is not None and best.unseen_ratio > MUCH_WORSE * best.ratio:
            notes.append(
                f"at {best.active:.0%}, text of kinds that were not calibrated on loses much more: {best.unseen_ratio:.2f}x against "
                f"{best.ratio:.2f}x; calibrate on all that the model will read, or add self to --calibration"
            )
        pruned = [row for row in found.results if row.baseline == "static" and row.time is not None]
        rival = min((row for row in pruned if row.ratio <= best.ratio), key=lambda row: row.time, default=None)
        if rival is not None and best.time is not None and rival.time <= best.time:
            notes.append(
                f"at {best.active:.0%}, static pruning to {rival.active:.0%} is as good and as fast: "
                f"{rival.ratio:.3f}x at {rival.time:.2f}x the time"
            )
    return notes


def comparison_table(found: Any) -> str:
    """Return the table, with the recommendations below it, as Markdown."""
    columns = _columns(found)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cells(row, found)) + " |" for row in found.results]
    facts = [f"- {name}: {value}" if name else f"  `{value}`" for name, value in _verdicts(found)]
    return "\n".join([*lines, "", *facts, ""])
