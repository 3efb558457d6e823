"""Runs an encoder on texts or images, and summarises what its routers choose: of images, for every patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate

from upcycle.architectures.stock import load_image_processor, load_stock_model
from upcycle.architectures.stock_auto import reads_of
from upcycle.errors import UsageError
from upcycle.files.user_paths import user_path
from upcycle.images.files import ImageItem, class_of, image_files
from upcycle.images.files import spread as evenly
from upcycle.images.pixels import ImageReader
from upcycle.models.stock_model import StockModel
from upcycle.progress import Progress
from upcycle.report.data.routing import MOST_SHOWN, Choices, routing_data, spread
from upcycle.report.data.subject import Subject
from upcycle.report.data.texts import read_domains
from upcycle.text.windows import frame_of
from upcycle.trainers.routing.recorder import Recorder
from upcycle.trainers.routing.router_records import watch_router
from upcycle.trainers.routing.stock_routers import RouterPlace, find_routers

_IMAGES, _PICTURES, _SIDE = 64, 4, 64  # images that are read, those that are drawn, and their pixels at most
_MOST_CLASSES = 12
_BATCH = 16


@dataclass(frozen=True)
class _Input:
    """What an encoder reads: int64 windows or fp32 images, in batches of one domain each."""

    name: str
    batches: Sequence[torch.Tensor]


def encoder_routing(
    subject: Subject, texts: Sequence[str], tokens: int, images: str | None, progress: Progress
) -> dict[str, Any]:
    """Return :func:`~upcycle.report.data.routing.routing_data` of an encoder, and of one that reads images ``patches``.

    ``patches`` has the ``layers`` that are shown, their number of ``experts`` and some ``images``, each with its ``name``, its
    ``pixels`` (red, green and blue, as the model reads them, rescaled) and per layer the rows of its patches' experts.

    Args:
        subject: the model.
        texts: UTF-8 files or names of embedded texts, for an encoder of text.
        tokens: most tokens to read of each.
        images: a folder of images, for an encoder of images.
        progress: where to report.

    Raises:
        UsageError: no images are named, or one cannot be read.
    """
    sees = reads_of(subject.config) == "images"
    if sees and not images:
        raise UsageError("no images were named, which its routers could choose for", hint="--images FOLDER")
    with progress.phase("loading the model", 1):
        model = StockModel(load_stock_model(subject.folder))
        progress.advance()
    places = find_routers(model.model)
    if not places:
        raise UsageError("no layer has a router")
    if sees:
        return _of_images(subject.folder, model, places, str(images), progress)
    tokenizer, domains = read_domains(subject, texts, tokens)
    frame = frame_of(tokenizer)
    inner = [replace(one, windows=one.windows[:, : one.windows.shape[1] - frame.tokens]) for one in domains]
    inputs = [_Input(one.name, frame.around(one.windows).split(_BATCH)) for one in inner]
    chosen = _run(model, places, inputs, progress)
    windows = [torch.cat(list(one.batches)).flatten() for one in inputs]
    choices = _choices(places, chosen, torch.cat(windows), [len(w) for w in windows], [one.name for one in inputs])
    return routing_data(choices, _rows(places), lambda token: str(tokenizer.decode([token])))


def _of_images(
    folder: Path, model: StockModel, places: Sequence[RouterPlace], images: str, progress: Progress
) -> dict[str, Any]:
    config = model.model.config
    items = evenly(image_files(user_path(images)), _IMAGES)
    items = sorted(items, key=class_of)
    reader = ImageReader(load_image_processor(folder), config, folder)
    names = list(dict.fromkeys(map(class_of, items)))
    if len(names) > _MOST_CLASSES or not all(names):
        names = ["images"]
    inputs = []
    for name in names:
        own = [item for item in items if len(names) == 1 or class_of(item) == name]
        pixels = reader(own)
        inputs.append(_Input(name or "images", pixels.split(_BATCH)))
    chosen = _run(model, places, inputs, progress)
    count = len(items)
    states = len(chosen[places[0].index]) // count
    rows, columns = _patches(config)
    special = states - rows * columns
    where = torch.arange(states).repeat(count)
    sizes = [sum(len(batch) for batch in one.batches) * states for one in inputs]
    choices = _choices(places, chosen, where, sizes, [one.name for one in inputs])

    def place(state: int) -> str:
        if state < special:
            return f"special {state}"
        return "row {}, column {}".format(*divmod(state - special, columns))

    found = routing_data(choices, _rows(places), place)
    shown = spread(sorted(chosen), MOST_SHOWN)
    every = torch.cat([batch for one in inputs for batch in one.batches])
    pictures = [
        {
            "name": items[i].name,
            "pixels": _seen(every[i]),
            "experts": [
                chosen[layer][i * states + special : (i + 1) * states, 0].view(rows, columns).tolist()
                for layer in shown
            ],
        }
        for i in _drawn(items)
    ]
    counts = {place.index: place.count for place in places}
    return {**found, "patches": {"layers": shown, "experts": [counts[layer] for layer in shown], "images": pictures}}


def _drawn(items: Sequence[ImageItem]) -> list[int]:
    return spread(range(len(items)), _PICTURES)


def _seen(pixels: torch.Tensor) -> list[Any]:
    """Return an image ``[C, H, W]`` as rows of red, green and blue from 0 to 255, from its darkest to its brightest value."""
    low, high = pixels.aminmax()
    scaled = (pixels - low) / (high - low).clamp(min=1e-6) * 255
    part = _SIDE / max(scaled.shape[1:])
    if part < 1:
        scaled = interpolate(scaled[None], scale_factor=part, mode="area")[0]
    colours = scaled.expand(3, -1, -1) if len(scaled) == 1 else scaled[:3]
    found: list[Any] = colours.round().to(torch.uint8).permute(1, 2, 0).tolist()
    return found


def _patches(config: Any) -> tuple[int, int]:
    """Return the rows and columns of an image's patches."""
    sizes = [(v, v) if isinstance(v, int) else tuple(v) for v in (config.image_size, config.patch_size)]
    return sizes[0][0] // sizes[1][0], sizes[0][1] // sizes[1][1]


def _run(
    model: StockModel, places: Sequence[RouterPlace], inputs: Sequence[_Input], progress: Progress
) -> dict[int, torch.Tensor]:
    """Return every router's choices, int64 ``[T, K]`` by layer; a token's first expert is the one of largest weight."""
    found: dict[int, list[torch.Tensor]] = {place.index: [] for place in places}
    with (
        Recorder[None](model.model.base_model) as recorder,
        progress.phase("reading", sum(len(one.batches) for one in inputs)),
    ):
        for place in places:
            watch_router(recorder, place.block, place.router, _keeper(found[place.index]))
        for batch in _batches(inputs):
            model.logits(batch)
            progress.advance()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _keeper(kept: list[torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    def keep(_: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> None:
        kept.append(experts.gather(1, weights.argsort(dim=1, descending=True, stable=True)))

    return keep


def _batches(inputs: Sequence[_Input]) -> Iterator[torch.Tensor]:
    for one in inputs:
        yield from one.batches


def _choices(
    places: Sequence[RouterPlace],
    chosen: dict[int, torch.Tensor],
    tokens: torch.Tensor,
    sizes: Sequence[int],
    names: Sequence[str],
) -> Choices:
    domains = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    return Choices(chosen, {place.index: place.count for place in places}, tokens, domains, names)


def _rows(places: Sequence[RouterPlace]) -> dict[int, torch.Tensor]:
    return {place.index: next(place.router.parameters()) for place in places}
