"""Keeps the blueprints of a conversion that is under way: one file per decided layer, joined into one at the end.

That a file exists proves nothing, as in the rest of the working folder: the joined file counts only if it holds every layer of
the job, and the layers' files are removed only once it is on the disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import CheckpointError
from upcycle.files.atomic_files import write_whole
from upcycle.files.local_names import LocalNames
from upcycle.files.output.workspace import LAYER_BLUEPRINTS, remove_parts
from upcycle.files.records import BLUEPRINT_FILE

if TYPE_CHECKING:
    from upcycle.ffn.blueprint import BlueprintFile, LayerBlueprint
    from upcycle.planning.expert_job import ExpertJob


def layer_file(folder: Path, layer: int) -> Path:
    """Return the file that holds the blueprint of one layer until all are joined."""
    return folder / LAYER_BLUEPRINTS / f"{layer:05d}.safetensors"


def joined_blueprint(job: ExpertJob, folder: Path) -> BlueprintFile | None:
    """Return the joined blueprint; None where there is none yet, or it is damaged or lacks layers of the job."""
    from upcycle.ffn.blueprint import BlueprintFile

    path = folder / BLUEPRINT_FILE
    if not path.is_file():
        return None
    try:
        found = BlueprintFile(path)
    except CheckpointError:
        return None
    return found if found.layers == sorted(job.shape.moe_layers) else None


def decided_layer(job: ExpertJob, folder: Path, layer: int) -> LayerBlueprint | None:
    """Return the blueprint that the calibration or an earlier run decided for a layer, or None."""
    from upcycle.ffn.blueprint import BlueprintFile

    kept = layer_file(folder, layer)
    if kept.exists():
        return BlueprintFile(kept).layer(layer)
    whole = joined_blueprint(job, folder)
    return whole.layer(layer) if whole else None


def keep_layer(folder: Path, blueprint: LayerBlueprint) -> None:
    """Write a layer's blueprint to its :func:`layer_file`."""
    from upcycle.ffn.blueprint import save_blueprint

    path = layer_file(folder, blueprint.layer)
    path.parent.mkdir(exist_ok=True)
    save_blueprint(path, blueprint)


def join_layers(job: ExpertJob, folder: Path) -> list[dict[str, Any]]:
    """Join the files of all layers into ``blueprint.safetensors``, and remove them then; return :func:`blueprint_reports`.

    Raises:
        CheckpointError: a layer of the job was never decided (a fault in this program).
    """
    from upcycle.ffn.blueprint import join_blueprints

    if joined_blueprint(job, folder) is None:
        parts = [layer_file(folder, layer) for layer in sorted(job.shape.moe_layers)]
        if lost := [path.name for path in parts if not path.exists()]:
            raise CheckpointError(
                f"{folder}: {lost[0]} of {LAYER_BLUEPRINTS} is missing", hint="--restart discards it and begins again"
            )
        recipe = job.recipe.model_dump(
            include=job.recipe_keys, exclude={"source", "revision", "sources", "verification"}
        )
        public = LocalNames.of(job.recipe.model_dump()).published(recipe)
        write_whole(folder / BLUEPRINT_FILE, lambda partial: join_blueprints(parts, partial, public))
    remove_parts(folder)
    return blueprint_reports(folder)


def blueprint_reports(folder: Path) -> list[dict[str, Any]]:
    """Return what was measured and decided of every layer of a conversion whose blueprint is joined."""
    from upcycle.ffn.blueprint import BlueprintFile

    return BlueprintFile(folder / BLUEPRINT_FILE).reports
