"""The pages for developers: their examples run as they stand, and every path, name and command in them exists."""

from __future__ import annotations

import ast
import importlib.util
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest
import torch
from pico_models import PICO

import upcycle
from upcycle.cli.main import cli
from upcycle.registry import KINDS, load

ROOT = Path(__file__).parents[2]
DEVELOP = ROOT / "docs" / "develop"
EXAMPLES = {"add_a_method": "method", "add_a_family": "family", "add_a_target": "target", "add_a_loss": "loss"}
PAGES = (*EXAMPLES, "change_a_kernel")
# What a reader makes. Everything else that a page names must be there.
MADE = {
    "add_a_method": {"splitters/by_norm.py", "tests/splitters/test_by_norm.py"},
    "add_a_family": {"upcycle/architectures/dense/llama_like/iquestcoder.py"},
    "add_a_target": {"upcycle/architectures/moe/sigmoid/hy_v3.py"},
    "add_a_loss": {"trainers/losses/local_entropy.py", "tests/trainers/losses/test_local_entropy.py"},
    "change_a_kernel": {"try_kernel.py"},
}
FILE = re.compile(r"(?:[\w.]+/)*[\w.]+\.(?:py|md|cpp|json)|(?:[\w.]+/)+\w*")


def text(page: str) -> str:
    return (DEVELOP / f"{page}.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text(page), re.DOTALL | re.MULTILINE)
    return [dedent(block) for block in found]


def spans(page: str) -> list[str]:
    """What stands in backticks, outside blocks; one that is broken over two lines is one."""
    prose = re.sub(r"^ *```\w*\n.*?^ *```$", "", text(page), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def is_there(name: str) -> bool:
    """A path from the root; a bare name stands for a file that the page has just given the folder of."""
    return (ROOT / name).exists() or ("/" not in name and any(ROOT.glob(f"[ustk]*/**/{name}")))


def commands(page: str) -> list[list[str]]:
    """Every ``upcycle`` command, in blocks and in prose."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in [*lines, *spans(page)] if line.startswith("upcycle ")]


@dataclass(frozen=True)
class Registration:
    """The line that a page tells to add to the registry."""

    name: str
    module: str
    attribute: str


def registration(page: str) -> Registration:
    (found,) = re.findall(r'`"(\w+)": "([\w.]+):(\w+)",`', text(page))
    return Registration(*found)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Do what a page says: its class is registered, as long as the test runs. Returns the name."""

    def add(page: str) -> str:
        line, (source, *_) = registration(page), blocks(page, "python")
        module = ModuleType(line.module)
        monkeypatch.setitem(sys.modules, line.module, module)
        exec(compile(source, f"{page}.md", "exec", dont_inherit=True), vars(module))
        assert line.name not in KINDS[EXAMPLES[page]]
        monkeypatch.setitem(KINDS[EXAMPLES[page]], line.name, f"{line.module}:{line.attribute}")
        assert load(EXAMPLES[page], line.name).name == line.name
        return line.name

    return add


def contract(name: str) -> Any:
    """The module of one file of contract tests, read now, so that it sees what is registered."""
    path = ROOT / "tests" / "contracts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"develop_pages_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short(page: str) -> None:
    lines = text(page).splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str) -> None:
    words = {word.strip("`,;()") for span in spans(page) for word in span.split()}
    paths = {word for word in words if FILE.fullmatch(word)} - {"config.json", "report.md", ".venv/bin/activate"}
    assert len(paths) > 5
    assert MADE[page] <= paths
    assert not [path for path in paths - MADE[page] if not is_there(path)]
    assert not [path for path in MADE[page] if is_there(path)]


@pytest.mark.parametrize("page", PAGES)
def test_every_name_is_in_the_file_that_is_named_for_it(page: str) -> None:
    found = re.findall(r"`([\w.]+)`\s+(?:of|in)\s+`([\w/]+\.\w+)`", text(page))
    assert found
    for name, path in found:
        if page in EXAMPLES and name == registration(page).name:  # to be written there
            continue
        assert name.rpartition(".")[2] in (ROOT / path).read_text(encoding="utf-8"), f"{name} is not in {path}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page: str) -> None:
    found = commands(page)
    assert found
    for verb, *arguments in found:
        command = cli.get_command(None, verb)  # type: ignore[arg-type]
        assert command is not None, verb
        command.make_context(verb, arguments)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for span in spans(page):
        if span.startswith("make "):
            assert span.split()[1] in targets, span


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_registered_class_is_the_example(page: str) -> None:
    line, source = registration(page), blocks(page, "python")[0]
    assert line.attribute in {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    path = line.module.replace(".", "/") + ".py"
    assert {path, path.removeprefix("upcycle/")} & MADE[page]


def test_the_method(register: Callable[[str], str], pico: Callable[[str], Path], tmp_path: Path) -> None:
    name = register("add_a_method")
    promises = contract("test_methods")
    promises.test_all_experts_at_equal_weight_are_the_dense_ffn(name)
    promises.test_neurons_are_used_as_declared(name)
    promises.test_padding_uses_every_neuron_once_and_zeros_for_the_rest(name, 1)
    promises.test_same_seed_same_blueprint_and_inputs_untouched(name)
    keys = {"method": name, "experts": 8, "top_k": 8, "tokenizer": "none", "verification": {"tokens": 64}}
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", **keys)
    assert result.verification is not None
    assert result.verification.verdict == "exact"


def test_the_family(
    register: Callable[[str], str], pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = register("add_a_family")
    assert f'"{name}": ("{name}", {{}}),' in spans("add_a_family")
    monkeypatch.setitem(PICO, name, (name, {}))
    promises = contract("test_families")
    promises.test_defaults_are_those_of_the_stock_class(name)
    promises.test_tensors_are_those_of_the_stock_class(name)
    promises.test_every_key_of_the_stock_class_is_read_or_known_to_be_harmless(name)
    cells = contract("test_targets")
    assert {target for family, target in cells.FIRST if family == name} == set(load("family", name).targets)
    cells.test_stock_transformers_gives_the_dense_logits(name, "mixtral", cells.UPCYCLED, pico, tmp_path)


def test_the_target(
    register: Callable[[str], str], pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, family = register("add_a_target"), load("family", "qwen3")
    monkeypatch.setattr(family, "targets", (*family.targets, name))
    promises = contract("test_targets")
    assert ("qwen3-bias", name) in promises.cells()
    promises.test_stock_transformers_gives_the_dense_logits("qwen3", name, promises.UPCYCLED, pico, tmp_path / "one")
    (trap,) = re.findall(rf'`"{name}": (\{{.*?\}}),`', text("add_a_target"))
    promises.test_a_wrong_key_is_found_by_verify("qwen3", name, ast.literal_eval(trap), pico, tmp_path)


def test_the_loss(register: Callable[[str], str]) -> None:
    name = register("add_a_loss")
    promises = contract("test_losses")
    z = torch.randn(promises.T, promises.E, dtype=torch.float64).requires_grad_()
    rows = [[math.exp(value) for value in row] for row in z.tolist()]
    certain = [[value / sum(row) for value in row] for row in rows]
    expected = -sum(p * math.log(p) for row in certain for p in row) / len(certain)
    loss = promises.made(name)
    rule = promises.RoutingRule("softmax", promises.E, promises.K)
    record = promises.RouterRecord(0, z.detach(), *rule.route(z.detach()), rule)
    assert loss([record]).item() == pytest.approx(expected, rel=1e-13)
    promises.test_names_papers_and_help_texts(name)
    promises.test_finite_and_differentiable(name, "softmax", z)
    promises.test_masked_tokens_might_as_well_not_be_there(name, z)
    promises.test_two_unequal_ranks_compute_the_loss_of_the_whole(name, z)
    promises.test_half_precision_logits_are_summed_in_single(name, z)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernel(tmp_path: Path) -> None:
    (source,) = blocks("change_a_kernel", "python")
    (tmp_path / "try_kernel.py").write_text(source, encoding="utf-8")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    done = subprocess.run(
        [sys.executable, "-P", str(tmp_path / "try_kernel.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = [float(each) for each in re.findall(r"differs by (\S+),", done.stdout)]
    assert len(errors) == len(("output", "x", "gate", "up", "down", "scores"))
    assert max(errors) < 1e-6
