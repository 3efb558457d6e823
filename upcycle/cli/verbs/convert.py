"""``upcycle convert``: turns a dense checkpoint into a verified MoE checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.completion import recipe_names
from upcycle.cli.shared.grouped_help import GroupedCommand
from upcycle.cli.shared.merging_facts import merging_facts
from upcycle.cli.shared.options import build_recipe, common_options, quiet_option, recipe_options
from upcycle.cli.shared.output import Cell, ProgressBars, note, print_facts, print_json
from upcycle.errors import UsageError
from upcycle.files.output.ownership import folder_kind, real_path
from upcycle.formatting import count, duration, size
from upcycle.recipe.conversion_recipe import Recipe


@click.command("convert", cls=GroupedCommand, short_help="Convert SOURCE into a MoE and verify it")
@click.argument("source", required=False, shell_complete=recipe_names("convert", files=True))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@recipe_options
@click.option(
    "--blueprint", type=click.Path(path_type=Path), help="reuse a saved blueprint.safetensors and the recipe in it"
)
@click.option("--no-verify", is_flag=True, help="skip the comparison with the dense model")
@click.option("--overwrite", is_flag=True, help="replace an OUT that upcycle wrote, once the new model is complete")
@click.option("--restart", is_flag=True, help="discard an unfinished conversion of another recipe in OUT")
@click.option("--dry-run", is_flag=True, help="only print what it would cost, like upcycle plan")
@quiet_option
@common_options
def command(
    source: str | None,
    out: Path | None,
    blueprint: Path | None,
    no_verify: bool,
    overwrite: bool,
    restart: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Convert SOURCE into a Mixture-of-Experts checkpoint in the folder OUT, and verify it.

    SOURCE is a local folder, a hub id, a .gguf file, demo, or a recipe: a .yaml file (of upcycle or of mergekit-moe) or the name
    of a recipe that comes with upcycle (upcycle list recipes). With a recipe, --source names the model to convert. With
    --sources, SOURCE may be left out. Options override the recipe, and the complete recipe is written into OUT. To continue a
    conversion that was stopped, run the same command again.

    \b
    upcycle convert demo OUT --experts 4 --top-k 2
    upcycle convert ./llama OUT --method random_split --experts 8 --top-k 4
    upcycle convert OUT --method branch_train_mix --sources ./math,./code,./law
    upcycle convert split_50 OUT --source ./llama --calibration docs.txt
    upcycle convert recipe.yaml OUT --set router.parameters.std=0.01
    """
    if out is None:
        if source is None or not flags["sources"]:
            missing = "'OUT'" if source else "'SOURCE'"
            raise click.MissingParameter(param_type="argument", param_hint=missing)
        out = Path(source)
        source = None
        _check_not_a_source(out, flags["sources"])
    base = None
    if blueprint:
        from upcycle.ffn.blueprint import blueprint_recipe

        base = blueprint_recipe(blueprint)
    recipe = build_recipe(source, flags, base, None if quiet else note)
    carry_out(recipe, out, no_verify, overwrite, restart, blueprint, dry_run, quiet, as_json)


def carry_out(
    recipe: Recipe,
    out: Path,
    no_verify: bool,
    overwrite: bool,
    restart: bool,
    blueprint: Path | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Carry out a recipe, or with ``dry_run`` plan it, and print the outcome; the arguments are the options of these names."""
    if no_verify:
        recipe = recipe.model_copy(update={"verification": recipe.verification.model_copy(update={"enabled": False})})
    if dry_run:
        from upcycle.cli.verbs.plan import show_plan

        show_plan(recipe, as_json, timed=not as_json)
        return
    from upcycle.conversion.convert import run_recipe

    progress = ProgressBars(quiet)
    if not blueprint:
        foretell(recipe, progress)
    result = run_recipe(recipe, out, overwrite, restart, blueprint, progress)
    if as_json:
        print_json(result.as_dict())
        return
    print_facts(conversion_facts(result, out, recipe.source))


def foretell(recipe: Recipe, progress: ProgressBars) -> None:
    """Say how long a conversion will take that is worth a forecast: one that looks at text with a model that is not tiny."""
    if not (progress.listens and recipe.calibration.texts):
        return
    from upcycle.evaluation.forecast.forecast import WORTH_IT, forecast_in_words, forecast_of

    found = forecast_of(recipe, least=WORTH_IT)
    if found is not None and not found.unknown:
        progress.tell(f"about {forecast_in_words(found)}")
        progress.expect(found.phases)


def _check_not_a_source(out: Path, sources: Any) -> None:
    """Refuse ``--sources a,b c``, where a space in place of a comma would make the last source the output folder.

    Raises:
        UsageError: OUT is a model that upcycle did not write.
    """
    folder = real_path(out)
    if (folder / "config.json").is_file() and folder_kind(folder) == "foreign":
        raise UsageError(
            f"OUT is {out}, which is a model that upcycle did not write",
            hint=f"if it is one of the sources, put a comma before it and name an OUT: --sources {sources},{out} OUT",
        )


def conversion_facts(result: Any, out: Path, source: str) -> list[tuple[str, Cell]]:
    """Return name and text of the lines that are printed about a finished conversion."""
    from upcycle.cli.verbs.verify import verification_facts
    from upcycle.verification.verdict import STATES

    plan = result.plan
    ratio = plan.flops_per_token / plan.flops_per_token_dense
    reference = "source" if plan.kind in ("growth", "addition", "compression") else "dense"
    same = plan.parameters_active == plan.parameters_total and plan.router == "none"
    active = "" if same else f", {count(plan.parameters_active)} active"
    facts: list[tuple[str, Cell]] = [
        *merging_facts(result.merging),
        (
            "output",
            f"{out} ({plan.target}, {size(plan.bytes_output)} in {len(plan.shards)} weight file{'s' * (len(plan.shards) > 1)})",
        ),
        *([(plan.kind, plan.summary)] if plan.summary else []),
        (
            "parameters",
            f"{count(plan.parameters_total)} total{active} ({reference} {count(plan.parameters_dense)})",
        ),
        ("FLOPs per token", f"{ratio:.2f}x {reference}"),
        (
            "time, memory",
            f"{duration(result.seconds)}, peak {size(result.peak_memory_bytes)}"
            + (", resumed" if result.resumed else ""),
        ),
    ]
    if result.verification is None:
        return [
            *facts,
            *calibration_facts(result.layers),
            ("verification", "skipped"),
            ("next", f"upcycle verify {out}"),
        ]
    facts += [*calibration_facts(result.layers), *verification_facts(result.verification)]
    if result.verification.verdict == "approximate" and plan.promise == "approximate":
        facts.append(("hint", _approximate_hint(plan)))
    if result.verification.compared == STATES:
        images = " --images FOLDER" if "images" in result.verification.text else ""
        return [*facts, ("next", f"upcycle evaluate {out} --reference {source}{images}")]
    return [*facts, ("next", _next_step(plan, out, source))]


def _approximate_hint(plan: Any) -> str:
    from upcycle.registry import load

    if load("method", plan.method).kind in ("compression", "narrowing"):
        return "other text than the calibration's, and what the model writes, lose most: measure both"
    if plan.kind == "addition":
        return "measure text of the new expert's kind and of the others'; --param sharpness moves tokens from one to the other"
    return "quality is lower than the dense model's until the model is healed by continual pre-training"


def _next_step(plan: Any, out: Path, source: str) -> str:
    """Return the command that most users would run next."""
    from upcycle.registry import load

    step = getattr(load("method", plan.method), "next_step", "upcycle evaluate {out} --reference {source}")
    return str(step).format(out=out, source=source)


def calibration_facts(layers: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return what calibration measured, from the smallest to the largest value of all layers; empty without calibration."""

    def spread(key: str, form: str) -> str:
        values = [layer[key] for layer in layers if key in layer]
        return f"{min(values):{form}} to {max(values):{form}}" if values else ""

    facts = []
    if aligned := spread("similarity_aligned", ".2f"):
        stored = spread("similarity_stored", ".2f")
        facts.append(("neurons", f"cosine similarity to the anchor's: {stored} as stored, {aligned} once aligned"))
    if errors := [one["error"] for layer in layers for one in layer.get("projections", ())]:
        between = f"{min(errors):.2f} to {max(errors):.2f}"
        facts.append(
            (
                "attention",
                f"{len(errors)} projections imitated; they miss {between} of what they vary by (held-out tokens)",
            )
        )
    if captured := spread("captured", ".0%"):
        facts.append(("router", f"captures {captured} of what an oracle would (random: {spread('random', '.0%')})"))
    if share := spread("own_expert", ".0%"):
        facts.append(("router", f"chooses a source's own expert for {share} of that source's tokens"))
    if own := spread("own_tokens", ".0%"):
        others = spread("other_tokens", ".0%")
        facts.append(
            ("router", f"{own} of the new expert's own text choose it, and {others} of other text (held-out tokens)")
        )
    if before := spread("error_before", ".2f"):
        facts.append(
            (
                "refit",
                f"layers differ by {before} before, {spread('error_after', '.2f')} after, relative (held-out tokens)",
            )
        )
    if trained := spread("error_trained", ".2f"):
        kept = [layer for layer in layers if "not_trained" in layer]
        left = f"; {len(kept)} of {len(layers)} keep the closed form, as training did not help" if kept else ""
        facts.append(("training", f"layers differ by {trained} after it{left}"))
    return facts
