"""What stands around the code: workflow, container, citation and issue templates agree with it."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import yaml

import upcycle

ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_workflow_runs_targets_that_there_are() -> None:
    jobs = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    wanted = {target for command in commands for target in command.removeprefix("make ").split()}
    assert wanted == {"lint", "types", "test", "docs", "dist"}
    targets = re.findall(r"(?m)^([a-z]+):", read("Makefile"))
    assert wanted <= set(targets)
    oldest = re.findall(r"python_requires = >=(\S+)", read("setup.cfg"))[0]
    assert jobs["test"]["strategy"]["matrix"]["python"][0] == oldest


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == upcycle.__version__
    assert citation["license"] == re.findall(r"(?m)^license = (\S+)", read("setup.cfg"))[0]


def test_every_issue_template_asks_for_the_environment() -> None:
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(templates) == 2
    for path in templates:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))["body"]
        assert any("upcycle env" in field["attributes"]["label"] for field in body), path.name


def test_containers_install_what_there_is() -> None:
    extras = re.findall(r"(?m)^(\w+) =$", read("setup.cfg").partition("[options.extras_require]")[2])
    assert re.findall(r"ARG EXTRAS=(\w+)", read("Dockerfile"))[0] in extras
    setup = json.loads(read(".devcontainer/devcontainer.json"))
    assert setup["postCreateCommand"].removeprefix("make ") == ".venv/.ready"


def test_the_page_of_dependencies_is_what_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")

    def names(listed: str) -> set[str]:
        return {re.split(r"[<>=;\[ ]", line)[0] for line in listed.split("\n") if line} - {"upcycle"}

    _, always, extras = re.split(r"(?m)^## (?:Always installed|Extras)$", read("docs/develop/dependencies.md"))
    extras, by_hand = extras.split("## By hand")
    assert set(re.findall(r"(?m)^\| `([\w-]+)` \|", always)) == names(setup["options"]["install_requires"])
    told = {
        name: set(re.findall(r"`(\w+)`", where))
        for name, where in re.findall(r"(?m)^\| `([\w-]+)` \| ([^|]+) \|", extras)
    }
    wanted: dict[str, set[str]] = {}
    for extra, listed in setup["options.extras_require"].items():
        for name in names(listed):
            wanted.setdefault(name, set()).add(extra)
    assert told == wanted
    for path in re.findall(r"\(`([\w/.]+)`\)", by_hand):
        assert (ROOT / path).exists(), path
