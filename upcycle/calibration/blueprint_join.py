"""The blueprints of a conversion that is under way: one file per decided layer, at the end joined into one.

A name proves nothing here, either: what counts as decided is complete for the job, and parts are removed only after the whole
is on the disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import CheckpointError
from upcycle.files.atomic_files import write_whole
from upcycle.files.local_names import LocalNames
from upcycle.files.output.workspace import CALIBRATION_FOLDER, LAYER_BLUEPRINTS
from upcycle.files.records import BLUEPRINT_FILE

if TYPE_CHECKING:
    from upcycle.ffn.blueprint import BlueprintFile, LayerBlueprint
    from upcycle.planning.expert_job import ExpertJob


def layer_file(folder: Path, layer: int) -> Path:
    """Where the blueprint of one layer is kept until all are joined."""
    return folder / LAYER_BLUEPRINTS / f"{layer:05d}.safetensors"


def joined_blueprint(job: ExpertJob, folder: Path) -> BlueprintFile | None:
    """The joined blueprint, or None: there is none yet, or it lacks layers of the job or is damaged, and is made again."""
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
    """What an earlier run, or the calibration, decided of a layer."""
    from upcycle.ffn.blueprint import BlueprintFile

    kept = layer_file(folder, layer)
    if kept.exists():
        return BlueprintFile(kept).layer(layer)
    whole = joined_blueprint(job, folder)
    return whole.layer(layer) if whole else None


def keep_layer(folder: Path, blueprint: LayerBlueprint) -> None:
    """Keep what was decided of a layer."""
    from upcycle.ffn.blueprint import save_blueprint

    path = layer_file(folder, blueprint.layer)
    path.parent.mkdir(exist_ok=True)
    save_blueprint(path, blueprint)


def join_layers(job: ExpertJob, folder: Path) -> list[dict[str, Any]]:
    """Join the files of all layers into ``blueprint.safetensors``, and only then remove them; what was measured of every layer.

    Raises:
        CheckpointError: a layer of the job was never decided (a fault in this program).
    """
    from upcycle.ffn.blueprint import join_blueprints

    if joined_blueprint(job, folder) is None:
        parts = [layer_file(folder, layer) for layer in sorted(job.shape.moe_layers)]
        if lost := [path.name for path in parts if not path.exists()]:
            raise CheckpointError(f"{folder}: {lost[0]} of {LAYER_BLUEPRINTS} is missing", hint="--restart begins anew")
        recipe = job.recipe.model_dump(exclude={"source", "revision", "sources", "verification"})
        public = LocalNames.of(job.recipe.model_dump()).published(recipe)
        write_whole(folder / BLUEPRINT_FILE, lambda partial: join_blueprints(parts, partial, public))
    shutil.rmtree(folder / LAYER_BLUEPRINTS, ignore_errors=True)
    shutil.rmtree(folder / CALIBRATION_FOLDER, ignore_errors=True)
    return blueprint_reports(folder)


def blueprint_reports(folder: Path) -> list[dict[str, Any]]:
    """What was measured and decided of every layer of a conversion whose blueprint is joined."""
    from upcycle.ffn.blueprint import BlueprintFile

    return BlueprintFile(folder / BLUEPRINT_FILE).reports
