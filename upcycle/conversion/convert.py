"""Converts: reads the source layer by layer, writes the result, checks it, and puts it in place."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.architectures.clean_settings import clean_config
from upcycle.architectures.stock_auto import SEEDED
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint
from upcycle.checkpoints.shard_writer import Journal, ShardWriter, write_index
from upcycle.checkpoints.tokenizer_files import check_companions, copy_companions
from upcycle.conversion import record as conversion_record
from upcycle.conversion.decide_merges import decide_merges
from upcycle.conversion.job import ConversionJob
from upcycle.conversion.jobs import JOBS, job_for
from upcycle.conversion.threads import torch_threads
from upcycle.errors import EnvironmentFault, UsageError, VerificationError
from upcycle.files import records
from upcycle.files.formats.parsing import dump_yaml, parse_yaml
from upcycle.files.local_names import LocalNames
from upcycle.files.output.ownership import check_apart, check_output
from upcycle.files.output.workspace import Workspace, explained_system_errors, sweep
from upcycle.files.user_paths import user_path
from upcycle.hardware.memory import peak_memory
from upcycle.notebook import IN_NOTEBOOKS, HtmlShown
from upcycle.planning.cost import Plan
from upcycle.planning.job import method_of
from upcycle.planning.loadable import check_loadable
from upcycle.planning.open_sources import open_sources
from upcycle.progress import SILENT, Progress
from upcycle.recipe.conversion_recipe import Recipe, parse_recipe

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from upcycle.planning.verification_text import MeasuredText
    from upcycle.recipe.recipe_keywords import RecipeKeys
    from upcycle.verification.verdict import Verification


@dataclass(frozen=True)
class Conversion(HtmlShown):
    """Holds the outcome of a conversion. ``as_dict`` has the documented JSON keys.

    ``layers`` holds what the calibration measured of each layer, ``merging`` the merges of sources and the numbers that
    decided them.
    """

    out: Path
    plan: Plan
    verification: Verification | None
    layers: list[dict[str, Any]]
    seconds: float
    peak_memory_bytes: int
    resumed: bool
    merging: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {**asdict(self), "out": str(self.out), "plan": self.plan.as_dict()}


def convert(
    source: str | None,
    out: str | Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    blueprint: str | Path | None = None,
    progress: Progress = IN_NOTEBOOKS,
    **keys: Unpack[RecipeKeys],
) -> Conversion:
    """Convert ``source`` into a MoE checkpoint at ``out``.

    Args:
        source: local folder, hub id, ``.gguf`` file or ``demo``.
        out: folder to write; it appears complete or not at all.
        overwrite: replace an ``out`` that upcycle wrote, once the new model is complete.
        restart: discard an unfinished conversion of another recipe.
        blueprint: build from a saved ``blueprint.safetensors`` and its recipe instead of deciding again.
        progress: where to report.
        **keys: recipe keys (:class:`upcycle.recipe.conversion_recipe.Recipe`), which editors complete.

    Returns:
        The outcome, with the plan and the verification's numbers.

    Raises:
        UpcycleError: a subclass with the exit code the command would end with. A conversion that does not keep its promise
            raises VerificationError and is left in ``out`` + ``.failed``.
    """
    saved = Path(blueprint) if blueprint else None
    content: dict[str, Any] = {}
    if saved:
        from upcycle.ffn.blueprint import blueprint_recipe

        content = blueprint_recipe(saved)
    content = {**content, **keys, **({"source": source} if source else {})}
    return run_recipe(parse_recipe(content, "recipe"), Path(out), overwrite, restart, saved, progress)


def run_recipe(
    recipe: Recipe,
    out: Path,
    overwrite: bool = False,
    restart: bool = False,
    blueprint: Path | None = None,
    progress: Progress = SILENT,
) -> Conversion:
    """Carry out a validated recipe; see :func:`convert`."""
    started = time.monotonic()
    out = user_path(out).absolute()
    check_output(out, overwrite)
    method = method_of(recipe)
    if blueprint and not JOBS[method.kind].takes_blueprints:
        raise UsageError(f"{method.name} makes no blueprints and reads none", hint="leave --blueprint out")
    checkpoint = open_sources(recipe, method)
    for path in checkpoint.paths:
        check_apart(out, path, "the source")
    check_companions(checkpoint.source.path, _copies_reader(recipe, checkpoint))
    job = job_for(recipe, method, checkpoint)
    if blueprint:
        job = job.given(blueprint)
    # A result that stock transformers cannot load is refused now, not after hours of conversion.
    judged = check_loadable(job, checkpoint, decided=blueprint is not None)
    made = job.cost()
    _warn(made, judged, progress)
    tokens = job.read(checkpoint, progress)
    merging = None
    identity = conversion_record.fingerprint(job, checkpoint, blueprint, tokens)
    settings = recipe.verification.model_dump()
    with (
        explained_system_errors(out),
        Workspace(out, identity, overwrite, restart, settings=settings, note=progress.note) as workspace,
    ):
        if not workspace.finished:
            if job.undecided:
                assert isinstance(checkpoint, MixedCheckpoint)
                assert tokens.windows is not None
                folder = workspace.folder
                job, checkpoint, merging = decide_merges(method, recipe, checkpoint, tokens.windows, folder, progress)
                made = job.cost()
                tokens = job.read(checkpoint, progress)
            _check_disk(workspace.folder, made.bytes_output + job.working_bytes)
            tokens = tokens.written(checkpoint, workspace.folder, progress)
            job, calibration = job.decide(checkpoint, tokens, workspace.folder, progress)
            hashes = _write_weights(job, checkpoint, workspace.folder, progress)
            checkpoint.check_unchanged()
            _warn_of_degenerate_rows(_write_companions(job, checkpoint, workspace.folder), progress)
            sweep(workspace.folder)
            conversion_record.write_record(workspace.folder, job, made, checkpoint, hashes, calibration, merging)
            verification = _verify(job, checkpoint, workspace.folder, judged, progress)
            checkpoint.check_unchanged()
        else:
            verification = _verified(workspace.folder, recipe)
            merging = records.read_record(workspace.folder)["merging"]
        broken = verification is not None and verification.verdict == "broken"
        final = workspace.publish(failed=broken)
    if broken and verification is not None:
        raise VerificationError(
            f"the conversion did not keep its promise: {verification.explanation}",
            hint=f"the result is in {final}; please report this with the output of: upcycle env",
        )
    seconds = time.monotonic() - started
    return Conversion(final, made, verification, job.reports(final), seconds, peak_memory(), workspace.resumed, merging)


def _warn(made: Plan, judged: MeasuredText | None, progress: Progress) -> None:
    for warning in made.warnings:
        progress.note(warning)
    if judged and "flatter" in judged[1]:
        progress.note(f"verified on {judged[1]}")


def _warn_of_degenerate_rows(layers: list[dict[str, Any]], progress: Progress) -> None:
    from upcycle.routers.for_mixing.base import DEGENERATE

    worst = max(layers, key=lambda layer: layer.get("router_condition", 0.0), default={})
    found = worst.get("router_condition", 0.0)
    if found > DEGENERATE:
        progress.note(
            f"the sources' router rows are hard to tell apart: condition number {found:.3g} in layer {worst['layer']} "
            f"(orthogonal rows have 1); use prompts that differ more, negative prompts, or domain_ridge"
        )


def _check_disk(folder: Path, needed: int) -> None:
    present = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    free = shutil.disk_usage(folder).free
    if free + present < needed:
        raise EnvironmentFault(
            f"the conversion needs {needed / 1e6:,.0f} MB, and {folder.parent} has {free / 1e6:,.0f} MB free",
            hint="free some space or choose another disk",
        )


def _write_weights(job: ConversionJob, checkpoint: Checkpoint, folder: Path, progress: Progress) -> dict[str, str]:
    """Write every shard; return the SHA-256 of each file by its name."""
    journal = Journal(folder)
    hashes: dict[str, str] = {}
    with progress.phase("converting", sum(1 for _ in job.units)), torch_threads(1) as threads:
        for shard in job.shards:
            with ShardWriter(folder, shard, journal) as writer:
                for unit in shard.units:
                    if unit.name not in writer.done:
                        for entry, blocks in job.blocks(unit, checkpoint, folder, threads):
                            writer.write(entry, blocks)
                        writer.finish(unit)
                    progress.advance()
            hashes[shard.file] = writer.sha256
    write_index(folder, job.shards)
    return hashes


def _copies_reader(recipe: Recipe, checkpoint: Checkpoint) -> bool:
    """Return whether the files of what prepares the input are copied; one for images or sounds has no tokenizer to leave out."""
    return recipe.tokenizer == "copy" or getattr(getattr(checkpoint, "family", None), "reads", "text") in SEEDED


def _write_companions(job: ConversionJob, checkpoint: Checkpoint, folder: Path) -> list[dict[str, Any]]:
    """Write everything but the weights and ``upcycle.json``; return what was measured and decided of every layer."""
    (folder / "config.json").write_text(json.dumps(clean_config(job.config), indent=2) + "\n", encoding="utf-8")
    names = LocalNames.of(job.recipe.model_dump())
    text = dump_yaml(names.published(parse_yaml(job.recipe_text, records.RECIPE_FILE)))
    (folder / records.RECIPE_FILE).write_text(text, encoding="utf-8")
    if names.paths:
        names.remember(folder, text)
    copy_companions(checkpoint, folder, tokenizer=_copies_reader(job.recipe, checkpoint))
    return job.finish(folder)


def _verify(
    job: ConversionJob,
    checkpoint: Checkpoint,
    folder: Path,
    windows: MeasuredText | None,
    progress: Progress,
) -> Verification | None:
    if windows is None:
        return None
    if (before := _verified(folder, job.recipe)) is not None:
        return before  # an earlier run was stopped after this point
    result = job.verify(checkpoint, folder, windows, progress)
    records.write_verification(folder, result.as_dict())
    return result


def _verified(folder: Path, recipe: Recipe) -> Verification | None:
    """Return the verification that an earlier run wrote of these files, or None.

    It belongs to these settings: the workspace has removed any other.
    """
    found = records.read_verification(folder) if recipe.verification.enabled else None
    if found is None:
        return None
    from upcycle.verification.verdict import Verification

    return Verification(**found)
