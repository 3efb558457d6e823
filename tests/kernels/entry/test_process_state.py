"""Everything that kernels remember is in one list, and is forgotten by one call."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from expert_cases import make_weights, random_ids

from upcycle.kernels.cpu import recycled_memory
from upcycle.kernels.entry import choose_backend
from upcycle.kernels.entry.operator import experts_output
from upcycle.kernels.entry.process_state import REMEMBERED, forget

FOLDER = Path(__file__).parents[3] / "kernels"
CACHES = {"cache", "lru_cache"}
HOLDERS = {"dict", "list", "set", "defaultdict", "Counter", "OrderedDict", "WeakKeyDictionary", "WeakValueDictionary"}


def remembered(tree: ast.Module, classes: set[str]) -> Iterator[str]:
    """Names at module level that can hold on to something: cached functions, empty containers, objects of own classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                function = decorator.func if isinstance(decorator, ast.Call) else decorator
                if ast.unparse(function).split(".")[-1] in CACHES:
                    yield node.name
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            made = node.value.func if isinstance(node.value, ast.Call) else None
            empty = isinstance(node.value, (ast.List, ast.Dict)) and not ast.unparse(node.value).strip("[]{}")
            if empty or (made is not None and ast.unparse(made).split(".")[-1] in HOLDERS | classes):
                yield ast.unparse(target)


def mutable_classes(tree: ast.Module) -> set[str]:
    """Classes of a module that are neither frozen nor tuples nor protocols."""
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and not any("frozen=True" in ast.unparse(each) for each in node.decorator_list)
        and not {ast.unparse(base) for base in node.bases} & {"NamedTuple", "Protocol", "Exception"}
    }


def test_the_list_is_complete() -> None:
    found = set()
    for path in FOLDER.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = ".".join(("upcycle.kernels", *path.relative_to(FOLDER).with_suffix("").parts))
        found |= {f"{module}:{name}" for name in remembered(tree, mutable_classes(tree))}
    assert found == set(REMEMBERED)


@pytest.mark.parametrize(
    "source",
    [
        "@lru_cache\ndef f(): ...",
        "@functools.lru_cache(maxsize=3)\ndef f(): ...",
        "f = []",
        "f: dict[str, int] = {}",
        "f = WeakKeyDictionary()",
        "class C: ...\nf = C()",
    ],
)
def test_what_remembers_is_found(source: str) -> None:
    tree = ast.parse(source)
    assert list(remembered(tree, mutable_classes(tree))) == ["f"]


@pytest.mark.parametrize("place", [place for place in REMEMBERED if ".gpu." not in place])
def test_everything_in_the_list_can_be_cleared(place: str) -> None:
    module, name = place.split(":")
    held = getattr(import_module(module), name)
    assert hasattr(held, "cache_clear") or hasattr(held, "clear")


def test_forgetting_is_a_new_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "upcycle.kernels")
    forget()
    device = torch.device("cpu")
    for _ in range(2):
        choose_backend.chosen(device, torch.float32)
    assert len(caplog.records) == 1
    x = torch.randn(600, 12)
    expected = experts_output(x, make_weights(dtype=torch.float32, hidden=12, width=300), random_ids(600, 2, 5))
    assert recycled_memory.RECYCLER.waiting
    forget()
    assert not recycled_memory.RECYCLER.waiting
    choose_backend.chosen(device, torch.float32)
    assert len([record for record in caplog.records if "the tensors are there" in record.getMessage()]) == 2
    again = experts_output(x, make_weights(dtype=torch.float32, hidden=12, width=300), random_ids(600, 2, 5))
    assert torch.equal(expected, again)
