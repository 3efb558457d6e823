"""The text recipes as published, each from the conversion that it prescribes, on the demo model: a few minutes on one core.

Texts that the demo model has not seen: SciPy's docstrings (prose), scikit-learn's code without its docstrings, and pairs of a
Python function's head and the first paragraph of its docstring. Losses are nats per token of documents that nothing was trained on.

- ``rounds``: ``upcycle grow`` in two rounds, branches by posteriors, then a MoE of the last forest, tuned on both domains; beside
  the seed trained on both domains with the tokens of all branches.
- ``routers``: that forest and its seed as a MoE of three experts, tuned with each of BTX's routers.
- ``flan``: the recipes ``flan_moe``, beside routers that train, too, and beside frozen experts.
- ``skywork``: the recipes ``skywork_moe``, beside the same copies with plain top-2 and Switch's balance loss.

    python -P tests/benchmarks/training/text_stages.py --out docs/measured/text_stages.md
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import yaml
from domains import parted

import upcycle
from upcycle.branching.grow import grow
from upcycle.recipe.shipped_recipes import shipped
from upcycle.trainers.run.step_reports import read_log

DOMAINS = {"prose": "science", "code": "library"}
LENGTH, BATCH = 128, 4
RATE = 1e-4
QUIET: dict[str, Any] = {"verification": {"enabled": False}}
Row = list[str]


def texts(folder: Path) -> dict[str, dict[str, Any]]:
    """The domains of a recipe: files to train on and files to validate on, JSON lines of whole documents."""
    found: dict[str, dict[str, Any]] = {}
    for name, kind in DOMAINS.items():
        paths = [folder / f"{name}.{part}.jsonl" for part in ("train", "held-out")]
        if not paths[1].exists():
            for path, documents in zip(paths, parted(kind), strict=True):
                path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        found[name] = {"text": str(paths[0]), "validation": [str(paths[1])]}
    return found


def heads() -> Iterator[tuple[str, str, str]]:
    """Name, head and first paragraph of the docstring of every documented function of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
            if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)):
                head = f"def {node.name}({ast.unparse(node.args)}):"
                yield f"{path.name}/{node.name}", head, " ".join(said.split("\n\n")[0].split())


def pairs(folder: Path) -> dict[str, dict[str, Any]]:
    """The domain of an instruction stage: heads of functions are prompts, and what they do are responses; one in six is held out."""
    parts: tuple[list[str], list[str]] = ([], [])
    for name, head, said in heads():
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 6 == 0
        parts[held_out].append(json.dumps({"prompt": head, "response": said}) + "\n")
    paths = [folder / f"pairs.{part}.jsonl" for part in ("train", "held-out")]
    for path, lines in zip(paths, parts, strict=True):
        path.write_text("".join(lines), encoding="utf-8")
    common = {"prompt": "prompt", "response": "response", "joined": "plain"}
    return {"pairs": {"text": str(paths[0]), "validation": [str(paths[1])], **common}}


class Bench:
    """Runs of one size, in one folder. A run that is there already is not repeated."""

    def __init__(self, work: Path, steps: int) -> None:
        self.work, self.steps = work, steps
        self.data = {"cache": str(work / "tokens"), "validation": {"tokens": 512, "batch": 8}, "shuffle": "1MB"}
        self.size = {
            "length": LENGTH,
            "global_batch": BATCH,
            "micro_batch": BATCH,
            "log": {"peak_tflops": 0.05, "validation": 10**6},
        }

    def stage(self, **changes: Any) -> dict[str, Any]:
        """A stage of so many steps."""
        schedule = {"kind": "cosine", "warmup": 1}
        return {"steps": self.steps, "learning_rate": RATE, "schedule": schedule, **changes}

    def trained(
        self, name: str, model: Path | str, domains: Mapping[str, Any], stage: dict[str, Any]
    ) -> dict[str, float]:
        """Train, and return the held-out losses before and at the end: ``before/NAME`` and ``NAME``."""
        folder = self.work / name
        content = {**self.size, "model": str(model), "output": str(folder), "stages": [stage]}
        content["data"] = {**self.data, "domains": domains}
        if not (folder / "model" / "config.json").exists():
            print(name, file=sys.stderr)
            upcycle.train(content, lambda line: print(line, file=sys.stderr))
        lines = [line for line in read_log(folder / "log.jsonl") if line["kind"] == "validation"]
        first, last = ({name: line[f"validation/{name}"] for name in domains} for line in (lines[0], lines[-1]))
        return {**{f"before/{name}": nats for name, nats in first.items()}, **last}

    def converted(self, name: str, **keys: Any) -> Path:
        """Convert unless it is there."""
        out = self.work / name
        if not (out / "config.json").exists():
            upcycle.convert(keys.pop("source", "demo"), out, **keys, **QUIET)
        return out


def numbers(losses: Mapping[str, float], names: list[str]) -> Row:
    """Cells."""
    return [f"{losses[name]:.3f}" if name in losses else "" for name in names]


def rounds(bench: Bench) -> tuple[list[Row], dict[str, Path]]:
    """The table of the rounds, and the last forest's models."""
    domains = texts(bench.work)
    training = {**bench.size, "stages": [bench.stage()], "data": bench.data}
    recipe = {
        "source": "demo",
        "output": str(bench.work / "forest"),
        "domains": domains,
        "rounds": 2,
        "branch": "posteriors",
        "sample": 512,
        "training": training,
        "merge": QUIET,
        "last": {"method": "branch_train_mix", "router": "domain_ridge", "calibration": {"tokens": 1024}, **QUIET},
        "tuning": {**training, "stages": [bench.stage(losses={"switch_balance": {"fraction": "weights"}})]},
    }
    result = grow(recipe, say=lambda line: print(line, file=sys.stderr))
    rows = [["the seed (demo model)", *numbers(result.seed or {}, list(domains))]]
    titles = {
        "begins": "mean of the forest by posteriors",
        "merge": "the forest's mean",
        "last": "MoE of the last forest, top-2 (`branch_train_mix`)",
        "tuned": "the same, tuned on both",
    }
    for each in result.steps:
        last = each.step.rpartition("/")[2]
        what = next((title for key, title in titles.items() if last.endswith(key)), "branch")
        rows.append([f"`{each.step}`: {what}", *numbers(each.losses or {}, list(domains))])
    both = bench.trained("continued", "demo", domains, bench.stage(steps=4 * bench.steps))
    rows.append(["the seed trained on both, tokens of all branches", *numbers(both, list(domains))])
    models = {
        each.step.rpartition("/")[2]: Path(each.model) for each in result.steps if each.step.startswith("round-2")
    }
    return rows, {name: models[name] for name in domains}


ROUTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top-2": ({"top_k": 2, "target": "mixtral"}, {}),
    "soft: all three": ({"top_k": 3, "target": "mixtral"}, {"control": {"choice": "soft"}}),
    "Sample-Top-1": ({"top_k": 1, "target": "mixtral"}, {"control": {"choice": "sample"}}),
    "Switch: top-1, capacity 1.5": (
        {"top_k": 1, "target": "upcycle_moe", "routing": {"normalized": False}},
        {"control": {"capacity_factor": 1.5}},
    ),
}


def routers(bench: Bench, forest: Mapping[str, Path]) -> list[Row]:
    """The table of BTX's routers."""
    rows, domains = [], texts(bench.work)
    sources = [{"name": str(model)} for model in forest.values()]
    balance = {"switch_balance": {"coefficient": 0.01, "fraction": "weights"}}
    for number, (title, (keys, changes)) in enumerate(ROUTERS.items()):
        mixed = {
            "method": "branch_train_mix",
            "sources": sources,
            "parameters": {"generalist": True},
            "router": "random",
        }
        moe = bench.converted(f"mix-{number}", **mixed, **keys)
        losses = bench.trained(f"btx-{number}", moe, domains, bench.stage(losses=balance, **changes))
        rows.append([title, *numbers(losses, [f"before/{name}" for name in domains]), *numbers(losses, list(domains))])
    return rows


def flan(bench: Bench) -> list[Row]:
    """The table of the instruction stage."""
    domains = pairs(bench.work)
    moe = bench.converted("flan", **yaml.safe_load(shipped("convert")["flan_moe"].read_text()))
    told = yaml.safe_load(shipped("train")["flan_moe"].read_text())["stages"][0]
    as_shipped = {key: told[key] for key in ("train", "losses", "control", "weight_decay")}
    arms: dict[str, tuple[Path | str, dict[str, Any]]] = {
        "as shipped: routers frozen, 20% of neurons dropped": (moe, as_shipped),
        "routers train, too": (moe, {**as_shipped, "train": ["all"]}),
        "experts frozen": (moe, {**as_shipped, "train": ["router", "rest"]}),
    }
    rows = []
    for number, (title, (model, keys)) in enumerate(arms.items()):
        losses = bench.trained(f"flan-{number}", model, domains, bench.stage(**keys))
        rows.append([title, *numbers(losses, ["before/pairs", "pairs"])])
    return rows


def skywork(bench: Bench) -> list[Row]:
    """The table of normalised logits with adaptive coefficients."""
    domains = texts(bench.work)
    convert = yaml.safe_load(shipped("convert")["skywork_moe"].read_text())
    told = yaml.safe_load(shipped("train")["skywork_moe"].read_text())["stages"][0]
    plain = {key: value for key, value in convert.items() if key != "routing"}
    control = told["control"]
    arms = {
        "as shipped: logits normalised, adaptive coefficients": (convert, told["losses"]),
        "plain top-2, Switch's balance loss": (plain, {"switch_balance": {"coefficient": 0.01}}),
    }
    rows = []
    for number, (title, (recipe, losses)) in enumerate(arms.items()):
        moe = bench.converted(f"copies-{'plain' if recipe is plain else 'normalised'}", **recipe)
        found = bench.trained(f"skywork-{number}", moe, domains, bench.stage(losses=losses, control=control))
        steps = [line for line in read_log(bench.work / f"skywork-{number}" / "log.jsonl") if line["kind"] == "step"]
        dropped = [line["dropped"] for line in steps[-4:]]
        rows.append([title, *numbers(found, list(domains)), f"{sum(dropped) / len(dropped):.1%}"])
    return rows


def table(head: Row, rows: list[Row]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows])


def main() -> None:
    """Convert, train, measure and print; with ``--out`` the page is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help=f"of every stage, {LENGTH * BATCH:,} tokens each")
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="text-stages-"))
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, options.steps)
    names, forest = list(DOMAINS), dict[str, Path]()
    page = [
        "# Text recipes as published, on the demo model",
        f"Every stage is {options.steps} steps of {LENGTH * BATCH:,} tokens at a rate of {RATE:g}: enough to see that each recipe "
        "runs, too few to rank them. Losses are nats per token of held-out documents: SciPy's docstrings (prose), scikit-learn's "
        "code without docstrings (code), and first paragraphs of docstrings behind their functions' heads (answers). The demo model "
        "was made of none of these, but for the answers, which are of Python's standard library.",
    ]

    def of_rounds() -> str:
        rows, found = rounds(bench)
        forest.update(found)
        return table(["model", *names], rows)

    sections: dict[str, Callable[[], str]] = {
        "Branch-Train-Merge in two rounds (`upcycle grow`)": of_rounds,
        "Flan-MoE's instruction stage": lambda: table(["what trains", "answers before", "answers"], flan(bench)),
        "Skywork-MoE": lambda: table(["what trains", *names, "dropped at the end"], skywork(bench)),
        "BTX's routers": lambda: table(
            ["router", *(f"{name} before" for name in names), *names], routers(bench, forest)
        ),
    }
    command = (
        f"python -P tests/benchmarks/training/text_stages.py --steps {options.steps} --out docs/measured/text_stages.md"
    )
    for title, make in sections.items():
        page += [f"## {title}", make()]
        text = "\n\n".join([*page, f"By `{command}`."]) + "\n"
        if options.out:  # after every section, as later ones take time
            options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
