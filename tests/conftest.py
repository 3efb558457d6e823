"""Pico models: tiny random checkpoints of every family, made by stock transformers, with the demo's real tokenizer."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# One thread for every worker and its children: they share the cores, and threads that wait for each other spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from any_moe import STORED_TRANSPOSED, auto_of, moe_settings, transpose_experts
from pico_models import COMMON, PICO, PICO_MOE
from pico_towers import make_tower

from upcycle.files.locate import DEMO_FOLDER


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Carry out ``one_in(count)``: of a test's cases the first, and then one in so many, are quick; of the others, those of
    all tests together, one in sixty is ``long``, and the rest is ``slow``.
    """
    cases: Counter[str] = Counter()
    left = 0
    for item in items:
        marker = item.get_closest_marker("one_in")
        if marker is not None:
            test = item.nodeid.split("[")[0]
            if cases[test] % marker.args[0]:
                item.add_marker(pytest.mark.slow if left % 60 else pytest.mark.long)
                left += 1
            cases[test] += 1


def make_dense(folder: Path, model_type: str, dtype: str = "float32", **changes: Any) -> Path:
    """Save a dense model whose every weight is random, norms included, large enough that an error shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**COMMON, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5 if "norm" in name else torch.randn_like(parameter) * 0.2)
            if name.endswith("A_log"):  # the rate at which a linear attention forgets: large ones leave nothing to see
                parameter.sub_(2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / "model" / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def dense_maker() -> Callable[..., Path]:
    """:func:`make_dense`, for models that are no pico ones."""
    return make_dense


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``pico("llama")`` is a folder with that model, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            model_type, changes = PICO[name]
            made[name] = make_dense(tmp_path_factory.mktemp(name), model_type, **changes)
        return made[name]

    return get


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tower("llava", "llama")`` is a folder with that model of parts, made once; further keys are its text model's."""
    made: dict[str, Path] = {}

    def get(wrapper: str, text: str, **changes: Any) -> Path:
        key = f"{wrapper}-{text}-{sorted(changes.items())}"
        if key not in made:
            made[key] = make_tower(tmp_path_factory.mktemp(f"{wrapper}-{text}"), wrapper, text, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def pico_moe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``pico_moe("mixtral")`` is a folder with that stock MoE, one tensor per expert; ``fused=True``: as kept in memory."""
    made: dict[tuple[str, bool], Path] = {}

    def get(name: str, fused: bool = False) -> Path:
        if (name, fused) not in made:
            made[name, fused] = make_moe(tmp_path_factory.mktemp(name), *PICO_MOE[name], fused=fused)
        return made[name, fused]

    return get


@pytest.fixture(scope="session")
def moe_maker() -> Callable[..., Path]:
    """:func:`make_moe`, for models that are no pico ones."""
    return make_moe


def make_moe(folder: Path, model_type: str, changes: dict[str, Any], fused: bool = False) -> Path:
    """Save a MoE whose every weight is random, norms and the biases on the choice of experts included."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    model = auto_of(model_type).from_config(AutoConfig.for_model(model_type, **moe_settings(model_type, changes)))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            near_one = "norm" in name and "bias" not in name
            tensor.copy_(torch.rand_like(tensor) + 0.5 if near_one else torch.randn_like(tensor) * 0.2)
            if name.endswith("A_log"):
                tensor.sub_(2)
    model.save_pretrained(folder, save_original_format=not fused)
    if model_type in STORED_TRANSPOSED and not fused:
        transpose_experts(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / "model" / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def branches(pico: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """``branches(3)``: as many "fine-tunes" of the pico Llama, every weight of which is another. ``branches(2, 0.0)``: copies."""
    made: dict[tuple[str, int, float], Path] = {}

    def get(count: int, change: float = 0.3, name: str = "llama") -> list[Path]:
        for i in range(count):
            if (name, i, change) not in made:
                folder = tmp_path_factory.mktemp(f"{name}-branch-{i}") / "model"
                made[name, i, change] = perturbed(pico(name), folder, i + 1, change)
        return [made[name, i, change] for i in range(count)]

    return get


@pytest.fixture(scope="session")
def zoo(pico: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """``zoo("abaa")``: "fine-tunes" of the pico Llama of the families a and b. A matrix's difference from its ancestor's is as
    long as that is and the same in a family, and each has a fifth of that of its own; vectors differ by their own alone.
    """
    from safetensors.torch import load_file, save_file

    made: dict[tuple[str, int], Path] = {}

    def get(families: str) -> list[Path]:
        places = [(family, families[:i].count(family)) for i, family in enumerate(families)]
        for family, number in places:
            if (family, number) in made:
                continue
            folder = tmp_path_factory.mktemp(f"zoo-{family}{number}") / "model"
            shutil.copytree(pico("llama"), folder)
            shared, own = (torch.Generator().manual_seed(seed) for seed in (ord(family), 1000 + ord(family) + number))
            tensors = load_file(folder / "model.safetensors")
            for name, tensor in tensors.items():
                common = torch.randn(tensor.shape, generator=shared) if tensor.dim() > 1 else torch.zeros_like(tensor)
                tensors[name] = tensor + tensor.std() * (common + 0.2 * torch.randn(tensor.shape, generator=own))
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            made[family, number] = folder
        return [made[place] for place in places]

    return get


def perturbed(source: Path, folder: Path, seed: int, change: float) -> Path:
    """A copy whose every number is multiplied by its own ``1 + change * N(0, 1)``."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    rng = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        factor = 1 + change * torch.randn(tensor.shape, generator=rng)
        tensors[name] = (tensor.float() * factor).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A hub on the loopback whose user "alice" is logged in; waiting costs no time, and ``hub.slept`` says how long it was."""
    from hub_server import TOKEN, HubServer
    from huggingface_hub import constants

    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer().running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)  # whatever the client asks, it asks here
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("time.sleep", server.slept.append)
        yield server


@pytest.fixture(scope="session")
def converted(pico: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``converted("moe", experts=2)`` is a pico Llama converted and verified, made once; not to be changed."""
    made: dict[str, Path] = {}

    def get(name: str, **keys: Any) -> Path:
        key = f"{name} {sorted(keys.items())}"
        if key not in made:
            import upcycle

            made[key] = tmp_path_factory.mktemp("converted") / name
            upcycle.convert(str(pico("llama")), made[key], **{"verification": {"tokens": 64}, **keys})
        return made[key]

    return get


@pytest.fixture
def out(converted: Callable[..., Path], tmp_path: Path) -> Path:
    """A private copy of a converted model, in two weight files and more."""
    return Path(shutil.copytree(converted("moe", experts=2, max_shard_size="400KB"), tmp_path / "moe"))


@pytest.fixture
def dense(pico: Callable[[str], Path], tmp_path: Path) -> Path:
    """A private copy of the pico Llama, to be damaged."""
    return Path(shutil.copytree(pico("llama"), tmp_path / "dense"))
