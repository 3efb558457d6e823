"""Reads the calibration images of an encoder of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from upcycle.architectures.stock import build_config, load_image_processor
from upcycle.images.pixels import ImageReader, ImageSet
from upcycle.images.sources import read_images
from upcycle.models.image_states import image_states

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint
    from upcycle.planning.expert_job import ExpertJob
    from upcycle.progress import Progress


def calibration_images(
    job: ExpertJob, checkpoint: DenseCheckpoint, progress: Progress
) -> tuple[torch.Tensor, ImageSet]:
    """Return the calibration images of a conversion: as many as make the recipe's tokens, which are states here.

    Returns:
        int64 ``[N, P]``: the number of every image, once for each of its P states, and the images.

    Raises:
        UsageError: a folder has no images, or no image processor lies beside the model.
        EnvironmentFault: the processor or a dataset cannot be read.
    """
    path, wanted = checkpoint.source.path, job.recipe.calibration
    reader = ImageReader(load_image_processor(path), build_config(checkpoint.raw_config, str(path)), path)
    states = image_states(checkpoint.raw_config, str(path))
    count = max(1, wanted.tokens // states)
    parts = read_images(wanted, count)
    reader(parts.read[:1])  # a processor that does not fit is found before dear work
    if len(parts.read) < 0.9 * count:
        progress.note(f"calibrating on {len(parts.read):,} images: there are no more (asked for {count:,})")
    about = {"images": len(parts.read), "images_sha256": parts.sha256, "held_out": {"images": parts.how}}
    numbers = torch.arange(len(parts.read))[:, None].expand(-1, states).contiguous()
    return numbers, ImageSet(parts.read, reader, parts.sha256, about)
