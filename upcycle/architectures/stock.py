"""Hands files and settings of other people to transformers, which no other module does.

A folder is data from a stranger, and transformers does what its files say: ``auto_map`` names Python files to import,
``attn_implementation`` a repository whose native code is loaded, ``adapter_config.json`` another model, ``tokenizer_config.json``
files anywhere. So transformers never reads the folder itself. It reads a view of it: links to weights and tokenizer files with
known names, and ``config.json``, ``generation_config.json`` and ``tokenizer_config.json`` without the settings that name code, a
kernel, a repository or a path. With ``trust_remote_code=False`` and ``local_files_only=True``, no call asks or downloads anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from upcycle.architectures.clean_settings import (
    CONFIG,
    GENERATION,
    GENERATION_CODE,
    PROCESSORS,
    SPECIAL,
    TOKENIZER,
    clean_config,
    clean_file,
)
from upcycle.architectures.few_bits import packed_config, quiet_unpacking, unpack_linear_layers, unpacked
from upcycle.architectures.stock_auto import auto_class
from upcycle.errors import CheckpointError, EnvironmentFault, UpcycleError, UsageError
from upcycle.files.formats.parsing import parse_json
from upcycle.files.formats.tensor_files import read_config
from upcycle.files.formats.tensor_names import is_block_fp8
from upcycle.hardware.memory import is_out_of_memory

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
# Settings of FP8 weights that say what they are. Others could lead transformers to kernels of somebody's repository.
_FP8_SETTINGS = ("quant_method", "weight_block_size", "activation_scheme", "modules_to_not_convert", "ignored_layers")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tokenizer.*.json",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)


def build_config(raw: Mapping[str, Any], where: str) -> Any:
    """Return the stock configuration that ``AutoConfig`` makes of a ``config.json``, without a dtype.

    Raises:
        CheckpointError: transformers does not know the model, or refuses a value.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    plain = {key: value for key, value in clean_config(raw).items() if "dtype" not in key}
    model_type = plain.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{where}: config.json: 'model_type' must be a name, got {model_type!r}")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"{where}: config.json: 'model_type': transformers has no '{model_type}' model")
    with TemporaryDirectory(prefix="upcycle-") as folder, _explained(f"{where}: transformers cannot read config.json"):
        (Path(folder) / CONFIG).write_text(json.dumps(plain), encoding="utf-8")
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    config.name_or_path = ""
    return config


def empty_model(raw: Mapping[str, Any] | Any, where: str, dtype: torch.dtype | None = None) -> Any:
    """Build the stock causal language model (or encoder) of a configuration on the meta device: shapes without memory.

    Of a model of parts (``upcycle list wrappers``), the whole is built.

    Args:
        raw: a ``config.json``, or the result of :func:`build_config`.
        where: its name in messages.
        dtype: the dtype of its weights; default: torch's default.

    Raises:
        CheckpointError: transformers does not know such a model, or refuses a value.
    """
    import torch

    config = build_config(raw, where) if isinstance(raw, Mapping) else raw
    given = {} if dtype is None else {"dtype": dtype}
    with _explained(f"{where}: transformers has no model like it"), quiet_transformers(), torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=False, **given)


def random_stock_model(config: Any, seed: int) -> Any:
    """Build the stock model of a stock configuration on the CPU in fp32, with the random weights that its class draws."""
    import torch

    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, trust_remote_code=False, dtype=torch.float32)
    return model.eval()


def load_stock_model(folder: Path, dtype: torch.dtype | str = "float32", surplus: bool = False) -> Any:
    """Load the stock causal language model (or encoder) of a folder or ``.gguf`` file on the CPU, as Auto classes do.

    Args:
        folder: a transformers folder with safetensors weights, or a ``.gguf`` file.
        dtype: the dtype of all weights; ``auto``: as stored.
        surplus: whether the files may hold weights that the model does not have, as transformers permits.

    Raises:
        CheckpointError: transformers cannot load it, or a weight is missing, unexpected or of another shape.
        EnvironmentFault: it does not fit in memory.
    """
    from transformers import AutoConfig

    packed, whole = packed_config(folder), unpacked(folder)
    named: dict[str, Any] = {"gguf_file": folder.name} if folder.is_file() else {"use_safetensors": True}
    # transformers leaves unpacked experts in the dtype of their scales, whatever dtype is asked for.
    named |= {"dtype": "auto" if packed else dtype, "output_loading_info": True}
    with (
        view(folder, weights=True) as clean,
        quiet_transformers(),
        quiet_unpacking() if packed else nullcontext(),
        _explained(f"transformers cannot load {folder}"),
    ):
        if folder.is_file():
            named["config"] = _gguf_config(clean, folder)
        elif stored := packed or _fp8_settings(folder):
            named["config"] = build_config(clean_file(clean / CONFIG), str(folder))
            named["config"].quantization_config = stored
        config = named.get("config") or AutoConfig.from_pretrained(
            clean, trust_remote_code=False, local_files_only=True
        )
        loaded: Any
        if whole is None:
            loaded = auto_class(config).from_pretrained(clean, trust_remote_code=False, local_files_only=True, **named)
        else:  # weights that are in memory are given to the class itself
            own: Any = type(empty_model(config, str(folder)))
            named |= {"config": config, "state_dict": whole}
            loaded = own.from_pretrained(None, trust_remote_code=False, local_files_only=True, **named)
    model, report = loaded
    if packed:
        unpack_linear_layers(model, dtype)
    report = {kind: keys for kind, keys in report.items() if keys and not (surplus and kind == "unexpected_keys")}
    if problems := {kind: sorted(map(str, keys))[:3] for kind, keys in report.items()}:
        raise CheckpointError(f"transformers does not load {folder} cleanly: {problems}")
    model.config.name_or_path = model.name_or_path = ""
    return model


def generation_settings(folder: Path) -> Any:
    """Return the stock generation settings that lie in a folder, without those that name code; None: it has none.

    Raises:
        CheckpointError: they are not a JSON object, or transformers refuses a value.
    """
    from transformers import GenerationConfig

    if not (folder / GENERATION).is_file():
        return None
    content = {key: value for key, value in clean_file(folder / GENERATION).items() if key not in GENERATION_CODE}
    with quiet_transformers(), _explained(f"transformers cannot read {folder / GENERATION}"):
        return GenerationConfig(**content)


def _gguf_config(clean: Path, path: Path) -> Any:
    """Return the configuration that transformers reads of a ``.gguf`` file, with what it does not read: biases, sizes.

    Args:
        clean: a folder that shows transformers this file.
        path: the file.
    """
    from transformers import AutoConfig

    from upcycle.files.formats.gguf_file import GgufFile

    ours = GgufFile(path).config
    config: Any = AutoConfig.from_pretrained(clean, gguf_file=path.name, trust_remote_code=False, local_files_only=True)
    for key in ours.keys() & {"vocab_size", "attention_bias", "head_dim", "pad_token_id"}:
        setattr(config, key, ours[key])
    return config


def _fp8_settings(folder: Path) -> dict[str, Any] | None:
    """Return the ``quantization_config`` with which transformers multiplies FP8 weights by their scales; None without such weights.

    Unless it is told to, it does that only where there is no GPU.
    """
    raw = read_config(folder)
    if not is_block_fp8(raw):
        return None
    settings = raw["quantization_config"]
    return {**{key: settings[key] for key in _FP8_SETTINGS if key in settings}, "dequantize": True}


def load_tokenizer(path: Path) -> Any:
    """Load the stock tokenizer of a folder or of a ``.gguf`` file.

    Raises:
        CheckpointError: a settings file is not a JSON object.
        EnvironmentFault: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    named = {"gguf_file": path.name} if path.is_file() else {}
    with view(path, tokenizer=True) as clean, quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(clean, trust_remote_code=False, local_files_only=True, **named)
        except (MemoryError, UpcycleError):
            raise
        except Exception as error:  # damaged files raise errors of many kinds
            raise EnvironmentFault(
                f"the tokenizer in {path} cannot be loaded: {_first_line(error)}", hint=_tokenizer_hint(path)
            ) from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what some classes make of a folder without a vocabulary
        raise EnvironmentFault(
            f"{path} holds no vocabulary: its tokenizer would know its special tokens alone",
            hint="put the tokenizer's files beside the weights",
        )
    tokenizer.name_or_path = ""
    tokenizer.init_kwargs.pop("name_or_path", None)
    return tokenizer


def load_processor(path: Path) -> Any:
    """Load the stock processor of a folder: it makes what a model of parts reads of texts, and of images or sounds.

    Raises:
        CheckpointError: a settings file is not a JSON object.
        EnvironmentFault: the processor cannot be loaded, as a package that it needs is missing, or a file is damaged.
    """
    return _loaded_processor(path, "AutoProcessor", "processor")


def load_image_processor(path: Path) -> Any:
    """Load the stock image processor of a folder: it makes what an encoder of images reads.

    Raises:
        UsageError: none lies in the folder.
        CheckpointError: a settings file is not a JSON object.
        EnvironmentFault: the processor cannot be loaded, as a package that it needs is missing, or a file is damaged.
    """
    _needs_processor(path, "images")
    return _loaded_processor(path, "AutoImageProcessor", "image processor", "pip install pillow")


def load_feature_extractor(path: Path) -> Any:
    """Load the stock feature extractor of a folder: it makes what a model reads of sounds.

    Raises:
        UsageError: none lies in the folder.
        CheckpointError: a settings file is not a JSON object.
        EnvironmentFault: it cannot be loaded, as a package that it needs is missing, or a file is damaged.
    """
    _needs_processor(path, "sounds")
    return _loaded_processor(path, "AutoFeatureExtractor", "feature extractor")


def _needs_processor(path: Path, what: str) -> None:
    if not any((path / name).is_file() for name in PROCESSORS):
        raise UsageError(
            f"{path} has no preprocessor_config.json, by which {what} become what the model reads",
            hint="put the original model's preprocessor_config.json beside the weights",
        )


def _loaded_processor(path: Path, auto: str, what: str, hint: str | None = None) -> Any:
    import transformers

    with view(path, tokenizer=True) as clean, quiet_transformers():
        try:
            return getattr(transformers, auto).from_pretrained(clean, trust_remote_code=False, local_files_only=True)
        except (MemoryError, UpcycleError):
            raise
        except Exception as error:  # damaged files, and packages that are missing, raise errors of many kinds
            raise EnvironmentFault(f"the {what} in {path} cannot be loaded: {_first_line(error)}", hint=hint) from None


@contextmanager
def view(path: Path, weights: bool = False, tokenizer: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that shows transformers the known files of another folder and nothing else.

    Args:
        path: a transformers folder, or a ``.gguf`` file.
        weights: whether to link the weights.
        tokenizer: whether to link the tokenizer's files, and those of a processor of images or sounds.

    Raises:
        CheckpointError: a settings file is not a JSON object.
        EnvironmentFault: the system's folder for temporary files cannot be written.
    """
    patterns = (WEIGHT_FILES if weights else ()) + (TOKENIZER_FILES if tokenizer else ())
    settings = {CONFIG: True, GENERATION: weights, **dict.fromkeys((TOKENIZER, SPECIAL, *PROCESSORS), tokenizer)}
    with _temporary_folder() as folder:
        if path.is_file():
            (folder / path.name).symlink_to(path.resolve())
            yield folder
            return
        for pattern in patterns:
            for file in sorted(path.glob(pattern)):
                place = folder / file.relative_to(path)
                place.parent.mkdir(exist_ok=True)
                place.symlink_to(file.resolve())
        for name in (name for name, wanted in settings.items() if wanted and (path / name).is_file()):
            content = clean_file(path / name)
            if name == GENERATION:
                content = {key: value for key, value in content.items() if key not in GENERATION_CODE}
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        yield folder


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and advice off the terminal inside the ``with`` block."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    gguf: Any = modeling_gguf_pytorch_utils  # its bar is tqdm's own, which asks nobody
    verbosity, bars, bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), gguf.tqdm
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        made = TemporaryDirectory(prefix="upcycle-")
    except OSError as error:
        raise EnvironmentFault(
            f"no temporary folder can be made: {error.strerror}", hint="set TMPDIR to a folder that can be written"
        ) from None
    with made as folder:
        yield Path(folder)


def _tokenizer_hint(path: Path) -> str:
    settings = path / TOKENIZER
    named = parse_json(settings.read_bytes(), str(settings)) if settings.is_file() else {}
    if isinstance(named, dict) and "auto_map" in named:
        return "it is a tokenizer of its own code, which is never run: add a whole tokenizer.json, or take one with it"
    return "pip install sentencepiece tiktoken, or add tokenizer.json"


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn every error that transformers raises in the ``with`` block into an error of the checkpoint or of the machine.

    Raises:
        CheckpointError: transformers raised any error other than a lack of memory.
        EnvironmentFault: there is not enough memory.
    """
    try:
        yield
    except (UpcycleError, MemoryError):
        raise
    except Exception as error:  # the stock classes raise errors of many kinds
        if is_out_of_memory(error):
            raise EnvironmentFault(
                f"{what}: it does not fit in memory", hint="use a machine with more memory"
            ) from None
        raise CheckpointError(f"{what}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
