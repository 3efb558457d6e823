"""What ``import upcycle`` offers: every function is found where the package says, and none is loaded before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import upcycle
from upcycle.errors import UsageError


def type_only_imports() -> dict[str, str]:
    """Module by name, as type checkers see them."""
    tree = ast.parse(Path(upcycle.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {
        name.name: (node.module or "").removeprefix("upcycle.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }


@pytest.mark.parametrize("name", upcycle.__all__)
def test_a_public_function_is_there(name: str) -> None:
    function = getattr(upcycle, name)
    assert callable(function)
    assert function.__doc__


def test_type_checkers_and_the_interpreter_look_in_the_same_modules() -> None:
    assert type_only_imports() == upcycle._FUNCTIONS
    assert sorted(upcycle._FUNCTIONS) == sorted(upcycle.__all__)


def test_other_names_are_errors() -> None:
    with pytest.raises(AttributeError, match="module 'upcycle' has no attribute 'concert'"):
        _ = upcycle.concert


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, upcycle\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_register_kernels_tells_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    names = ("upcycle", "upcycle_lean")
    for name in names:
        monkeypatch.delitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, raising=False)
    upcycle.register_kernels()
    assert set(names) <= set(ALL_EXPERTS_FUNCTIONS.valid_keys())


def test_tab_offers_the_functions_and_errors_carry_their_hints() -> None:
    assert set(upcycle.__all__) <= set(dir(upcycle))
    with pytest.raises(UsageError) as raised:
        upcycle.plan("demo", method="randomsplit")
    assert str(raised.value).startswith("unknown method 'randomsplit'\n\nhint: did you mean 'random_split'?")
    assert str(UsageError("no hint")) == "no hint"


def test_type_checkers_read_the_types() -> None:
    assert (Path(upcycle.__file__).parent / "py.typed").is_file()
