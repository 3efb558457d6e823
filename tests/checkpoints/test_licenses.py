"""Whose licence a source is under, and what several have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import upcycle
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.checkpoints.licenses import License, chosen_license, common_license, license_of
from upcycle.errors import UsageError
from upcycle.files import records

MIT = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"README.md": "---\nlicense: Apache-2.0\n---\n# x"}, License("apache-2.0")),
        ({"README.md": "---\r\nlicense: mit\r\n---\r\n"}, License("mit")),
        ({"README.md": "---\nlicense: [mit]\n---\n"}, License("mit")),
        ({"README.md": "---\nlicense: [mit, llama3]\n---\n"}, License("other", "mit and llama3")),
        (
            {"README.md": "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---\n"},
            License("other", "x", "LICENSE"),
        ),
        ({"README.md": "---\nlicense: {a: b}\n---\n", "LICENSE": MIT}, License("mit")),
        ({"README.md": "---\n: :\n- [\n---\n", "LICENCE.txt": MIT}, License("mit")),
        ({"README.md": "license: mit\n"}, None),
        ({"LICENSE": "Apache License\n     Version 2.0, January 2004"}, License("apache-2.0")),
        ({"LICENSE": '"Commons Clause"\nApache License\nVersion 2.0'}, License("other", "see-file", "LICENSE")),
        ({"LICENSE": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"}, License("llama3.1")),
        ({"LICENSE.md": "All rights reserved"}, License("other", "see-file", "LICENSE.md")),
    ],
)
def test_where_it_is_found(dense: Path, files: dict[str, str], found: License | None) -> None:
    for name, text in files.items():
        (dense / name).write_text(text, newline="")
    assert license_of(DenseCheckpoint.open(str(dense))) == found


def test_it_is_recorded_with_the_conversion(dense: Path, tmp_path: Path) -> None:
    (dense / "README.md").write_text("---\nlicense: mit\n---\n")
    upcycle.convert(str(dense), tmp_path / "out", experts=2, verification={"enabled": False})
    assert records.read_record(tmp_path / "out")["source"]["license"] == {"id": "mit", "name": None, "link": None}


def test_of_every_source_of_a_mix(branches: Callable[..., list[Path]], tmp_path: Path) -> None:
    sources = ",".join(map(str, branches(2)))
    keys = {"method": "branch_train_mix", "sources": sources, "verification": {"enabled": False}}
    upcycle.convert(None, tmp_path / "out", **keys)
    assert [source["license"] for source in records.read_record(tmp_path / "out")["sources"]] == [None, None]


def test_what_they_have_in_common() -> None:
    mit, other = License("mit"), License("other", "x")
    assert common_license({"a": mit, "b": License("mit")}) == mit
    assert common_license({"a": None, "b": None}) is None
    for second in (None, other, License("apache-2.0")):
        with pytest.raises(UsageError, match="licences differ"):
            common_license({"a": mit, "b": second})
    with pytest.raises(UsageError, match=r"a: other \(x\), b: other \(y\)"):
        common_license({"a": other, "b": License("other", "y")})


def test_only_licences_that_the_hub_knows_can_be_chosen() -> None:
    assert chosen_license("Apache-2.0 ") == License("apache-2.0")
    assert chosen_license(None) is None
    assert chosen_license("other", "Mine", "https://a.example/terms") == License(
        "other", "Mine", "https://a.example/terms"
    )
    assert chosen_license("other", "Mine", "LICENSE") == License("other", "Mine", "LICENSE")
    for given, words in {
        ("apache2",): "not a licence that the hub knows",
        ("",): "not a licence that the hub knows",
        ("mit\n- x: y",): "not a licence that the hub knows",
        ("other",): "needs a name and a link",
        ("other", "Mine"): "needs a name and a link",
        ("other", " ", "LICENSE"): "needs a name and a link",
        ("other", "Mine", "javascript:alert(1)"): "is not an address",
        ("other", "Mine", "../../terms"): "is not an address",
        ("mit", "Mine", "LICENSE"): "takes no name and no link",
        (None, "Mine"): "--license-name and --license-link need --license other",
    }.items():
        with pytest.raises(UsageError, match=words):
            chosen_license(*given)
    with pytest.raises(UsageError) as refused:
        chosen_license("apache-2")
    assert "did you mean apache-2.0" in (refused.value.hint or "")


def test_what_the_hub_would_refuse_of_a_sources_licence_becomes_other() -> None:
    found = License.of_card({"license": "My-Terms", "license_link": "javascript:alert(1)"})
    assert found == License("other", "My-Terms")
    assert License.of({"id": "tongyi-qianwen", "name": None, "link": "https://a.example/x"}) == License(
        "other", "tongyi-qianwen", "https://a.example/x"
    )
    for hostile in ({"id": 7}, {"id": "mit", "more": 1}, [], "mit"):
        assert License.of(hostile) in (None, License("mit"))  # type: ignore[arg-type]
