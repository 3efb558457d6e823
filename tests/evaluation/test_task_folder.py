"""Tasks of a folder run no code, and what is wrong with one is said."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

import upcycle
from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.evaluation.lm_eval_harness import guarded, load_tasks
from upcycle.evaluation.task_folder import checked_tasks, write_tasks
from upcycle.evaluation.task_scores import score_tasks
from upcycle.files.formats.parsing import read_yaml

TASKS = Path(__file__).parents[1] / "tasks"
METRICS = dict.fromkeys(("acc", "acc_norm", "word_perplexity", "bits_per_byte"))
harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra tasks")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TASKS, tmp_path / "tasks"))


def add(folder: Path, text: str, name: str = "more.yaml") -> None:
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(text)


def check(folder: Path) -> None:
    checked_tasks(folder, METRICS)


def test_the_committed_tasks_pass(folder: Path) -> None:
    check(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: t\ndoc_to_text: !function utils.text\n", "line 2: !function runs code"),
        ("task: t\nx: !!python/object/apply:os.system ['true']\n", "python/object/apply:os.system runs code"),
        ("%TAG !! !func\n---\ntask: t\ndoc_to_text: !!tion utils.text\n", "runs code"),
        ("task: t\nclass: utils.Task\n", "key 'class' is not allowed"),
        ("task: t\nprocess_docs: utils.docs\n", "key 'process_docs' is not allowed"),
        ("task: t\nprocess_results: utils.results\n", "key 'process_results' is not allowed"),
        ("task: t\ncustom_dataset: utils.data\n", "key 'custom_dataset' is not allowed"),
        ("task: t\ndataset_path: pandas\n", "'dataset_path': 'pandas' is neither"),
        ("task: t\ndataset_path: sql\n", "'dataset_path': 'sql' is neither"),
        ("task: t\ndataset_path: webdataset\n", "'dataset_path': 'webdataset' is neither"),
        ("task: t\ndataset_path: ./mine\n", "'dataset_path': './mine' is neither"),
        ("task: t\ndataset_path: /elsewhere/mine.py\n", "is neither"),
        ("task: t\nunsafe_code: true\n", "key 'unsafe_code' is not allowed"),
        ("task: t\nunsafe_code: false\n", "key 'unsafe_code' is not allowed"),
        (
            "task: t\ndataset_kwargs: {trust_remote_code: true}\n",
            "key 'dataset_kwargs.trust_remote_code' is not allowed",
        ),
        ("task: t\ndataset_kwargs: {storage_options: {}}\n", "key 'dataset_kwargs.storage_options' is not allowed"),
        ("task: t\nfewshot_config: {process_docs: utils.docs}\n", "key 'fewshot_config.process_docs' is not allowed"),
        (
            "task: t\ngeneration_kwargs: {custom_generate: org/code}\n",
            "key 'generation_kwargs.custom_generate' is not allowed",
        ),
        (
            "task: t\ngeneration_kwargs: {trust_remote_code: true}\n",
            "'generation_kwargs.trust_remote_code' is not allowed",
        ),
        ("task: t\nmetric_list:\n  - metric: ./mine.py\n", "has no metric './mine.py'"),
        ("task: t\nmetric_list:\n  - metric: [acc]\n", "has no metric ['acc']"),
        (
            "task: t\nmetric_list:\n  - metric: acc\n    hf_evaluate: false\n",
            "key 'metric_list.hf_evaluate' is not allowed",
        ),
        ("group: g\ntask:\n  - task: t\n    use_prompt: 'promptsource:x'\n", "key 'use_prompt' is not allowed"),
        ("group: g\nunsafe_code: false\ntask: [continuations]\n", "key 'unsafe_code' is not allowed"),
        ("group: g\ntask: [hellaswag]\n", "group 'g' names 'hellaswag', which is not a task of this folder"),
        ("group: g\ntask: hellaswag\n", "group 'g' names 'hellaswag', which is not a task of this folder"),
        ("group: g\ntask: [{task: hellaswag, num_fewshot: 0}]\n", "names 'hellaswag', which is not a task"),
        ("group: g\ntask: [{group: mmlu, num_fewshot: 0}]\n", "names 'mmlu', which is not a task"),
        ("group: g\ntask: [{group: h, task: [hellaswag]}]\n", "group 'h' names 'hellaswag', which is not a task"),
        ("group: g\ntask: [{include: x, task: t}]\n", "key 'include' belongs to a file"),
        ("group: g\ntask: [7]\n", "names 7, which is not a task"),
        ("task: [t]\n", "key 'task' must be a name"),
        ("task: [t\n", "is not YAML"),
        ("- t\n", "is not a task"),
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
    add(tmp_path, "unsafe_code: true\n", "shared/base")  # as one of the harness' own tasks says
    with pytest.raises(UsageError, match="base: key 'unsafe_code' is not allowed"):
        check(folder)
    add(tmp_path, "num_fewshot: 3\ndescription: base\n", "shared/base")
    add(folder, "include: ../shared/base\ntask: t\ndescription: own\n")
    assert checked_tasks(folder, METRICS)[folder / "more.yaml"] == {"task": "t", "num_fewshot": 3, "description": "own"}
    add(folder, "include: more.yaml\ntask: t\n")
    with pytest.raises(UsageError, match="includes itself"):
        check(folder)


def test_what_the_harness_reads_is_what_was_checked(folder: Path, tmp_path: Path) -> None:
    add(folder, "group: g\ntask: [t, {task: u, dataset_path: json, dataset_kwargs: {data_files: [a, 'hf://b', /c]}}]\n")
    add(folder, "task: t\ndescription: '!function x'\nmetadata: {day: 2024-01-01}\n", "t.yaml")
    (copies := tmp_path / "copies").mkdir()
    write_tasks(checked_tasks(folder, METRICS), copies)
    read = {task.get("group") or task["task"]: task for task in map(read_yaml, copies.iterdir())}
    assert read["t"] == {"task": "t", "description": "!function x", "metadata": {"day": "2024-01-01"}}
    assert read["g"]["task"][1]["dataset_kwargs"]["data_files"] == [str(folder / "a"), "hf://b", "/c"]
    assert read["passages"]["dataset_kwargs"]["data_files"] == {"test": str(folder / "passages.jsonl")}
    assert not [text for path in copies.iterdir() if " !" in (text := path.read_text().replace("'!function x'", ""))]


@harness
def test_a_folder_and_the_harness_never_meet(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of the harness do not take tasks of the folder for their own, and nothing is imported from the folder."""
    from lm_eval.tasks import TaskManager

    own = tmp_path / "package"
    add(own.parent, "group: whole\ntask: [continuations]\ndescription: '{{secret}}'\n", "package/whole.yaml")
    add(own, "task: continuations\n", "continuations.yaml")
    start, seen = TaskManager.__init__, []

    def quick(self: TaskManager, include_path: str | None = None, include_defaults: bool = True) -> None:
        seen.append(include_path)
        start(self, include_path=include_path or str(own), include_defaults=False)

    def stay(_: object) -> None:
        raise AssertionError("the working directory was changed")

    monkeypatch.setattr(TaskManager, "__init__", quick)
    monkeypatch.setattr("os.chdir", stay)
    with guarded():
        ((manager, _),) = load_tasks(["continuations"], folder)
        assert set(manager.all_tasks) == {"continuations", "passages"}
        assert seen[0]
        assert Path(seen[0]) != folder
        with pytest.raises(UsageError):  # the harness' own, which has no data, and not the folder's
            load_tasks(["whole"], folder)


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
