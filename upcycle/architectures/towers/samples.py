"""Random images and sounds as stock classes take them, made from a stock configuration where there is no processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SampleInputs = dict[str, "torch.Tensor"]
_FRAMES = 64  # of a sound that may have any length
_PATCHES = 4  # on each side of an image that may have any size, in patches that the connector takes together


def single(config: Any, rng: torch.Generator) -> SampleInputs:
    """Return one image of the encoder's own size, ``[1, C, H, W]``."""
    return {"pixel_values": _noise(config.vision_config, rng)[None]}


def stacked(config: Any, rng: torch.Generator) -> SampleInputs:
    """Return one image of the encoder's own size, as the only one of a list, ``[1, 1, C, H, W]``."""
    return {"pixel_values": _noise(config.vision_config, rng)[None, None]}


def tiled(config: Any, rng: torch.Generator) -> SampleInputs:
    """Return one image as an overview and the tiles of the first grid that the configuration lists, ``[1, 1 + tiles, C, H, W]``."""
    import torch

    height, width = _size(config.vision_config)
    rows, columns = (side // own for side, own in zip(config.image_grid_pinpoints[0], (height, width), strict=True))
    tiles = [_noise(config.vision_config, rng) for _ in range(1 + max(rows, 1) * max(columns, 1))]
    sizes = torch.tensor([[max(rows, 1) * height, max(columns, 1) * width]])
    return {"pixel_values": torch.stack(tiles)[None], "image_sizes": sizes}


def sized(config: Any, rng: torch.Generator) -> SampleInputs:
    """Return one image, smaller than the largest, with its size, ``[1, C, H, W]`` and ``[1, 2]``."""
    import torch

    side = _PATCHES * config.spatial_merge_size * config.vision_config.patch_size
    side = min(side, *_size(config.vision_config))
    return {
        "pixel_values": torch.randn(1, config.vision_config.num_channels, side, side, generator=rng),
        "image_sizes": torch.tensor([[side, side]]),
    }


def patches(config: Any, rng: torch.Generator) -> SampleInputs:
    """Return one image as rows of patches, two frames of ``p x p`` pixels each: ``[rows, C 2 p p]``, with its grid ``[1, 3]``."""
    import torch

    vision = config.vision_config
    high, wide = 2 * vision.spatial_merge_size, 3 * vision.spatial_merge_size
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": torch.randn(high * wide, numbers, generator=rng),
        "image_grid_thw": torch.tensor([[1, high, wide]]),
    }


def masked_patches(config: Any, rng: torch.Generator) -> SampleInputs:
    """Return one image as rows of patches ``[1, rows, C p p]``, with its grid ``[1, 2]`` and the rows that count ``[1, rows]``."""
    import torch

    vision = config.vision_config
    side = 2 * config.downsample_factor
    numbers = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": torch.randn(1, side * side, numbers, generator=rng),
        "spatial_shapes": torch.tensor([[side, side]]),
        "pixel_attention_mask": torch.ones(1, side * side, dtype=torch.int64),
    }


def placed_patches(config: Any, rng: torch.Generator) -> SampleInputs:
    """Return one square image as rows of patches ``[1, rows, 3 p p]``, with the column and row of each ``[1, rows, 2]``."""
    import torch

    vision = config.vision_config
    side = 2 * vision.pooling_kernel_size
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1)
    return {
        "pixel_values": torch.rand(1, side * side, 3 * vision.patch_size**2, generator=rng),
        "image_position_ids": places.reshape(1, side * side, 2),
    }


def spectrum(config: Any, rng: torch.Generator) -> SampleInputs:
    """Return one sound of the encoder's own length, two frames of the spectrum per position, ``[1, bins, frames]``."""
    import torch

    audio = config.audio_config
    return {"input_features": torch.randn(1, audio.num_mel_bins, 2 * audio.max_source_positions, generator=rng)}


def masked_spectrum(config: Any, rng: torch.Generator) -> SampleInputs:
    """Return one short sound ``[1, bins, frames]`` with the frames that count ``[1, frames]``."""
    import torch

    return {
        "input_features": torch.randn(1, config.audio_config.num_mel_bins, _FRAMES, generator=rng),
        "input_features_mask": torch.ones(1, _FRAMES, dtype=torch.int64),
    }


def _size(vision: Any) -> tuple[int, int]:
    size = vision.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _noise(vision: Any, rng: torch.Generator) -> torch.Tensor:
    import torch

    return torch.randn(getattr(vision, "num_channels", 3), *_size(vision), generator=rng)
