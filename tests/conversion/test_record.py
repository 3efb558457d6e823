"""A verification is about the files that were verified, and about no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import upcycle
from upcycle.errors import CheckpointError
from upcycle.files import records
from upcycle.files.formats.tensor_files import INDEX, SINGLE


def test_a_verification_belongs_to_one_record(tmp_path: Path) -> None:
    (tmp_path / "upcycle.json").write_text("{}")
    assert records.read_verification(tmp_path) is None
    records.write_verification(tmp_path, {"verdict": "exact"})
    assert records.read_verification(tmp_path) == {"verdict": "exact"}
    (tmp_path / "upcycle.json").write_text("{} ")
    assert records.read_verification(tmp_path) is None


def test_verify_saves_its_result(pico: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    upcycle.convert(str(pico("llama")), out, experts=2, verification={"enabled": False})
    assert records.read_verification(out) is None
    result = upcycle.verify(out, tokens=64)
    assert records.read_verification(out) == json.loads(json.dumps(result.as_dict()))


def test_a_single_weight_file_is_told_from_the_blueprint(pico: Callable[[str], Path], tmp_path: Path) -> None:
    """Loaders that take every ``*.safetensors`` of a folder read only what the index names."""
    out = tmp_path / "out"
    upcycle.convert(str(pico("llama")), out, experts=2, verification={"enabled": False})
    assert {path.name for path in out.glob("*.safetensors")} == {SINGLE, "blueprint.safetensors"}
    assert set(json.loads((out / INDEX).read_text())["weight_map"].values()) == {SINGLE}


@pytest.fixture(scope="module")
def converted(pico: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    upcycle.convert(str(pico("llama")), out, experts=2, verification={"enabled": False})
    return out


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("files", 5, "'files' must be a mapping of file names"),
        ("files", {"a": 1}, "'files' must be a mapping of file names"),
        ("source", "me", "'source' must be a mapping"),
        ("source", {"name": "x", "family": "llama"}, "key 'source.fingerprint' is missing"),
        ("sources", [1], "'sources' must be a list of mappings"),
        ("plan", [], "'plan' must be a mapping"),
        ("versions", None, "'versions' must be a mapping"),
        ("training", "yes", "'training' must be a mapping or null"),
        ("method", {"name": "x"}, "key 'method.title' is missing"),
    ],
)
def test_a_record_that_no_conversion_wrote_is_refused_by_its_key(
    key: str, value: object, message: str, converted: Path, tmp_path: Path
) -> None:
    record = records.read_record(converted)
    (tmp_path / records.FILE).write_text(json.dumps({**record, key: value}))
    with pytest.raises(CheckpointError, match=message) as caught:
        records.read_record(tmp_path)
    assert str(tmp_path / records.FILE) in caught.value.message
