"""Drafts the recipe of somebody's first conversion from five answers; what it takes from is a recipe that comes with upcycle."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from shlex import quote
from textwrap import indent
from typing import Literal, get_args

from upcycle.architectures.dense.base import Feature
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import dump_yaml, parse_yaml
from upcycle.planning.cost import Plan
from upcycle.recipe.shipped_recipes import shipped
from upcycle.registry import load
from upcycle.text.reading.plain_text import SELF_WRITTEN

Goal = Literal["speed", "capacity"]
Runner = Literal["transformers", "vllm", "llama.cpp"]
GOALS: tuple[Goal, ...] = get_args(Goal)
RUNNERS: tuple[Runner, ...] = get_args(Runner)
# Targets of which llama.cpp computes what transformers does: docs/measured/serving_targets.md, with which a test compares them.
LLAMA_CPP = ("mixtral", "qwen3_moe", "granitemoe", "granitemoeshared", "mellum", "cohere2_moe", "lfm2_moe")
FASTER = 0.97  # of the dense model's time: what is closer to it is noise


@dataclass(frozen=True)
class Answers:
    """What somebody wants.

    Attributes:
        model: folder, hub id, ``.gguf`` file or ``demo``.
        goal: fewer neurons per token, or more of them in all.
        texts: files like what the model will read; none: the model writes its own, where a split needs text.
        train: whether training follows.
        engine: where it will run.
    """

    model: str
    goal: Goal = "speed"
    texts: tuple[str, ...] = ()
    train: bool = False
    engine: Runner = "transformers"


@dataclass(frozen=True)
class Draft:
    """A recipe as text, with its comments; the recipe that it was taken from; and what should be known about it."""

    text: str
    taken_from: str
    remarks: tuple[str, ...]


def recipes_for(answers: Answers) -> tuple[str, ...]:
    """Return the shipped recipes that come into question, the first one first: a split that is no faster is not worth its loss."""
    if answers.goal == "speed":
        return ("split_50", "split_25") if answers.train else ("split_75", "split_50")
    # What upcycle_cpt makes needs weights of experts that do not sum to 1, which llama.cpp holds for no target.
    return ("upcycle_cpt",) if answers.train and answers.engine != "llama.cpp" else ("mixtral-4x",)


def is_faster(plan: Plan) -> bool:
    """Return whether a plan predicts that the model, by any kernels, takes less time than the dense one for reading and writing."""
    predicted = (plan.time or {}).get("relative")
    if not predicted:
        return True  # nothing is known
    return min(sqrt(times["prefill"] * times["decode"]) for times in predicted.values()) < FASTER


def draft(answers: Answers, name: str, targets: Iterable[str]) -> Draft:
    """Return the recipe for some answers.

    Args:
        answers: what somebody wants.
        name: one of :func:`recipes_for`.
        targets: the targets of the model's family, preferred one first; none where only the wrapper holds it.
    """
    text = shipped("convert")[name].read_text(encoding="utf-8")
    remarks = []
    if answers.goal == "capacity" and not answers.train:
        remarks.append("copies compute what the dense model computes, at more cost, until they are trained")
    named = {"source": answers.model}
    if answers.goal == "speed":
        text = _calibrated_on(text, answers.texts or (SELF_WRITTEN,))
        if not answers.texts:
            remarks.append(
                "without text of yours, layers are fitted to text that the model writes itself; yours would be better"
            )
    target, told = _target(answers, tuple(targets))
    if target:
        named["target"] = target
        holds = load("target", target).holds
        if Feature.DENSE_FIRST not in holds and re.search(r"(?m)^layers: except-first", text):
            text = re.sub(r"(?m)^layers: except-first.*$", "layers: all", text)
            remarks.append(
                f"{target} holds no dense first layer, so that one is split, too, and costs more than the others"
            )
    head, _, rest = re.sub(r"(?m)^(source|target):.*\n", "", text).partition("\n")
    return Draft(f"{head}\n{dump_yaml(named)}{rest}", name, (*remarks, *told))


def commands(answers: Answers, recipe: str, context: int | None = None) -> list[str]:
    """Return what to type next, in order.

    Args:
        answers: what somebody wants.
        recipe: the file's name.
        context: most positions of the model; rows of training are not longer.
    """
    found = [f"upcycle convert {quote(recipe)} OUT"]
    model = "OUT"
    if answers.train:
        with_what = "heal_distill" if answers.goal == "speed" else "upcycle_cpt"
        data = quote(f"data={','.join(answers.texts) or 'TEXT'}")
        rows = parse_yaml(shipped("train")[with_what].read_text(encoding="utf-8"), with_what, error=UsageError)[
            "length"
        ]
        shorter = f" --set length={context}" if context and context < rows else ""
        found.append(f"upcycle plan train {with_what} --model OUT")  # hours, and memory, before they are spent
        found.append(f"upcycle train {with_what} --model OUT --output RUN --set {data}{shorter}")
        model = "RUN/model"  # which a run writes at its end
    found.append(f"upcycle report {model}")
    if answers.engine != "transformers":
        found.append(f"upcycle verify {model} --with {answers.engine}")
    return found


def _target(answers: Answers, targets: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """Return the target to name in the recipe, if any, and what should be known about it."""
    if answers.engine == "vllm":
        return None, ["vLLM has modelling code of its own: ask it whether it computes the same, by the last command"]
    if answers.engine != "llama.cpp":
        return None, []
    able = [name for name in targets if name in LLAMA_CPP]
    if not able:
        return None, [
            f"llama.cpp is not known to hold any target of this model ({', '.join(targets) or 'none is stock'})"
        ]
    shared = [name for name in able if Feature.SHARED_EXPERTS in load("target", name).holds]
    return (shared if answers.goal == "speed" and shared else able)[0], []


def _calibrated_on(text: str, texts: tuple[str, ...]) -> str:
    """Return a recipe whose calibration reads ``texts``."""
    line = indent(dump_yaml({"text": list(texts)}), "  ")
    return re.sub(r"(?m)^  text: demo\b.*\n", lambda _: line, text)
