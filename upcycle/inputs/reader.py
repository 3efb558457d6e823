"""Turns pairs of texts, sounds, images and captions into the arguments of a model, by the files that lie beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from upcycle.architectures.stock import load_feature_extractor, load_image_processor, load_processor, load_tokenizer
from upcycle.errors import CheckpointError, UsageError
from upcycle.images.files import ImageItem
from upcycle.images.pixels import ImageReader
from upcycle.inputs.examples import InputExample
from upcycle.inputs.sounds import SoundItem
from upcycle.text.windows import Frame, encode, frame_of


@dataclass(frozen=True)
class InputBatch:
    """Holds what a model is called with once.

    Attributes:
        arguments: the model's, by name.
        kept: which positions ``[N, T]`` are no padding, by the part of the model that reads them (``encoder``, ``decoder``,
            ``text``); a part without padding is left out.
    """

    arguments: dict[str, torch.Tensor]
    kept: dict[str, torch.Tensor] = field(default_factory=dict)


class InputReader:
    """Reads the inputs of one model.

    Args:
        reads: what the model reads, see :data:`~upcycle.architectures.described.ffn_place.Reads`.
        config: its stock configuration.
        where: its folder, with its tokenizer and processors.
        window: most tokens of a text, and of a sound without a text, most states.
        image_states: states of one image.

    Attributes:
        window: see above.
        alone: whether every example is a batch: its images are divided in a way of their own.

    Raises:
        UsageError: an image processor or feature extractor is missing.
        CheckpointError: the configuration names no token that a decoder starts with.
        EnvironmentFault: a tokenizer or processor cannot be loaded.
    """

    def __init__(self, reads: str, config: Any, where: Path, window: int, image_states: int = 1) -> None:
        self._reads, self._config, self._where, self.window = reads, config, where, window
        self._image_states = image_states
        self._frame, self._padding = Frame(), 0
        self._tokenizer: Any = None
        if reads in ("pairs", "speech", "images and text"):
            self._tokenizer = load_tokenizer(where)
            self._frame = frame_of(self._tokenizer)
            self._padding = self._tokenizer.pad_token_id or 0
        self.alone = reads == "images in text"
        if self.alone:
            self._processor = load_processor(where)
            self._made: dict[int, dict[str, torch.Tensor]] = {}
        if reads in ("images", "images and text"):
            own = config.vision_config if reads != "images" else config
            self._images = ImageReader(load_image_processor(where), own, where)
        if reads in ("speech", "sounds"):
            self._features = load_feature_extractor(where)
            self.rate = int(self._features.sampling_rate)
        if reads in ("pairs", "speech"):
            self._start = start_token(config, where)

    def ids(self, text: str) -> torch.Tensor:
        """Return token ids ``[T]`` of a text with the special tokens around it, cut to the window before these."""
        inner = max(1, self.window - self._frame.tokens)
        row: torch.Tensor = self._frame.around(encode(self._tokenizer, text)[None, :inner])[0]
        return row

    def decoder_ids(self, text: str) -> torch.Tensor:
        """Return what a decoder reads ``[T]`` while it writes a text: the start token, and the text without its last token."""
        row = self.ids(text)
        if int(row[0]) == self._start:
            return row[:-1]
        return torch.cat([torch.tensor([self._start]), row[:-1]])

    def targets(self, text: str) -> torch.Tensor:
        """Return what a decoder writes ``[T]`` where it reads :meth:`decoder_ids`."""
        row = self.ids(text)
        return row[1:] if int(row[0]) == self._start else row

    def batch(self, examples: Sequence[InputExample], texts: Sequence[InputExample] = ()) -> InputBatch:
        """Return the arguments for some examples; of a model of two towers, ``texts`` are what its other tower reads.

        Raises:
            UsageError: an image or a sound cannot be read, or a sound is too short; the message names it.
            CheckpointError: a processor makes other sizes than the model has.
        """
        match self._reads:
            case "pairs":
                given, kept = self._padded([self.ids(str(one.item)) for one in examples])
                ids, target = self._padded([self.decoder_ids(one.text or "") for one in examples])
                arguments = {"input_ids": given, "attention_mask": kept.long(), "decoder_input_ids": ids}
                return InputBatch(arguments, {"encoder": kept, "decoder": target})
            case "speech":
                ids, kept = self._padded([self.decoder_ids(one.text or "") for one in examples])
                return InputBatch(
                    {"input_features": self.sounds(examples), "decoder_input_ids": ids}, {"decoder": kept}
                )
            case "sounds" | "images" | "images in text":
                return InputBatch(self._media(examples))
            case _:
                ids, kept = self._padded([self.ids(str(one.item)) for one in texts])
                arguments = {"input_ids": ids, "pixel_values": self.pixels(examples)}
                if self._pads_whole:
                    return InputBatch(arguments)
                return InputBatch({**arguments, "attention_mask": kept.long()}, {"text": kept})

    def _media(self, examples: Sequence[InputExample]) -> dict[str, torch.Tensor]:
        if self.alone:
            (one,) = examples
            return self._in_text(one)
        return (
            {"input_values": self.sounds(examples)}
            if self._reads == "sounds"
            else {"pixel_values": self.pixels(examples)}
        )

    def _in_text(self, example: InputExample) -> dict[str, torch.Tensor]:
        """Return what the stock processor makes of an image and the text behind it."""
        if (made := self._made.get(example.number)) is not None:
            return made
        assert isinstance(example.item, ImageItem)
        token = getattr(self._processor, "image_token", None)
        if token is None:
            raise CheckpointError(f"{self._where}: a {type(self._processor).__name__} has no 'image_token'")
        image, text = example.item.read(3), f"{token}\n{example.text or ''}"
        found = self._processor(text=[text], images=[image], return_tensors="pt")
        made = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        self._made[example.number] = made
        return made

    @property
    def _pads_whole(self) -> bool:
        """Whether texts are padded to the full length, and the padding is read: SigLIP learned from such texts alone."""
        return str(self._config.model_type) in ("siglip", "siglip2") or getattr(
            self._config, "base_model_type", None
        ) in ("siglip", "siglip2")

    def _padded(self, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows side by side ``[N, T]``, padded behind, and which positions are no padding."""
        longest = max(map(len, rows))
        if self._reads == "images and text" and self._pads_whole:
            longest = int(self._config.text_config.max_position_embeddings)
        ids = torch.full((len(rows), longest), self._padding)
        for own, row in zip(ids, rows, strict=True):
            own[: len(row)] = row
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(longest) < lengths[:, None]

    def pixels(self, examples: Sequence[InputExample]) -> torch.Tensor:
        """Return fp32 pixels ``[N, C, H, W]``."""
        return self._images([one.item for one in examples if isinstance(one.item, ImageItem)])

    def sounds(self, examples: Sequence[InputExample]) -> torch.Tensor:
        """Return fp32 features ``[N, M, T]``, or samples ``[N, T]``, of the same length: the shortest sound's or the window's."""
        read = [one.item.read(self.rate) for one in examples if isinstance(one.item, SoundItem)]
        if self._reads == "sounds":
            self._check_lengths(examples, read)
            least = min(self.window * self._hop, *map(len, read))
            read = [one[:least] for one in read]
        made = self._features([one.numpy() for one in read], sampling_rate=self.rate, return_tensors="pt")
        found: torch.Tensor = made["input_features" if self._reads == "speech" else "input_values"].float()
        if self._reads == "speech":
            shape = [self._config.num_mel_bins, 2 * self._config.max_source_positions]
            if list(found.shape[1:]) != shape:
                raise CheckpointError(
                    f"{self._where}: the feature extractor makes {list(found.shape[1:])} of a sound, and the model reads {shape}",
                    hint="compare 'feature_size' and 'chunk_length' in preprocessor_config.json with 'num_mel_bins' and "
                    "'max_source_positions' in config.json",
                )
        return found

    def tokens(self, example: InputExample) -> int:
        """Return how many states an encoder makes of an example."""
        if isinstance(example.item, str):
            return self.length(example)
        if self.alone:
            return self._in_text(example)["input_ids"].shape[1]
        if isinstance(example.item, ImageItem):
            return self._image_states
        if self._reads == "speech":
            return int(self._config.max_source_positions)
        return min(self.window, max(1, self.length(example) // self._hop))

    def _check_lengths(self, examples: Sequence[InputExample], read: Sequence[torch.Tensor]) -> None:
        """Refuse sounds that are too short for two states: of one, the norm behind the first convolution may make nothing."""
        least = 2
        for width, stride in zip(reversed(self._config.conv_kernel), reversed(self._config.conv_stride), strict=True):
            least = (least - 1) * stride + width
        for one, samples in zip(examples, read, strict=True):
            if len(samples) < least and isinstance(one.item, SoundItem):
                raise UsageError(
                    f"{one.item.path or one.item.name}: the sound has {len(samples):,} samples, and two states need {least:,}",
                    hint="remove the file, or replace it",
                )

    @property
    def _hop(self) -> int:
        return int(torch.tensor(self._config.conv_stride).prod())

    def length(self, example: InputExample) -> int:
        """Return how long an example is, so that those of one length come into one batch."""
        if isinstance(example.item, str):
            return len(self.ids(example.item))
        if isinstance(example.item, SoundItem) and self._reads == "sounds":
            return len(example.item.read(self.rate))
        return len(self.ids(example.text)) if example.text and self._reads == "speech" else 1


def start_token(config: Any, where: Path) -> int:
    """Return the id that a model's decoder reads first.

    Raises:
        CheckpointError: its configuration names none.
    """
    for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        if isinstance(found := getattr(config, key, None), int):
            return found
    raise CheckpointError(
        f"{where}: config.json names no token that the decoder starts with",
        hint="set 'decoder_start_token_id' in config.json",
    )
