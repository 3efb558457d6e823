"""Tasks of a folder run no code, and what is wrong with one is said."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

import upcycle
from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.task_folder import check_task_folder
from upcycle.task_scores import score_tasks

TASKS = Path(__file__).parent / "tasks"
METRICS = dict.fromkeys(("acc", "acc_norm", "word_perplexity", "bits_per_byte"))
harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra tasks")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TASKS, tmp_path / "tasks"))


def add(folder: Path, text: str, name: str = "more.yaml") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def check(folder: Path, trusted: Path = Path("/nowhere")) -> None:
    check_task_folder(folder, trusted, METRICS)


def test_the_committed_tasks_pass(folder: Path) -> None:
    check(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: t\ndoc_to_text: !function utils.text\n", "line 2: !function runs code"),
        ("task: t\nx: !!python/object/apply:os.system ['true']\n", "python/object/apply:os.system runs code"),
        ("task: t\nclass: utils.Task\n", "key 'class' runs code"),
        ("task: t\ndataset_path: pandas\n", "'pandas' reads pickles"),
        ("task: t\nunsafe_code: true\n", "key 'unsafe_code' runs code"),
        ("task: t\ndataset_kwargs: {trust_remote_code: true}\n", "key 'trust_remote_code' runs code"),
        ("task: t\nmetric_list:\n  - metric: ./mine.py\n", "has no metric './mine.py'"),
        ("task: t\nmetric_list:\n  - metric: acc\n    hf_evaluate: true\n", "key 'hf_evaluate' runs code"),
        ("group: g\ntask:\n  - task: t\n    use_prompt: 'promptsource:x'\n", "key 'use_prompt' runs code"),
        ("task: [t\n", "is not YAML"),
        ("- t\n", "is no task"),
    ],
)
@pytest.mark.parametrize("name", ["more.yaml", "deep/more.yaml"])
def test_code_is_refused_wherever_it_stands(text: str, said: str, name: str, folder: Path) -> None:
    add(folder, text, name)
    with pytest.raises(UsageError) as caught:
        check(folder)
    assert said in caught.value.message
    assert str(folder / name) in caught.value.message


def test_what_is_included_is_read_too(folder: Path, tmp_path: Path) -> None:
    add(folder, "include: ../shared/base\ntask: t\n")
    add(tmp_path, "doc_to_text: !function utils.text\n", "shared/base")
    with pytest.raises(UsageError, match="base, line 1: !function runs code"):
        check(folder)
    check(folder, trusted=tmp_path / "shared")  # as the harness' own files may
    add(folder, "include: more.yaml\ntask: t\n")  # a file that includes itself ends, too
    check(folder)


def test_there_must_be_tasks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no \.yaml task"):
        check(tmp_path)


def test_a_folder_that_is_not_there_is_no_fault_of_ours(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        upcycle.evaluate("demo", tasks=["any"], task_folder=tmp_path / "none")


@harness
def test_templates_run_in_a_sandbox(folder: Path) -> None:
    text = (folder / "continuations.yaml").read_text()
    add(folder, text.replace('"{{question}}"', "\"{{ ''.__class__.__mro__ }}\""), "continuations.yaml")
    with pytest.raises(UsageError, match="SecurityError"):
        score_tasks("demo", None, ["continuations"], folder=folder)


@harness
@pytest.mark.parametrize(
    ("old", "new", "kind", "said"),
    [
        ("continuations.jsonl", "gone.jsonl", EnvironmentFault, "gone.jsonl"),
        ("test_split: test", "test_split: exam", UsageError, "the task 'continuations' cannot be loaded: KeyError"),
        ('"{{choices}}"', '"{{options}}"', UsageError, "UndefinedError: 'options' is undefined"),
    ],
)
def test_faulty_tasks_are_explained(old: str, new: str, kind: type[UpcycleError], said: str, folder: Path) -> None:
    path = folder / "continuations.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(kind) as caught:
        score_tasks("demo", None, ["continuations"], folder=folder, limit=2)
    assert said in caught.value.message
    assert caught.value.hint


@harness
def test_a_data_set_that_cannot_be_reached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'org/questions' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(EnvironmentFault, match="cannot be loaded: Couldn't reach 'org/questions'") as caught:
        score_tasks("demo", None, ["continuations"], folder=folder)
    assert caught.value.hint
    assert "HF_HOME" in caught.value.hint


@harness
def test_groups_and_tags_of_a_folder(folder: Path) -> None:
    add(folder, "group: both\ntask: [continuations, passages]\naggregate_metric_list:\n  - metric: acc\n")
    scores = score_tasks("demo", None, ["both"], folder=folder, limit=3).scores
    assert {(score.task, score.samples) for score in scores if score.metric == "acc"} >= {("continuations", 3)}
    assert {score.task for score in scores} >= {"continuations", "passages"}
    starred = score_tasks("demo", None, ["passag*"], folder=folder, limit=1).scores
    assert {score.task for score in starred} == {"passages"}


@harness
def test_an_unknown_task_names_its_neighbours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    start = TaskManager.__init__

    def quick(self: TaskManager, **arguments: object) -> None:  # without the harness' own thousands of files
        start(self, **{**arguments, "include_defaults": False})  # type: ignore[arg-type]

    monkeypatch.setattr(TaskManager, "__init__", quick)
    with pytest.raises(UsageError, match="no task 'continuation' in lm-eval or") as caught:
        score_tasks("demo", None, ["continuation"], folder=folder)
    assert caught.value.hint == "did you mean continuations?"
