"""Every text recipe of ``configs/train`` on the demo model, from the conversion that its own header names.

Recipes are as shipped but for sizes: rows and steps are fewer, warm-ups and whatever else is told in steps are shortened alike, and
dtype is float32. Rates, losses, what trains, distillation and control stay. Recipes of plain text learn rows that the demo model has
not seen: SciPy's docstrings and scikit-learn's code, half each. Recipes of conversations learn answers: the first paragraph of a
docstring behind its function's head. A preference has the docstring of another function as its worse answer. The training text is
read two or three times: steps have different rows, and cannot be compared, but passes over the same text can. About ten minutes on
one core.

Recipes whose data are images (``OF_IMAGES``) are trained by ``tests/benchmarks/wrapped/vision_language.py``.

    python -P tests/benchmarks/training/shipped_recipes.py --out docs/measured/shipped_recipes.md
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import yaml
from named_conversions import converted, named_conversion, typed
from text_stages import pairs, texts
from torch.nn.functional import cross_entropy
from training_curves import write_page
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.files.locate import locate
from upcycle.models.experts import use_eager_experts
from upcycle.recipe.shipped_recipes import shipped
from upcycle.trainers.run.step_reports import read_log

OF_IMAGES = ("cumo_dense", "cumo_visual", "llava_mod_dense", "llava_mod_sparse", "moe_tuning_dense")
LENGTH, BATCH = 256, 4
TOLD_IN_STEPS = (("schedule", "warmup"), ("preset", "warmup"), ("masks", "steps"), ("control", "cluster_steps"))
PASSES = {1: 3, 2: 2}  # over the text, in every stage of a recipe with so many
HELD_OUT = 32  # rows, and as many pairs
DENSE_TUNED = "instruct (dense)"  # the parent that preference's header asks for
# What trains from another run's model. All else starts from the demo model, or from what the header converts it to.
AFTER = {"d2dmoe_router": "d2dmoe_sparsify", "distill_dense": "moec", "preference": "instruct"}
# Shipped for SmolLM2, whose FFN has 1,536 neurons: twice the demo model's own 576.
SIZES = {"masked_growth": ("--set", "parameters.intermediate=1152")}
# Why a single loss rises, or held-out text gets worse, where that is no surprise.
REASONS = {
    "d2dmoe_sparsify": "FFNs get ReLU in the place of SiLU, and the Hoyer loss's weight rises over the first half of the steps: "
    "loss is given for sparsity",
    "distill_dense": "next tokens are learned beside the teacher, which does not know this text",
    "preference": "it learns which of two answers is better, not to write either",
    "remoe": "its coefficient is multiplied by 1.2 at every step until 2 of 8 experts run, which takes far more steps",
}
SAID = """Losses are means over a pass, times their coefficients, and *their sum*
is what a stage descends, last pass against first; next token is left out where it is not learned.

*Held-out nats* are per token of rows (beginnings of documents), or of answers, that nothing was trained on: of the model that the
run starts from, and of the one that it exported, as transformers loads it. That of `lora` is the folder that `upcycle merge` wrote,
which ends in an error where it differs from the model with the adapter beside it. `masked_growth` starts as the demo model.

Rates are the recipes' own, most of them made for large models and long runs: this shows that every recipe runs and teaches,
not how they rank."""


class Row(NamedTuple):
    """A stage of a run: losses by name, weighted as they are summed, in its first and last pass; seconds of its steps.

    Nats are those before and after the whole run.
    """

    recipe: str
    conversion: str
    trains: str
    steps: int
    first: dict[str, float]
    last: dict[str, float]
    before: float
    after: float
    seconds: float
    text: str

    @property
    def falls(self) -> float:
        """By how much what the stage descends has fallen."""
        return sum(self.first.values()) - sum(self.last.values())


def rows_of(path: Path, tokenizer: Any, count: int) -> list[str]:
    """The first ``count`` pieces of documents that are ``LENGTH`` tokens with the end-of-text token, one of a document."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        piece = tokenizer.decode(tokenizer(json.loads(line)["text"])["input_ids"][: LENGTH - 1])
        if len(tokenizer(piece)["input_ids"]) == LENGTH - 1:
            found.append(piece)
    assert len(found) >= count, path
    return found[:count]


def answer_ids(pair: Mapping[str, str], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, and of its answer with the end of the text."""
    prompt, answer = (tokenizer(pair[key])["input_ids"] for key in ("prompt", "response"))
    return prompt, [*answer, tokenizer.eos_token_id]


class Texts:
    """The three kinds of data: ``plain``, ``answers`` and ``preferences``, as domains of recipes, and what is measured on."""

    def __init__(self, folder: Path, tokens: int) -> None:
        tokenizer = load_tokenizer(locate("demo").path)
        folder.mkdir(parents=True, exist_ok=True)
        plain: tuple[list[str], list[str]] = ([], [])
        kinds = texts(folder)
        for domain in kinds.values():
            paths, counts = (domain["text"], *domain["validation"]), (tokens // LENGTH, HELD_OUT)
            for rows, path, count in zip(plain, paths, counts, strict=True):
                rows.extend(rows_of(Path(path), tokenizer, count // len(kinds)))
        self.rows = torch.tensor([tokenizer(text)["input_ids"] for text in plain[1]])
        asked = pairs(folder)["pairs"]
        told, held_out = (
            [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
            for path in (asked["text"], *asked["validation"])
        )
        kept, room = [], tokens
        for pair in told:
            ids = [token for part in answer_ids(pair, tokenizer) for token in part]
            if len(ids) <= LENGTH // 2 and room >= len(ids):
                kept.append(pair)
                room -= len(ids)
        self.asked = [answer_ids(pair, tokenizer) for pair in held_out[:HELD_OUT]]
        joined = {key: asked[key] for key in ("prompt", "joined")}
        self.domains = {
            "plain": _written(folder / "plain", *([{"text": text} for text in part] for part in plain)),
            "answers": _written(folder / "answers", kept, held_out[:HELD_OUT])
            | {**joined, "response": asked["response"]},
            "preferences": _written(folder / "preferences", _preferred(kept[: len(kept) // 2]), _preferred(held_out))
            | {**joined, "chosen": "chosen", "rejected": "rejected"},
        }

    @torch.no_grad()
    def nats(self, folder: Path, kind: str) -> float:
        """A model's loss in nats per held-out token, of rows or of answers to their prompts, as stock transformers computes it."""
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        use_eager_experts(model)  # transformers' grouped products refuse experts of 18 neurons
        asked = [([], row.tolist()) for row in self.rows] if kind == "plain" else self.asked
        total = count = 0.0
        for prompt, answer in asked:
            ids = torch.tensor([[*prompt, *answer]])
            first = max(1, len(prompt))
            total += cross_entropy(model(ids).logits[0, first - 1 : -1], ids[0, first:], reduction="sum").item()
            count += ids.shape[1] - first
        return total / count


def _written(stem: Path, *parts: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """Files of rows to train on, and of held-out ones."""
    paths = [stem.with_suffix(f".{name}.jsonl") for name in ("seen", "unseen")]
    for path, part in zip(paths, parts, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return {"text": str(paths[0]), "validation": [str(paths[1])]}


def _preferred(told: list[dict[str, str]]) -> list[dict[str, str]]:
    """Every pair's answer against the next one's, where they differ."""
    turned = zip(told, [*told[1:], told[0]], strict=True)
    return [
        {"prompt": pair["prompt"], "chosen": pair["response"], "rejected": other["response"]}
        for pair, other in turned
        if pair["response"] != other["response"]
    ]


def sized(content: dict[str, Any], steps: int) -> dict[str, Any]:
    """A shipped recipe with ``steps`` of every stage, of ``BATCH`` rows, and what is told in steps shortened alike."""
    tokens = content["length"] * content["global_batch"]
    content |= {"length": LENGTH, "global_batch": BATCH, "micro_batch": BATCH, "dtype": "float32", "zero": {}}
    content |= {"saving": {"every": 10**6, "export": True}, "log": {"peak_tflops": 0.05, "validation": 10**6}}
    for stage in content["stages"]:
        share = steps / (stage.pop("tokens", 0) // tokens or stage["steps"])
        stage["steps"] = steps
        for owner, key in TOLD_IN_STEPS:
            if key in stage.get(owner, {}):
                stage[owner][key] = max(1, round(stage[owner][key] * share))
    return content


def kind_of(name: str) -> str:
    """What a recipe's own header trains it on."""
    header = shipped("train")[name].read_text(encoding="utf-8")
    named = {"chat.jsonl": "answers", "preferences.text": "preferences"}
    return next((kind for told, kind in named.items() if told in header), "plain")


class Bench:
    """Runs in one folder. Those that others start from come first; what is there is not repeated."""

    def __init__(self, work: Path, steps: int) -> None:
        self.work, self.steps = work, steps
        self.texts = Texts(work / "texts", LENGTH * BATCH * steps)
        self.found: dict[str, list[Row]] = {}

    def model(self, name: str) -> Path:
        """What a recipe has trained."""
        if name not in self.found:
            self.run(name)
        return self.work / name / ("merged" if name == "lora" else "model")

    def start(self, name: str) -> tuple[Path, str]:
        """Where a recipe starts, and the command that makes it; of a model that was converted and tuned, both recipes' names."""
        demo, out = locate("demo").path, self.work / f"{name} start"
        before = AFTER.get(name)
        words = None if name == DENSE_TUNED else named_conversion(name)
        if name == "distill_dense":
            # The header: upcycle compress ./moe ./dense --method to_dense --width 4096 --calibration corpus.jsonl
            corpus = self.texts.domains["plain"]["text"]
            flags = ("--width", "1152", "--calibration", corpus, "--no-verify", "-q")
            if not out.exists():
                typed("compress", str(self.model(str(before))), str(out), "--method", "to_dense", *flags)
            return out, f"`compress --method to_dense` of `{before}`'s model"
        if words is None:
            return demo, "none: the demo model"
        if name == "preference":
            return self.model(str(before)), f"`convert {words[1]}`, `train {before}`"
        if not out.exists():
            converted(name, self.model(before) if before else demo, out, *SIZES.get(name, ()))
        return out, (f"`train {before}`, " if before else "") + f"`convert {words[1]}`"

    def run(self, name: str) -> list[Row]:
        """Train a recipe, and measure."""
        folder = self.work / name
        kept = folder / "rows.json"
        if name not in self.found and kept.exists():
            self.found[name] = [Row(*row) for row in json.loads(kept.read_text(encoding="utf-8"))]
        if name in self.found:
            return self.found[name]
        recipe = "instruct" if name == DENSE_TUNED else name
        content = yaml.safe_load(shipped("train")[recipe].read_text(encoding="utf-8"))
        content = sized(content, self.steps * PASSES[len(content["stages"])])
        kind = kind_of(recipe)
        if name == DENSE_TUNED:
            content["stages"][0]["losses"] = {}  # it has no experts to balance
        if name == "preference":
            content["stages"][0]["distillation"]["parent"] = str(self.model(DENSE_TUNED))
        model, conversion = self.start(name)
        data = {"domains": {kind: self.texts.domains[kind]}, "cache": str(self.work / "tokens")}
        content |= {"model": str(model), "output": str(folder), "data": data | {"validation": {"tokens": LENGTH}}}
        upcycle.train(content, lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True))
        if "adapter" in content:
            typed("merge", str(folder / "adapter"), str(folder / "merged"), "-q")
        # Grown weights are masked until they are trained: the run starts with the function of the demo model.
        before = self.texts.nats(locate("demo").path if name == "masked_growth" else model, kind)
        self.found[name] = []
        after = self.texts.nats(self.model(name), kind)
        lines = [line for line in read_log(folder / "log.jsonl") if line["kind"] == "step"]
        for stage in content["stages"]:
            own = [line for line in lines if line["stage"] == stage["name"]]
            title = name if len(content["stages"]) == 1 else f"{name}: {stage['name']}"
            trains = ", ".join(stage.get("train", ["all"]))
            if "adapter" in content:
                trains = f"LoRA of rank {content['adapter']['rank']}"
            weight = stage.get("distillation", {}).get("next_token", 1.0)
            seconds = sum(LENGTH * BATCH / line["tokens_per_second"] for line in own)
            first, last = (mean_losses(each, weight) for each in (own[: self.steps], own[-self.steps :]))
            self.found[name].append(Row(title, conversion, trains, len(own), first, last, before, after, seconds, kind))
        kept.write_text(json.dumps(self.found[name]), encoding="utf-8")
        return self.found[name]


def mean_losses(lines: list[dict[str, Any]], next_token: float) -> dict[str, float]:
    """Means over steps of all that a stage descends, weighted."""
    means = {key: fmean(line[key] for line in lines) for key in lines[0] if key.partition("/")[0] == "loss"}
    named = {key.partition("/")[2] or "next token": value for key, value in means.items()}
    return {name: value * (next_token if name == "next token" else 1.0) for name, value in named.items()
            if name != "next token" or next_token}  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    """Markdown."""
    head = ("recipe", "converted by", "trains", "data", "steps", "losses, first pass", "last pass", "their sum",
            "held-out nats before", "after", "seconds")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---:|---|---|---:|---:|---:|---:|"]
    for row in rows:
        losses = ("<br>".join(f"{name} {value:.4g}" for name, value in of.items()) for of in (row.first, row.last))
        cells = (f"`{row.recipe}`", row.conversion, row.trains, row.text, str(row.steps), *losses, f"{-row.falls:+.2g}",
                 f"{row.before:.4f}", f"{row.after:.4f}", f"{row.seconds:.0f}")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(rows: list[Row], steps: int) -> tuple[str, list[str]]:
    """The text of the page, and the stages that did not descend what they should."""
    bad = [row for row in rows if not row.falls > 0 or not math.isfinite(row.after)]  # NaN is bad, too
    worse = [row for row in rows if row.after > row.before]
    images = ", ".join(f"`{name}`" for name in OF_IMAGES)
    parts = [
        f"Steps are {LENGTH * BATCH:,} tokens, a pass over the training text is {steps} steps. " + SAID,
        table(rows).rstrip(),
        f"Recipes whose data are images ({images}) are trained [on a tiny LLaVA](vision_language.md).",
    ]
    rising = [
        f"`{row.recipe}`'s {name} from {value:.2g} to {row.last[name]:.2g}"
        for row in rows
        for name, value in row.first.items()
        if row.last[name] > 1.01 * value
    ]
    if rising:
        parts.append(f"Single losses that rise, by more than a hundredth: {', '.join(rising)}.")
    if worse:
        told = ", ".join(f"`{row.recipe}` by {row.after - row.before:.2g}" for row in worse)
        parts.append(f"Held-out text gets worse, in nats per token: {told}.")
    parts.append("Why: " + "; ".join(f"`{name}`: {reason}" for name, reason in REASONS.items()) + ".")
    verdict = f"FAIL: {', '.join(row.recipe for row in bad)}" if bad else "PASS"
    parts.append(f"Every recipe ran, every loss is finite, and the sum of every stage falls: {verdict}")
    return "\n\n".join(parts) + "\n", [row.recipe for row in bad]


def main() -> int:
    """Convert, train, measure, print; with ``--out`` the page is written. 1 where a recipe does not descend its own loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help=f"of a pass over the text, {LENGTH * BATCH:,} tokens each")
    parser.add_argument("--recipes", nargs="+", help="only these")
    parser.add_argument("--work", type=Path, help="keep runs here")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.work or Path(tempfile.mkdtemp(prefix="shipped-recipes-")), options.steps)
    names = options.recipes or [name for name in shipped("train") if name not in OF_IMAGES]
    began = time.perf_counter()
    for name in names:
        bench.run(name)
    if "preference" in names:
        bench.run(DENSE_TUNED)  # what it was trained beside is told, too
    rows = [row for name in sorted(bench.found) for row in bench.found[name]]
    text, failed = page(rows, options.steps)
    print(text)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    if options.out:
        write_page(options.out, "Every text recipe on the demo model", "training/shipped_recipes.py", text)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
