"""What must not stand in a kernel or in what starts it, found in the source; every rule is shown to find its fault."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[4] / "kernels" / "gpu" / "triton_code"
KERNELS = sorted(FOLDER.glob("*.py"))
GPU_PATH = [*KERNELS, *(FOLDER.parent / f"{name}.py" for name in ("gpu_pass", "launch", "launch_log", "row_tiles"))]
WAITS = {"item", "cpu", "tolist", "numpy", "nonzero", "unique", "masked_select", "synchronize", "is_nonzero"}
WIDE = {"hidden", "top_k", "expert", "first"}  # factors of addresses, besides strides


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
            yield node


def unguarded_loads(tree: ast.AST) -> list[int]:
    """A masked load without ``other`` is 0 in the interpreter, and anything on a GPU."""
    found = []
    for call in calls(tree, "load"):
        names = {keyword.arg for keyword in call.keywords}
        if "mask" in names and "other" not in names:
            found.append(call.lineno)
    return found


def jitted(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list):
            yield node


def factors(node: ast.AST) -> Iterator[str]:
    """Names in an expression, not those that a function is called with."""
    if isinstance(node, ast.Name):
        yield node.id
    for child in ast.iter_child_nodes(node.func if isinstance(node, ast.Call) else node):
        yield from factors(child)


def narrow_products(tree: ast.Module) -> list[int]:
    """In kernels, products with strides and sizes of addresses are made by ``offset``, in 64 bits."""
    found = []
    for function in jitted(tree):
        if function.name == "offset":
            continue
        for node in ast.walk(function):
            if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Mult):
                sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
                names = {name for side in sides for name in factors(side)}
                if any(name.startswith("stride") for name in names) or names & WIDE:
                    found.append(node.lineno)
    return found


def waits(tree: ast.AST) -> list[int]:
    """Whatever makes the host wait for the device."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITS
    ]


def atomics(tree: ast.AST) -> list[int]:
    """Sums in whatever order programs come."""
    return [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("atomic")
    ]


RULES: list[tuple[Callable[[ast.Module], list[int]], str]] = [
    (unguarded_loads, "def f():\n    tl.load(p, mask=m)"),
    (narrow_products, "@triton.jit\ndef f(row, stride_x):\n    return p + row * stride_x"),
    (narrow_products, "@triton.jit(do_not_specialize=[])\ndef f(e, hidden):\n    return p + (e + 1) * hidden"),
    (waits, "def f(x):\n    return x.sum().item()"),
    (waits, "torch.cuda.synchronize()"),
    (atomics, "tl.atomic_add(p, v)"),
]


@pytest.mark.parametrize(("rule", "fault"), RULES)
def test_the_rules_find_faults(rule: Callable[[ast.Module], list[int]], fault: str) -> None:
    assert rule(ast.parse(fault))


@pytest.mark.parametrize("path", GPU_PATH, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", list(dict.fromkeys(rule for rule, _ in RULES)))
def test_kernels(rule: Callable[[ast.Module], list[int]], path: Path) -> None:
    assert rule(ast.parse(path.read_text())) == []


def test_there_are_kernels() -> None:
    names = {function.name for path in KERNELS for function in jitted(ast.parse(path.read_text()))}
    assert {"up_kernel", "gemm_kernel", "combine_kernel", "activation_backward_kernel", "xty_kernel"} <= names
