"""Scores of the harness against log likelihoods summed by hand, and where they are said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.cli.main import cli
from upcycle.errors import EnvironmentFault, UsageError
from upcycle.evaluation.evaluate import Evaluation
from upcycle.evaluation.score_table import score_rows
from upcycle.evaluation.task_scores import TaskScores, _compared, _read
from upcycle.files import records
from upcycle.files.locate import DEMO_FOLDER
from upcycle.progress import Progress
from upcycle.report.collect import Wanted

TASKS = Path(__file__).parents[1] / "tasks"
QUESTIONS = [json.loads(line) for line in (TASKS / "continuations.jsonl").read_text().splitlines()]
harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra tasks")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, half of whose experts run."""
    out = tmp_path_factory.mktemp("half") / "half"
    upcycle.convert("demo", out, method="random_split", experts=8, top_k=4, verification={"tokens": 64})
    return out


@pytest.fixture(scope="module")
def scored(half: Path) -> Evaluation:
    return upcycle.evaluate(half, reference="demo", tasks=["continuations", "passages"], task_folder=TASKS)


def answers(folder: Path) -> list[list[float]]:
    """The log likelihood of every choice, in fp64: the sum over its tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), load_tokenizer(folder)
    model.set_experts_implementation("eager")
    found = []
    for question in QUESTIONS:
        row = []
        for choice in question["choices"]:
            context = tokenizer(question["question"])["input_ids"]
            whole = tokenizer(question["question"] + choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            row.append(sum(logits[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        found.append(row)
    return found


def shares(likelihoods: list[list[float]]) -> tuple[float, float]:
    """Right answers by likelihood, and by likelihood per character."""
    plain = normed = 0
    for question, row in zip(QUESTIONS, likelihoods, strict=True):
        per_character = [value / len(choice) for value, choice in zip(row, question["choices"], strict=True)]
        plain += row.index(max(row)) == question["answer"]
        normed += per_character.index(max(per_character)) == question["answer"]
    return plain / len(QUESTIONS), normed / len(QUESTIONS)


@pytest.mark.long
@harness
def test_scores_are_those_of_likelihoods_summed_by_hand(half: Path, scored: Evaluation) -> None:
    assert scored.tasks
    by_name = {(score.task, score.metric): score for score in scored.tasks.scores}
    moe, dense = shares(answers(half)), shares(answers(DEMO_FOLDER / "model"))
    for index, metric in enumerate(("acc", "acc_norm")):
        score = by_name["continuations", metric]
        assert (score.value, score.reference) == (moe[index], dense[index])
        assert score.difference == pytest.approx(moe[index] - dense[index])
        share, count = score.value, len(QUESTIONS)
        assert score.samples == count
        assert score.stderr == pytest.approx((share * (1 - share) / (count - 1)) ** 0.5)
        assert score.higher_is_better
    assert moe != dense, "the questions tell the models apart"
    passages = by_name["passages", "bits_per_byte"]
    assert passages.samples == 4
    assert passages.value > passages.reference  # type: ignore[operator]
    assert passages.higher_is_better is False


@pytest.mark.long
@harness
def test_bits_per_byte_are_those_of_the_text(half: Path, scored: Evaluation) -> None:
    assert scored.tasks
    model, tokenizer = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float64), load_tokenizer(half)
    model.set_experts_implementation("eager")
    nats = length = 0.0
    for line in (TASKS / "passages.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats -= sum(logits[i, ids[i + 1]].item() for i in range(len(ids) - 1))
        length += len(text.encode())
    (score,) = [score for score in scored.tasks.scores if score.metric == "bits_per_byte"]
    assert score.value == pytest.approx(nats / length / torch.log(torch.tensor(2.0)).item(), rel=1e-5)


@harness
def test_scores_are_kept_beside_the_model_and_said_by_report_and_card(half: Path, scored: Evaluation) -> None:
    assert scored.tasks
    kept = records.read_evaluation(half)
    assert kept
    assert kept["tasks"] == scored.tasks.as_dict()
    report = upcycle.write_report(half, wanted=Wanted(run=False))
    assert report.data["tasks"]["scores"] == kept["tasks"]["scores"]
    acc = next(score for score in scored.tasks.scores if score.metric == "acc")
    page = report.html.read_text(encoding="utf-8")
    assert f"{acc.value:.4f} \u00b1 {acc.stderr:.4f}" in page
    card = ModelCard.load(upcycle.write_card(half))
    assert (
        f"| `continuations` | acc ↑ | {len(QUESTIONS)} | {acc.reference:.4f} ± {acc.reference_stderr:.4f} |"
        in card.text
    )
    results = card.data.to_dict()["model-index"][0]["results"]
    named = {(r["dataset"]["name"], m["type"]): m["value"] for r in results for m in r["metrics"]}
    assert named["continuations", "acc"] == acc.value
    assert {name for name, _ in named} > {"continuations", "passages"}


@harness
def test_scores_of_other_weights_are_not_shown(half: Path, scored: Evaluation, tmp_path: Path) -> None:
    record = half / "upcycle.json"
    before = record.read_text()
    try:
        record.write_text(before + "\n")
        assert records.read_evaluation(half) is None
        assert "missing" in upcycle.write_report(half, tmp_path / "r.html", Wanted(run=False)).data["tasks"]
    finally:
        record.write_text(before)


@harness
def test_the_command_prints_both_models_in_one_table(half: Path, scored: Evaluation) -> None:
    where, given = Path.cwd(), os.path.relpath(TASKS)
    arguments = ["evaluate", str(half), "--reference", "demo", "--tasks", "continuations", "--task-folder", given]
    result = CliRunner().invoke(cli, [*arguments, "--limit", "6", "-q"])
    assert result.exit_code == 0, result.output
    assert "the first 6 questions of each task" in result.stdout
    assert "reference" in result.stdout
    assert "difference" in result.stdout
    assert "expert load" not in result.stdout, "no text was asked for"
    assert Path.cwd() == where
    kept = records.read_evaluation(half)
    assert kept
    assert kept["tasks"]["limit"] == 6
    records.write_evaluation(half, {"tasks": scored.tasks.as_dict()})  # type: ignore[union-attr]


@harness
def test_a_dense_model_that_is_not_ours_gets_no_file(pico: Callable[[str], Path]) -> None:
    result = upcycle.evaluate(pico("llama"), tasks="continuations", task_folder=TASKS, limit=2)
    assert result.tasks
    assert result.tasks.scores[0].reference is None
    assert not (pico("llama") / records.EVALUATION_FILE).exists()


def test_numbers_that_are_none_are_left_out_and_said() -> None:
    """A perplexity can be infinite, a standard error a word; neither is JSON."""
    notes: list[str] = []

    class Notes(Progress):
        def note(self, message: str) -> None:
            notes.append(message)

    result = {
        "results": {
            "all": {"alias": "all", "acc,none": 0.5, "acc_stderr,none": float("nan")},
            "t": {"ppl,none": float("inf"), "acc,none": 0.25, "acc_stderr,none": "N/A", "em,strict": 1},
        },
        "higher_is_better": {"t": {"acc": True}},
        "n-samples": {"t": {"original": 9, "effective": 4}, "u": {"original": 9, "effective": 3}},
        "group_subtasks": {"all": ["t", "u"]},
    }
    scores = _read(result, Notes())
    assert notes == ["t: ppl is inf and is left out"]
    assert [(s.task, s.metric, s.filter, s.samples, s.value, s.stderr, s.higher_is_better) for s in scores] == [
        ("all", "acc", "none", 7, 0.5, None, None),
        ("t", "acc", "none", 4, 0.25, None, True),
        ("t", "em", "strict", 4, 1.0, None, None),
    ]
    both = TaskScores("h", "dense", None, [_compared(scores[0], scores[1]), _compared(scores[2], None)])
    _, rows = score_rows(both.as_dict())
    assert [row[3:] for row in rows] == [("0.2500", "0.5000", "+0.25"), ("-", "1.0000", "-")]
    assert rows[1][1] == "em, strict"


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, pico: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="need --tasks"):
        upcycle.evaluate(pico("llama"), limit=3)

    def nothing(name: str, *_: Any) -> Any:
        return None if name == "lm_eval" else find_spec(name)

    monkeypatch.setattr("upcycle.evaluation.lm_eval_harness.find_spec", nothing)
    with pytest.raises(EnvironmentFault, match="lm-eval, which is not installed") as caught:
        upcycle.evaluate(pico("llama"), tasks="continuations")
    assert caught.value.hint == "pip install 'upcycle[tasks]'"
