"""LoRA folders as sources of a mix: the same bytes as the merged folders give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lora_folders import write_lora

import upcycle
from upcycle.conversion.merge_adapter import merge
from upcycle.conversion.verify import verify
from upcycle.errors import UsageError
from upcycle.files.locate_adapted import model_and_adapter

Maker = Callable[[str], Path]
FFN = ["q_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(pico: Maker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of one model, and the models that they are when merged."""
    root, base = tmp_path_factory.mktemp("adapters"), pico("llama")
    made = {"base": base}
    for seed, name in enumerate(("math", "code"), 1):
        made[name] = write_lora(base, root / f"{name}-lora", seed, target_modules=FFN)
        made[f"{name} merged"] = Path(merge(made[name], root / name, verify=False).out)
    return made


def mixed(out: Path, sources: list[str], **keys: Any) -> upcycle.Conversion:
    recipe = {"method": "branch_train_mix", "verification": {"tokens": 64}, **keys}
    return upcycle.convert(None, out, sources=sources, **recipe)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("plus", [False, True])
def test_a_mix_of_adapters_is_that_of_the_merged_models(plus: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    names = ("math", "code")
    before = f"{folders['base']}+" if plus else ""
    one = mixed(tmp_path / "one", [f"{before}{folders[name]}" for name in names])
    two = mixed(tmp_path / "two", [str(folders[f"{name} merged"]) for name in names])
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert one.verification is not None
    assert two.verification is not None
    # Layers are compared with the sources' own FFNs, which are read another way.
    assert one.verification.layer_errors == pytest.approx(two.verification.layer_errors, rel=1e-3, abs=1e-6)
    assert one.verification.loss_dense == pytest.approx(two.verification.loss_dense, rel=1e-5)


@pytest.mark.long
def test_an_adapter_beside_its_base_and_the_verification_later(folders: dict[str, Path], tmp_path: Path) -> None:
    one = mixed(tmp_path / "one", [str(folders["base"]), str(folders["math"])], parameters={"rest": "base"})
    two = mixed(tmp_path / "two", [str(folders["base"]), str(folders["math merged"])], parameters={"rest": "base"})
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert one.verification
    again = verify(tmp_path / "one", tokens=64)
    assert again.layer_errors == one.verification.layer_errors
    assert two.verification


@pytest.mark.long
def test_a_changed_adapter_is_another_source(folders: dict[str, Path], pico: Maker, tmp_path: Path) -> None:
    mixed(tmp_path / "out", [str(folders["math"]), str(folders["code"])])
    adapter = write_lora(pico("llama"), tmp_path / "math-lora", 7, target_modules=FFN)
    other = mixed(tmp_path / "other", [str(adapter), str(folders["code"])])
    assert other.verification
    assert bytes_of(tmp_path / "out") != bytes_of(tmp_path / "other")


def test_what_is_converted_alone_must_be_whole(folders: dict[str, Path], tmp_path: Path) -> None:
    for source in (str(folders["math"]), f"{folders['base']}+{folders['math']}"):
        with pytest.raises(UsageError, match="is a LoRA adapter") as caught:
            upcycle.convert(source, tmp_path / "out", experts=4)
        assert "upcycle merge" in str(caught.value.hint)
    with pytest.raises(UsageError, match="several adapters"):
        model_and_adapter("a+b+c")
    with pytest.raises(UsageError, match="is no LoRA adapter"):
        mixed(tmp_path / "out", [f"{folders['base']}+{folders['base']}", str(folders["base"])])
