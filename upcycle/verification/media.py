"""Compares a model of parts with its conversion on a text with an image or a sound: text alone does not reach the other parts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.clean_settings import PROCESSORS
from upcycle.architectures.stock import load_processor
from upcycle.architectures.towers.samples import SampleInputs
from upcycle.errors import UpcycleError
from upcycle.inputs.read import find_inputs
from upcycle.verification.verdict import relative

if TYPE_CHECKING:
    from upcycle.architectures.towers.wrapper import Wrapper
    from upcycle.checkpoints.checkpoint import DenseCheckpoint
    from upcycle.models.stock_model import StockModel
    from upcycle.planning.expert_job import ExpertJob
    from upcycle.progress import Progress

_BEFORE, _BEHIND = 16, 32  # tokens of text around the image or sound
_HELD_OUT = 8  # texts with images, at most
_SIDE = 96  # pixels of the image that a processor is given
_SECONDS = 2  # of the sound
_TOKEN_KEY = re.compile(r"(^|_)token_(id|index|ids)$")
_WORDS = {"image": "image", "sound": "audio"}  # as transformers calls them


@dataclass(frozen=True)
class MediaCheck:
    """Holds the comparison on an image or a sound.

    Attributes:
        error: the relative error of the result's logits against the source in the result's dtype; None: nothing was compared.
        what: what both models read, or why nothing was compared.
    """

    error: float | None
    what: str


def compare_media(judge: StockModel, result: StockModel, wrapper: Wrapper, folder: Path, seed: int) -> MediaCheck:
    """Run both models on one text with a random image or sound, in fp32, and measure how far their logits are apart.

    It goes through the processor that lies beside the source. Without one, or where it cannot be used, it is made as the processor
    would put it out, from the sizes in the configuration.

    Args:
        judge: the source, in the dtype of the result.
        result: the conversion.
        wrapper: the class that both are of.
        folder: the source's folder, with its processor.
        seed: of the image or sound, and of the text.
    """
    faults = []
    for how, make in (("its processor", _processed), ("its configuration", _made)):
        if make is _processed and not any((folder / name).is_file() for name in PROCESSORS):
            continue
        try:
            inputs = make(judge.model, wrapper, folder, torch.Generator().manual_seed(seed))
            expected = judge.logits_of(inputs)
        except (MemoryError, AssertionError):
            raise
        except Exception as error:  # stock processors and models raise errors of many kinds
            message = error.message if isinstance(error, UpcycleError) else str(error)
            first = (message.strip().splitlines() or [type(error).__name__])[0]
            faults.append(f"by {how}: {first.replace(str(folder), 'the source')}")  # the result may be published
            continue
        found = result.logits_of(inputs)
        norm = expected.double().square().sum().item()
        what = f"{inputs['input_ids'].shape[1]:,} tokens with a random {wrapper.kind} made by {how}"
        if faults:
            what += f" ({'; '.join(faults)})"
        return MediaCheck(relative((found - expected).double().square().sum().item(), norm), what)
    return MediaCheck(None, f"{wrapper.kind}s were not compared: {'; '.join(faults)}")


def compare_parts(
    judge: StockModel,
    result: StockModel,
    wrapper: Wrapper,
    folder: Path,
    seed: int,
    progress: Progress,
    held: list[SampleInputs] | None = None,
) -> MediaCheck:
    """Run both models on texts with images that were held out of a calibration (``held``), or else as :func:`compare_media`."""
    with progress.phase(f"comparing on a text with {with_article(wrapper.kind)}", 1):
        found = compare_held_out(judge, result, held) if held else compare_media(judge, result, wrapper, folder, seed)
        progress.advance()
    if found.error is None:
        progress.note(found.what)
    return found


def compare_held_out(judge: StockModel, result: StockModel, inputs: list[SampleInputs]) -> MediaCheck:
    """Run both models on texts with images that were held out of a calibration, and measure how far their logits are apart."""
    error = norm = 0.0
    for given in inputs:
        expected = judge.logits_of(given)
        error += (result.logits_of(given) - expected).double().square().sum().item()
        norm += expected.double().square().sum().item()
    return MediaCheck(relative(error, norm), f"{len(inputs):,} texts with images that were held out of the calibration")


def held_out_inputs(job: ExpertJob, checkpoint: DenseCheckpoint) -> list[SampleInputs]:
    """Return texts with images that a conversion was not calibrated on; none where it was not calibrated on images in texts.

    A model from elsewhere comes without its images: then there are none, either.
    """
    family, wanted = job.family, job.recipe.calibration
    if not (family.calibrates_on and wanted.texts and job.calibrated):
        return []
    try:
        found = find_inputs(family.calibrates_on, wanted, checkpoint.source.path, checkpoint.raw_config, job.context)
        return [found.reader.batch([one]).arguments for one in found.main.held_out[:_HELD_OUT]]
    except UpcycleError:
        return []


def with_article(kind: str) -> str:
    """Return ``an image`` or ``a sound``."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _processed(model: Any, wrapper: Wrapper, folder: Path, rng: torch.Generator) -> SampleInputs:
    """Return what the stock processor makes of a line of text with a random image or sound."""
    processor, word = load_processor(folder), _WORDS[wrapper.kind]
    token = getattr(processor, f"{word}_token", None)
    if token is None:
        raise UpcycleError(f"a {type(processor).__name__} has no '{word}_token'")
    given: dict[str, Any] = {"text": [f"Here: {token} What is it?"], "return_tensors": "pt"}
    if wrapper.kind == "image":
        given["images"] = [torch.randint(256, (_SIDE, _SIDE, 3), generator=rng, dtype=torch.uint8).numpy()]
    else:
        rate = processor.feature_extractor.sampling_rate
        given |= {"audio": [torch.randn(_SECONDS * rate, generator=rng).numpy()], "sampling_rate": rate}
    return {name: value for name, value in processor(**given).items() if isinstance(value, torch.Tensor)}


def _made(model: Any, wrapper: Wrapper, folder: Path, rng: torch.Generator) -> SampleInputs:
    """Return a random image or sound as the stock class takes it, with as many of its tokens in a text as it has features."""
    config, word = model.config, _WORDS[wrapper.kind]
    inputs, token = wrapper.sample(config, rng), getattr(config, f"{word}_token_id")
    with torch.no_grad():
        found = getattr(model, f"get_{word}_features")(**inputs)
    found = getattr(found, "pooler_output", found)
    features = found if isinstance(found, list | tuple) else [found]
    count = sum(each.numel() for each in features) // config.text_config.hidden_size
    special = {each for key, value in config.to_dict().items() if _TOKEN_KEY.search(key) for each in _listed(value)}
    ordinary = torch.tensor([each for each in range(config.text_config.vocab_size) if each not in special])
    text = ordinary[torch.randint(len(ordinary), (_BEFORE + _BEHIND,), generator=rng)]
    ids = torch.cat([text[:_BEFORE], torch.full((count,), token), text[_BEFORE:]])[None]
    if wrapper.typed:
        inputs[wrapper.typed] = (ids == token).long()
    return {"input_ids": ids, **inputs}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
