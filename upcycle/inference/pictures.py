"""What a model of parts reads of a prompt and a picture, by its own processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upcycle.architectures.stock import load_processor, quiet_transformers
from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files.user_paths import user_path
from upcycle.registry import find


def with_picture(name: str, folder: Path, config: Any, prompt: str, image: str | Path) -> dict[str, Any]:
    """Return the tensors that a model takes for a picture and a prompt, by the names of its arguments; a batch of one.

    The picture comes before the prompt, unless the prompt says where it is, by the processor's own token.

    Args:
        name: the model's name in messages.
        folder: where its processor is.
        config: the stock configuration.
        prompt: the text.
        image: an image file.

    Raises:
        UsageError: the model reads no images, or the file is none.
        EnvironmentFault: there is no processor, or Pillow is not installed.
    """
    wrapper = find("wrapper", config.model_type)
    if wrapper is None or wrapper.kind != "image":
        raise UsageError(f"{name} is a '{config.model_type}' model, which reads no images", hint="leave --image out")
    picture = _opened(user_path(image))
    processor = load_processor(folder)
    token = getattr(processor, "image_token", None)
    if not hasattr(processor, "image_processor") or not isinstance(token, str):
        raise EnvironmentFault(
            f"{name} has no processor of images",
            hint="copy processor_config.json or preprocessor_config.json beside the weights, from the dense model",
        )
    text = prompt if token in prompt else f"{token}\n{prompt}"
    try:
        with quiet_transformers():
            made = processor(text=[text], images=[picture], return_tensors="pt")
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{name}'s processor cannot read {image} with this prompt: {said}",
            hint="is it a picture of usual size, and once in the prompt?",
        ) from None
    return dict(made)


def _opened(path: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise EnvironmentFault("reading images needs Pillow", hint="pip install pillow") from None
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except UnidentifiedImageError:
        raise UsageError(f"{path} is no image that Pillow can read", hint="a PNG or JPEG file, for example") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="--image FILE takes a PNG or JPEG file") from None
