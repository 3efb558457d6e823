"""``upcycle plan``: prints what a conversion would cost."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from upcycle.cli.shared.completion import recipe_names
from upcycle.cli.shared.grouped_help import GroupedCommand
from upcycle.cli.shared.options import build_recipe, common_options, recipe_options
from upcycle.cli.shared.output import note, print_facts, print_json, print_table, warn
from upcycle.cli.verbs.plan_run import command as plan_run
from upcycle.cli.verbs.plan_train import command as plan_train
from upcycle.files.locate import is_local, locate
from upcycle.files.locate_adapted import names_adapter
from upcycle.formatting import count, size


class _Plan(GroupedCommand):
    """Makes ``upcycle plan train RECIPE`` and ``plan run MOE`` commands of their own; any other first argument is a source."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["train"] and len(args) > 1:
            return plan_train.make_context(f"{info_name} train", args[1:], parent, **extra)
        if args[:1] == ["run"] and len(args) > 1:
            return plan_run.make_context(f"{info_name} run", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command("plan", cls=_Plan, short_help="Print what a conversion would cost")
@click.argument("source", required=False, shell_complete=recipe_names("convert", files=True))
@recipe_options
@click.option(
    "--time/--no-time",
    "timed",
    default=None,
    help="forecast how long the conversion takes on this machine, from a second of measurements  [default: unless --json]",
)
@common_options
def command(source: str | None, timed: bool | None, as_json: bool, debug: bool, **flags: Any) -> None:
    """Print what converting SOURCE would cost in parameters, compute, disk and memory, without reading a weight.

    SOURCE is a local folder, a hub id, a .gguf file, demo, a RECIPE.yaml, or the name of a recipe that comes with upcycle
    (upcycle list recipes). Of a hub id, only config.json is downloaded.

    For what a training run needs, see upcycle plan train RECIPE --world 8xH100; for where the experts of a MoE are computed that lie
    in the host's memory, upcycle plan run MOE --observations FILE.
    """
    show_plan(build_recipe(source, flags, None, note), as_json, not as_json if timed is None else timed)


def show_plan(recipe: Any, as_json: bool, timed: bool) -> None:
    """Print the plan of a recipe (also ``convert --dry-run``), and where it is ``timed``, how long the conversion takes."""
    if not is_local(recipe.source) and not names_adapter(recipe.source):
        locate(recipe.source, recipe.revision, config_only=True)  # what cannot be had is said before torch is loaded
    from upcycle.evaluation.forecast.forecast import forecast, forecast_in_words, timed_job

    job, opening = timed_job(recipe)
    plan = job.cost()
    found = forecast(job, opening) if timed else None
    if as_json:
        told = {"forecast": {"seconds": found.seconds, **asdict(found)}} if found else {}
        print_json({**plan.as_dict(), **told})
        return
    facts = plan_facts(plan)
    if found:
        takes = (
            f"not forecast: {found.unknown}" if found.unknown else f"about {forecast_in_words(found)}, on this machine"
        )
        facts.append(("to convert", takes))
    print_facts(facts)
    if len(plan.shards) > 1:
        print_table(
            ["file", "size", "holds"],
            [(s["file"], size(s["bytes"]), f"{s['units'][0]} .. {s['units'][-1]}") for s in plan.shards],
            right=[1],
        )
    for warning in plan.warnings:
        warn(warning)


def _growth_facts(plan: Any) -> list[tuple[str, str]]:
    """Return the plan of a growth step as names and texts."""
    total = plan.parameters_total / plan.parameters_dense
    facts = [
        (plan.kind, f"{plan.family} by {plan.method}: {plan.summary}"),
        ("promise", f"{plan.promise}: {plan.promise_reason}"),
        ("parameters", f"{count(plan.parameters_total)} ({total:.2f}x the source)"),
    ]
    if plan.parameters_active != plan.parameters_total:
        facts.append(("active", f"{count(plan.parameters_active)} per token"))
    if plan.calibration_tokens:
        facts.append(("calibration", f"on {plan.calibration_tokens:,} tokens, with the model in memory"))
    return [*facts, *_costs(plan, "the source")]


def _pruning_facts(plan: Any) -> list[tuple[str, str]]:
    """Return the plan of a pruning as names and texts."""
    left = plan.parameters_total / plan.parameters_dense
    return [
        ("pruning", f"{plan.family} by {plan.method}: {plan.summary}"),
        ("calibration", _calibration(plan)),
        ("promise", f"{plan.promise}: {plan.promise_reason}"),
        ("parameters", f"{count(plan.parameters_total)} ({left:.2f}x dense)"),
        *_costs(plan, "dense"),
    ]


def _compression_facts(plan: Any) -> list[tuple[str, str]]:
    """Return the plan of a compression as names and texts."""
    left = plan.parameters_total / plan.parameters_dense
    return [
        ("compression", f"{plan.family} by {plan.method}: {plan.summary}"),
        ("calibration", _calibration(plan)),
        ("promise", f"{plan.promise}: {plan.promise_reason}"),
        ("parameters", f"{count(plan.parameters_total)} ({left:.2f}x the source)"),
        ("active", f"{count(plan.parameters_active)} per token"),
        *_costs(plan, "the source"),
    ]


_WITHOUT_EXPERTS = {
    "growth": _growth_facts,
    "addition": _growth_facts,
    "beside": _growth_facts,
    "pruning": _pruning_facts,
    "compression": _compression_facts,
}  # by the kind of plan


def plan_facts(plan: Any) -> list[tuple[str, str]]:
    """Return a plan as names and texts, one pair per printed line."""
    total = plan.parameters_total / plan.parameters_dense
    active = plan.parameters_active / plan.parameters_dense
    if plan.kind in _WITHOUT_EXPERTS:
        return _WITHOUT_EXPERTS[plan.kind](plan)
    return [
        ("conversion", f"{plan.family} -> {plan.target} by {plan.method}, {plan.router} router"),
        *([("routing", _routing(plan.routing))] if plan.routing else []),
        ("calibration", _calibration(plan)),
        ("promise", f"{plan.promise}: {plan.promise_reason}"),
        ("parameters", f"{count(plan.parameters_total)} total ({total:.2f}x dense)"),
        ("active", f"{count(plan.parameters_active)} per token ({active:.2f}x dense)"),
        *_costs(plan, "dense"),
    ]


def _routing(routing: dict[str, Any]) -> str:
    """Return which experts run, and what is known about how many."""
    said = f"{routing['rule']}: the experts that run are {routing['says']}"
    if routing["rule"] == "top_k":
        return said
    return f"{said}; how many that are is measured by verification, and all count as active here"


def _calibration(plan: Any) -> str:
    """Return on how much text layers are decided, and what is fitted to it."""
    fitted = {
        "down": "down projections refitted",
        "blocks": "all projections trained, layer by layer",
        "scale": "one scale per layer fitted",
        "none": "nothing refitted",
    }
    return f"on {plan.calibration_tokens:,} tokens, {fitted[plan.refit]}" if plan.calibration_tokens else "none"


def _costs(plan: Any, reference: str) -> list[tuple[str, str]]:
    """Return what the result takes to run and to store, and what making it takes."""
    ratio = plan.flops_per_token / plan.flops_per_token_dense
    time = [("time", _time(plan.time))] if plan.time else []
    time += [
        ("", _time(stored)) for stored in (plan.time or {}).values() if isinstance(stored, dict) and "device" in stored
    ]
    files = f"{len(plan.shards)} file{'s' * (len(plan.shards) > 1)}"
    return [
        (
            "FLOPs",
            f"{count(plan.flops_per_token)} per token ({ratio:.2f}x {reference}; attention over the context not counted)",
        ),
        *time,
        ("on disk", f"{size(plan.bytes_output)} in {files} ({reference} {size(plan.bytes_dense)})"),
        (
            "peak memory",
            f"about {size(plan.peak_memory_bytes)} to convert; verification holds both models in fp32 if they fit",
        ),
    ]


def _time(time: dict[str, Any]) -> str:
    """Return in words what is known about time before anything ran."""
    if "unknown" in time:
        return f"not predicted: {time['unknown']} (upcycle compare measures)"
    own, stock = (time["relative"][how] for how in ("upcycle", "grouped_mm"))
    said = f"about {own['prefill']:.2f}x of dense reading, {own['decode']:.2f}x writing"
    if own != stock:
        said += (
            f" with upcycle's kernels; {stock['prefill']:.2f}x, {stock['decode']:.2f}x with transformers' grouped_mm"
        )
    threads = f"{time['threads']} thread{'s' * (time['threads'] != 1)}"
    return (
        f"{said} (predicted for {threads} of a {time['device'].upper()} with {time['instructions']}, {time['dtype']}; off by "
        f"{time['error_median']:.0%} in the median, {time['error_worst']:.0%} at worst; upcycle compare measures)"
    )
