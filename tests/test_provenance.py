"""A verification is about the files that were verified, and about no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import upcycle
from upcycle import provenance
from upcycle.tensor_files import INDEX, SINGLE


def test_a_verification_is_about_one_record(tmp_path: Path) -> None:
    (tmp_path / "upcycle.json").write_text("{}")
    assert provenance.read_verification(tmp_path) is None
    provenance.write_verification(tmp_path, {"verdict": "exact"})
    assert provenance.read_verification(tmp_path) == {"verdict": "exact"}
    (tmp_path / "upcycle.json").write_text("{} ")
    assert provenance.read_verification(tmp_path) is None


def test_verify_keeps_what_it_found(pico: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    upcycle.convert(str(pico("llama")), out, experts=2, verification={"enabled": False})
    assert provenance.read_verification(out) is None
    result = upcycle.verify(out, tokens=64)
    assert provenance.read_verification(out) == json.loads(json.dumps(result.as_dict()))


def test_a_single_weight_file_is_told_from_the_blueprint(pico: Callable[[str], Path], tmp_path: Path) -> None:
    """Loaders that take every ``*.safetensors`` of a folder read only what the index names."""
    out = tmp_path / "out"
    upcycle.convert(str(pico("llama")), out, experts=2, verification={"enabled": False})
    assert {path.name for path in out.glob("*.safetensors")} == {SINGLE, "blueprint.safetensors"}
    assert set(json.loads((out / INDEX).read_text())["weight_map"].values()) == {SINGLE}
