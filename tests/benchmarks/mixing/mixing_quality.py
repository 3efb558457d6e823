"""Mixing two really different models, without training the mix: perplexity on prose and on code of all that could be done.

The demo model, which was made of CPython's own texts, is fine-tuned twice (``--tokens`` of each): on prose it has not seen,
SciPy's docstrings, and on code it has not seen, scikit-learn's without docstrings (``domains.py``). Then by the command line, as
a user would: ``branch_train_merge`` averages the two; ``branch_train_mix`` makes experts of them, with a random router and with
``domain_ridge``, which is given a sample of what each was trained on. All are measured on other documents of both kinds.

Passes when the mix with ``domain_ridge`` is better on both kinds than the average and than the random router with the same
top-k. Prints a table in Markdown and leaves it in ``docs/measured/mixing_quality.md`` (``--out`` for another file).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
import yaml
from domains import texts
from measure import UPCYCLE
from transformers import AutoModelForCausalLM, AutoTokenizer

import upcycle
from upcycle.files.locate import DEMO_FOLDER
from upcycle.trainers.demo.demo_model import DemoRecipe, train_demo_model, training_windows
from upcycle.trainers.demo.demo_text import Document

ROOT = Path(__file__).resolve().parents[3]
KINDS = {"prose": "science", "code": "library"}
SAMPLE_CHARACTERS = 200_000  # of each kind, for the router
EVALUATION_TOKENS, WINDOW = 8192, 512  # of each kind
MIX, AVERAGE = "branch_train_mix", "branch_train_merge"


@dataclass(frozen=True)
class Result:
    """One model's perplexities, by kind of text."""

    label: str
    perplexity: dict[str, float]

    @property
    def mean(self) -> float:
        """The geometric mean."""
        return math.exp(sum(map(math.log, self.perplexity.values())) / len(self.perplexity))

    def beats(self, other: Result) -> bool:
        """Whether it is better on every kind."""
        return all(self.perplexity[kind] < other.perplexity[kind] for kind in KINDS)


def fine_tuning_recipe(tokens: int) -> DemoRecipe:
    """The demo model's own recipe, with a third of its learning rate and a short warm-up."""
    path = ROOT / "configs" / "train" / "demo_model.yaml"
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    peak = content["peak_learning_rate"] / 3
    return DemoRecipe.model_validate({**content, "tokens": tokens, "peak_learning_rate": peak, "warmup_steps": 10})


def fine_tuned(text: str, recipe: DemoRecipe, out: Path) -> None:
    """Write the demo model trained further on ``text`` by the loop that made it: all weights, in fp32, stored in bfloat16."""
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER / "model")
    documents = [Document(out.name, out.name, text, validation=False)]
    train_demo_model(
        model, training_windows(documents, tokenizer, recipe, torch.Generator().manual_seed(recipe.seed)), recipe
    )
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def converted(out: Path, *arguments: str | Path) -> Path:
    """What ``upcycle convert`` writes."""
    command = [UPCYCLE, "convert", *arguments, out, "--no-verify", "--quiet", "--overwrite"]
    subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)
    return out


def mixed(work: Path, models: dict[str, Path], router: str, top_k: int) -> Path:
    """Both models' FFNs as experts, everything else their average; ``domain_ridge`` reads ``KIND.txt``."""
    named = [{"name": str(model), "text": str(model.with_suffix(".txt"))} for model in models.values()]
    content = {"source": "demo", "sources": named, "method": MIX, "router": router, "top_k": top_k}
    recipe, out = work / f"{router}-{top_k}.yaml", work / f"{router}-{top_k}"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return converted(out, recipe)


def results(work: Path, tokens: int) -> dict[str, Result]:
    """Every model's, by a short name, in the order of the table."""
    training, evaluation = texts(list(KINDS.values()))
    recipe = fine_tuning_recipe(tokens)
    models: dict[str, Path] = {}
    for kind, path in zip(KINDS, training, strict=True):
        models[kind], sample = work / kind, work / f"{kind}.txt"
        if sample.exists():  # written last
            continue
        print(f"fine-tuning on {kind}", file=sys.stderr)
        text = path.read_text(encoding="utf-8")
        fine_tuned(text, recipe, models[kind])
        sample.write_text(text[:SAMPLE_CHARACTERS], encoding="utf-8")
    found: dict[str, Result] = {}

    def measure(name: str, label: str, model: str | Path) -> None:
        by_text = upcycle.evaluate(
            model, text=list(map(str, evaluation)), window=WINDOW, stride=WINDOW - 1, tokens=EVALUATION_TOKENS
        ).texts
        found[name] = Result(label, dict(zip(KINDS, (text.perplexity for text in by_text), strict=True)))
        print(f"{name}: {found[name].perplexity}", file=sys.stderr)

    measure("demo", "the demo model", "demo")
    for kind, model in models.items():
        measure(kind, f"fine-tuned on {kind}", model)
    names = ",".join(map(str, models.values()))
    measure(
        "average", f"their average (`{AVERAGE}`)", converted(work / "average", "--method", AVERAGE, "--sources", names)
    )
    for router in ("random", "domain_ridge"):
        for top_k in (1, 2):
            label = f"mixed, router `{router}`, top-{top_k}"
            measure(f"{router}-{top_k}", label, mixed(work, models, router, top_k))
    return found


def table(found: dict[str, Result]) -> str:
    """Markdown."""
    lines = [f"| model | {' | '.join(KINDS)} | geometric mean |", "|---" * (len(KINDS) + 2) + "|"]
    for result in found.values():
        cells = [f"{result.perplexity[kind]:.2f}" for kind in KINDS]
        lines.append(f"| {result.label} | {' | '.join(cells)} | {result.mean:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Train, mix, measure, print; 1 when the mix is not the better one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=250_000, help="fine-tuning tokens per kind (default: 250,000)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "measured" / "mixing_quality.md", help="where the table goes"
    )
    parser.add_argument(
        "--work", type=Path, help="folder that keeps the fine-tuned models (default: they are not kept)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        found = results(work, arguments.tokens)
    text = table(found)
    print(text)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    code = 0
    for top_k in (1, 2):
        ours = found[f"domain_ridge-{top_k}"]
        for other in (found["average"], found[f"random-{top_k}"]):
            passed = ours.beats(other)
            code |= not passed
            print(f"{ours.label} against {other.label}: {'PASS' if passed else 'FAIL'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
