"""Converts: reads the source layer by layer, writes the result, checks it, and puts it in place."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.architectures.stock import clean_config
from upcycle.calibration.blueprint_join import blueprint_reports, decided_layer, join_layers, keep_layer
from upcycle.calibration.decide_layer import decide
from upcycle.checkpoints.checkpoint import Checkpoint, DenseCheckpoint
from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint
from upcycle.checkpoints.output_layout import Unit
from upcycle.checkpoints.shard_writer import Journal, ShardWriter, write_index
from upcycle.checkpoints.tokenizer_files import check_companions, copy_companions
from upcycle.conversion import record as conversion_record
from upcycle.conversion.decide_merges import decide_merges
from upcycle.errors import EnvironmentFault, UsageError, VerificationError
from upcycle.files import records
from upcycle.files.formats.parsing import dump_yaml, parse_yaml
from upcycle.files.local_names import LocalNames
from upcycle.files.output.ownership import check_apart, check_output
from upcycle.files.output.workspace import Workspace, explained, sweep
from upcycle.files.user_paths import user_path
from upcycle.hardware.memory import peak_memory
from upcycle.planning.cost import Plan, calibration_disk, check_memory, make_plan
from upcycle.planning.expert_job import Job
from upcycle.planning.growth_job import GrowthJob, decide_growth, growth_reports
from upcycle.planning.job import AnyJob
from upcycle.planning.loadable import check_loadable
from upcycle.planning.open_sources import open_sources
from upcycle.planning.prepare import grows, job_for
from upcycle.progress import SILENT, Progress
from upcycle.recipe.conversion_recipe import Recipe, parse_recipe

if TYPE_CHECKING:
    import torch

    from upcycle.ffn.blueprint import BlueprintFile, LayerBlueprint
    from upcycle.ffn.feed_forward import FeedForward
    from upcycle.ffn.source_samples import Samples
    from upcycle.verification.verdict import Verification


@dataclass(frozen=True)
class Conversion:
    """What happened. ``as_dict`` has the documented JSON keys; ``layers`` holds what calibration measured of each layer,
    ``merging`` what merges of sources were decided by.
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
        """Plain data for ``--json``."""
        return {**asdict(self), "out": str(self.out), "plan": self.plan.as_dict()}


def convert(
    source: str | None,
    out: str | Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    blueprint: str | Path | None = None,
    progress: Progress = SILENT,
    **keys: Any,
) -> Conversion:
    """Convert ``source`` into a MoE checkpoint at ``out``.

    Args:
        source: local folder, hub id, ``.gguf`` file or ``demo``.
        out: folder to write; it appears complete or not at all.
        overwrite: replace an ``out`` that upcycle wrote, once the new model is complete.
        restart: throw an unfinished conversion of another recipe away.
        blueprint: build from a saved ``blueprint.safetensors`` and its recipe instead of deciding anew.
        progress: where to report.
        **keys: recipe keys (:class:`upcycle.recipe.conversion_recipe.Recipe`).

    Returns:
        What was done, with the verification's numbers.

    Raises:
        UpcycleError: a subclass with the exit code the command would end with. A conversion that breaks its promise
            raises VerificationError and is left in ``out`` + ``.failed``.
    """
    saved = Path(blueprint) if blueprint else None
    if saved:
        from upcycle.ffn.blueprint import blueprint_recipe

        keys = {**blueprint_recipe(saved), **keys}
    content = {**keys, **({"source": source} if source else {})}
    return run_recipe(parse_recipe(content, "recipe"), Path(out), overwrite, restart, saved, progress)


def run_recipe(
    recipe: Recipe,
    out: Path,
    overwrite: bool = False,
    restart: bool = False,
    blueprint: Path | None = None,
    progress: Progress = SILENT,
) -> Conversion:
    """Convert by a validated recipe; see :func:`convert`."""
    started = time.monotonic()
    out = user_path(out).absolute()
    check_output(out, overwrite)
    if blueprint and grows(recipe):
        raise UsageError(f"{recipe.method} makes no blueprints and reads none", hint="leave --blueprint out")
    checkpoint = open_sources(recipe)
    for path in checkpoint.paths:
        check_apart(out, path, "the source")
    check_companions(checkpoint.source.path, recipe.tokenizer == "copy")
    job = job_for(recipe, checkpoint)
    judged = check_loadable(
        job, checkpoint, decided=blueprint is not None
    )  # better refused now than after the conversion
    made = make_plan(job)
    _warn(made, judged, progress)
    saved = _saved_blueprints(job, blueprint) if blueprint and isinstance(job, Job) else None
    windows, samples = (None, None) if saved else _tokens(job, checkpoint, progress)
    merging = None
    identity = conversion_record.fingerprint(job, checkpoint, blueprint, _ids(windows, samples))
    settings = recipe.verification.model_dump()
    with (
        explained(out),
        Workspace(out, identity, overwrite, restart, settings=settings, note=progress.note) as workspace,
    ):
        if not workspace.finished:
            if job.method.undecided(recipe):
                assert isinstance(checkpoint, MixedCheckpoint)
                assert windows is not None
                job, checkpoint, merging = decide_merges(job, recipe, checkpoint, windows, workspace.folder, progress)
                made = make_plan(job)
                windows, samples = _tokens(job, checkpoint, progress)
            _check_disk(workspace.folder, made.bytes_output + (0 if saved else calibration_disk(job)))
            job, calibration = _decided(job, checkpoint, windows, samples, workspace.folder, progress)
            hashes = _write_weights(job, checkpoint, workspace.folder, saved, progress)
            checkpoint.check_unchanged()
            _warn_of_degenerate_rows(_write_companions(job, checkpoint, workspace.folder), progress)
            sweep(workspace.folder)
            conversion_record.write(workspace.folder, job, made, checkpoint, hashes, calibration, merging)
            verification = _verify(job, checkpoint, workspace.folder, judged, progress)
            checkpoint.check_unchanged()
        else:
            verification = _verified(workspace.folder, recipe)
            merging = records.read_record(workspace.folder)["merging"]
        broken = verification is not None and verification.verdict == "broken"
        final = workspace.publish(failed=broken)
    if broken and verification is not None:
        raise VerificationError(
            f"the conversion broke its promise: {verification.explanation}",
            hint=f"the result is in {final}; please report this with the output of: upcycle env",
        )
    layers = growth_reports(final) if isinstance(job, GrowthJob) else blueprint_reports(final)
    seconds = time.monotonic() - started
    return Conversion(final, made, verification, layers, seconds, peak_memory(), workspace.resumed, merging)


def _decided(
    job: AnyJob,
    checkpoint: Checkpoint,
    windows: torch.Tensor | None,
    samples: Samples | None,
    folder: Path,
    progress: Progress,
) -> tuple[AnyJob, dict[str, Any] | None]:
    """Decide what text and weights are looked at for; the job with it, and what ``upcycle.json`` says of the text."""
    from upcycle.text.mixture import traces

    if isinstance(job, GrowthJob):
        job, record = decide_growth(job, checkpoint, windows, folder, progress)
        return job, record and {**record, **traces(job.recipe.calibration)}
    if not _ids(windows, samples):
        return job, None
    from upcycle.calibration.calibrate import calibrate

    assert isinstance(checkpoint, DenseCheckpoint)
    record = calibrate(job, checkpoint, windows, folder, progress, samples)
    return job, record if windows is None else {**record, **traces(job.recipe.calibration)}


def _tokens(job: AnyJob, checkpoint: Checkpoint, progress: Progress) -> tuple[torch.Tensor | None, Samples | None]:
    """What is looked at: token ids ``[N, W]`` of the calibration text, and those that tell several sources apart."""
    windows = samples = None
    undecided = job.method.undecided(job.recipe)
    if isinstance(job, Job) and job.sampled and not undecided:
        from upcycle.calibration.source_samples import read_samples

        assert isinstance(checkpoint, DenseCheckpoint)
        samples = read_samples(job, checkpoint)
    if job.calibrated or undecided:
        from upcycle.calibration.read_tokens import calibration_windows

        if isinstance(job, Job):
            check_memory(job)
        windows = calibration_windows(job, checkpoint, progress)
    return windows, samples


def _warn(made: Plan, judged: tuple[torch.Tensor, str] | None, progress: Progress) -> None:
    for warning in made.warnings:
        progress.note(warning)
    if judged and "flatter" in judged[1]:
        progress.note(f"verified on {judged[1]}")


def _ids(windows: torch.Tensor | None, samples: Samples | None) -> list[torch.Tensor]:
    """All token ids that decide layers."""
    return [ids for ids in (samples.windows if samples else None, windows) if ids is not None]


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


def _write_weights(
    job: AnyJob, checkpoint: Checkpoint, folder: Path, saved: BlueprintFile | None, progress: Progress
) -> dict[str, str]:
    """Write every shard; returns file name -> SHA-256."""
    journal = Journal(folder)
    hashes: dict[str, str] = {}
    with progress.phase("converting", sum(1 for _ in job.units)), _threads(1) as threads:
        for shard in job.shards:
            with ShardWriter(folder, shard, journal) as writer:
                for unit in shard.units:
                    if unit.name not in writer.done:
                        _write_unit(job, checkpoint, folder, writer, unit, saved, threads)
                        writer.finish(unit)
                    progress.advance()
            hashes[shard.file] = writer.sha256
    write_index(folder, job.shards)
    return hashes


def _write_unit(
    job: AnyJob,
    checkpoint: Checkpoint,
    folder: Path,
    writer: ShardWriter,
    unit: Unit,
    saved: BlueprintFile | None,
    threads: int,
) -> None:
    from upcycle.checkpoints.output_layout import finite
    from upcycle.ffn.expert_tensors import ExpertTensors

    dtype = job.recipe.dtype
    experts: ExpertTensors | None = None
    for entry in unit.entries:
        if entry.origin:
            writer.write(entry, checkpoint.blocks(entry.origin, dtype))
            continue
        if experts is None:
            assert unit.layer is not None
            assert isinstance(job, Job)
            assert isinstance(checkpoint, DenseCheckpoint)
            ffn = checkpoint.feed_forward(unit.layer, dtype)
            with _threads(threads):
                blueprint = _blueprint(job, ffn, folder, saved)
            experts = ExpertTensors(ffn, blueprint, checkpoint.expert_matrices(unit.layer, dtype))
        assert entry.built is not None
        writer.write(entry, (finite(entry, experts.part(part)) for part in entry.built.parts))


@contextmanager
def _threads(count: int) -> Iterator[int]:
    """Let torch use ``count`` threads for a while; gives how many it used before.

    Blocks are moved on one: hashing and writing fill the other cores, and torch's idle threads would spin beside them.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def _blueprint(job: Job, ffn: FeedForward, folder: Path, saved: BlueprintFile | None) -> LayerBlueprint:
    """A layer's blueprint: given, decided by the calibration, or decided now; kept until all layers are done."""
    if (found := decided_layer(job, folder, ffn.layer)) is not None:
        return found
    if saved:
        blueprint = replace(saved.layer(ffn.layer), top_k=job.shape.top_k)
        if blueprint.down is None and job.recipe.refit != "scale":
            blueprint = replace(blueprint, scale=job.scale, spread=job.method.spread)
    else:
        blueprint = decide(job, ffn)
    keep_layer(folder, blueprint)
    return blueprint


def _saved_blueprints(job: Job, path: Path) -> BlueprintFile:
    from upcycle.ffn.blueprint import BlueprintFile

    saved, shape = BlueprintFile(path), job.shape
    for layer in shape.moe_layers:
        numbers = saved.shape(layer) if layer in saved.layers else None
        wanted = (shape.experts, shape.shared, shape.expert_size)
        if numbers != wanted:
            raise UsageError(
                f"{path}: layer {layer} has (experts, shared, neurons each) = {numbers}, the recipe needs {wanted}",
                hint="leave --experts, --shared and --layers out: the blueprint brings its own recipe",
            )
    return saved


def _write_companions(job: AnyJob, checkpoint: Checkpoint, folder: Path) -> list[dict[str, Any]]:
    """Everything but weights and provenance; returns what was measured and decided of every layer."""
    (folder / "config.json").write_text(json.dumps(clean_config(job.config), indent=2) + "\n", encoding="utf-8")
    names = LocalNames.of(job.recipe.model_dump())
    text = dump_yaml(names.published(parse_yaml(job.recipe_text, records.RECIPE_FILE)))
    (folder / records.RECIPE_FILE).write_text(text, encoding="utf-8")
    if names.paths:
        names.remember(folder, text)
    copy_companions(checkpoint, folder, tokenizer=job.recipe.tokenizer == "copy")
    return growth_reports(folder) if isinstance(job, GrowthJob) else join_layers(job, folder)


def _verify(
    job: AnyJob,
    checkpoint: Checkpoint,
    folder: Path,
    windows: tuple[torch.Tensor, str] | None,
    progress: Progress,
) -> Verification | None:
    if windows is None:
        return None
    if (before := _verified(folder, job.recipe)) is not None:
        return before  # an earlier run was stopped after this point
    from upcycle.verification.verify import verify_job

    result = verify_job(job, checkpoint, folder, windows, progress)
    records.write_verification(folder, result.as_dict())
    return result


def _verified(folder: Path, recipe: Recipe) -> Verification | None:
    """What an earlier run found of these very files; the workspace has removed what was found under other settings."""
    found = records.read_verification(folder) if recipe.verification.enabled else None
    if found is None:
        return None
    from upcycle.verification.verdict import Verification

    return Verification(**found)
