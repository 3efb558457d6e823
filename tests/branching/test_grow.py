"""The rounds on tiny models: what each branch and merge is, in plain fp64, and that a kill at any point changes nothing."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from training_runs import write_text

import upcycle.branching.grow as growing
from upcycle.branching.grow import RoundsResult, grow, look
from upcycle.branching.rounds_recipe import parse_rounds_recipe, read_rounds_recipe
from upcycle.cli.main import cli
from upcycle.errors import UsageError
from upcycle.trainers.run.loop import train

Pico = Callable[[str], Path]


def recipe(seed: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    return {
        "source": str(seed),
        "output": str(folder / "forest"),
        "domains": {name: write_text(folder / f"{name}.jsonl", 40, shift) for name, shift in (("law", 0), ("code", 9))},
        "rounds": 1,
        "training": {
            "length": 16,
            "global_batch": 4,
            "micro_batch": 4,
            "data": {"cache": str(folder / "cache"), "validation": {"tokens": 64, "batch": 2}},
            "stages": [{"steps": 2, "learning_rate": 0.01}],
            "log": {"peak_tflops": 0.05},
        },
        "merge": {"verification": {"enabled": False}},
        **changes,
    }


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(Path(folder) / "model.safetensors").items()}


def models(result: RoundsResult) -> dict[str, dict[str, torch.Tensor]]:
    return {each.step: weights(each.model) for each in result.steps}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
def test_a_round_trains_every_branch_and_merges_them(pico: Pico, tmp_path: Path) -> None:
    content = recipe(pico("llama"), tmp_path)
    before = look(content)
    assert [each.state for each in before.steps] == ["next", "waiting", "waiting"]
    assert not (tmp_path / "forest").exists()
    result = grow(content)
    assert [(each.step, each.state) for each in result.steps] == [
        ("round-1/law", "done"),
        ("round-1/code", "done"),
        ("round-1/merge", "done"),
    ]
    made = models(result)
    # A branch is what upcycle train makes of the seed and the domain alone.
    alone = {**content["training"], "model": content["source"], "output": str(tmp_path / "alone")}
    alone["data"] = {**alone["data"], "domains": {"code": content["domains"]["code"]}}
    assert equal(made["round-1/code"], weights(str(train(alone).model)))
    # The merge is the mean, rounded once to fp32.
    for name, merged in made["round-1/merge"].items():
        mean = (made["round-1/law"][name] + made["round-1/code"][name]) / 2
        assert torch.equal(merged, mean.float().double()), name
    assert not equal(made["round-1/law"], made["round-1/code"])
    assert result.seed is not None
    assert set(result.seed) == {"law", "code"}
    learned = {each.step: each.losses for each in result.steps}
    assert learned["round-1/law"]["law"] < result.seed["law"]  # type: ignore[index]
    # What was deleted is made again, and what was made of it stays: the same came out.
    shutil.rmtree(tmp_path / "forest" / "round-1" / "law")
    assert [each.state for each in look(content).steps] == ["next", "done", "waiting"]
    said: list[str] = []
    assert equal(models(grow(content, say=said.append))["round-1/law"], made["round-1/law"])
    assert [line for line in said if line.startswith("next:")] == ["next: round-1/law: train seed on law, 2 steps"]
    # Done is done, unless the recipe is another.
    said.clear()
    assert grow(content, say=said.append).steps == result.steps
    assert not [line for line in said if line.startswith("next:")]
    content["training"]["stages"][0]["learning_rate"] = 0.02
    with pytest.raises(UsageError, match=r"stages\.0\.learning_rate differs"):
        grow(content)


class Killed(BaseException):
    """As a kill: nothing after it is carried out."""


def killed(*_: Any, **__: Any) -> None:
    raise Killed


def test_what_would_stop_a_late_step_is_refused_before_the_first(pico: Pico, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(growing._Rounds, "_measured", killed)
    content = recipe(pico("llama"), tmp_path, last={"method": "branch_train_mix", "top_k": 9})
    for call in (grow, look):
        with pytest.raises(UsageError, match=r"last: top_k is 9, but there are only 2 experts"):
            call(content)
    content["last"] = {"method": "branch_train_mix"}
    content["tuning"] = {**content["training"], "length": 1024}
    with pytest.raises(UsageError, match=r"rows of 1024 tokens are longer than the model's context of 512"):
        grow(content)
    content["tuning"] = {**content["training"], "global_batch": 8}
    with pytest.raises(UsageError, match=r"global_batch 4 is not a multiple of micro_batch 4 x 2 ranks"):
        grow(content, nproc=2)
    assert not [path.name for path in (tmp_path / "forest").iterdir() if path.is_dir()]


def test_the_seeds_losses_are_those_of_this_seed_on_these_texts(pico: Pico, tmp_path: Path, monkeypatch: Any) -> None:
    measured: list[tuple[Path, int]] = []

    def measure(_: Any, folder: Path, data: Any) -> dict[str, float]:
        measured.append((folder, len(data.domains)))
        return {}

    monkeypatch.setattr(growing._Rounds, "_measured", measure)
    monkeypatch.setattr(growing, "train", killed)
    content = recipe(pico("llama"), tmp_path)
    more = {**content["domains"], "news": write_text(tmp_path / "news.jsonl", 40, 4)}
    calls = [content, content, {**content, "source": str(pico("qwen2"))}, {**content, "domains": more}]
    for each in calls:
        with pytest.raises(Killed):
            grow(each)
    assert measured == [(pico("llama"), 2), (pico("qwen2"), 2), (pico("llama"), 3)]
    assert look(content).seed is None  # measured on other texts


def test_a_domain_whose_text_changed_is_noticed(pico: Pico, tmp_path: Path, monkeypatch: Any) -> None:
    measured: list[Path] = []

    def measure(_: Any, folder: Path, __: Any) -> dict[str, float]:
        measured.append(folder)
        return {"law": 1.0}

    def trained(_: Any, step: Any, *__: Any) -> bool:
        if step.domains == ("code",):
            raise Killed
        shutil.copytree(pico("llama"), step.model)
        return True

    monkeypatch.setattr(growing._Rounds, "_measured", measure)
    monkeypatch.setattr(growing._Rounds, "_train", trained)
    content = recipe(pico("llama"), tmp_path)
    with pytest.raises(Killed):
        grow(content)
    assert [each.state for each in look(content).steps] == ["done", "next", "waiting"]
    assert len(measured) == 2
    # The branch of code is not done: its text may still change, and the seed is measured on it anew.
    write_text(tmp_path / "code.jsonl", 50, 9)
    assert look(content).seed is None
    with pytest.raises(Killed):
        grow(content)
    assert measured[2:] == [pico("llama")]
    write_text(tmp_path / "law.jsonl", 50, 0)
    for call in (look, grow):
        with pytest.raises(UsageError, match=r"the text of domain 'law' \(.*law\.jsonl\) differs"):
            call(content)


@pytest.mark.slow
def test_a_kill_at_any_point_changes_nothing(pico: Pico, tmp_path: Path, monkeypatch: Any) -> None:
    mixed = {"method": "branch_train_mix", "verification": {"enabled": False}}
    content = recipe(pico("llama"), tmp_path, rounds=[["law"], ["code"]], branch="posteriors", sample=64, last=mixed)
    content["rounds"].append(["law"])  # of a forest of two: with a mean by posteriors
    whole = grow({**content, "output": str(tmp_path / "whole")})
    met: Counter[tuple[str, str]] = Counter()

    # Every training run, conversion and measurement is killed before its work and behind it, and only then let through.
    def dying(name: str, original: Callable[..., Any], what: Callable[..., object]) -> Callable[..., Any]:
        def act(*arguments: Any, **keys: Any) -> Any:
            met[name, str(what(*arguments))] += 1
            times = met[name, str(what(*arguments))]
            if times == 1:
                raise Killed
            made = original(*arguments, **keys)
            if times == 2:
                raise Killed
            return made

        return act

    monkeypatch.setattr(growing, "train", dying("train", growing.train, lambda run, *_: run.output))
    monkeypatch.setattr(growing, "run_recipe", dying("convert", growing.run_recipe, lambda _, out: out))
    measured = dying("measure", growing._Rounds._measured, lambda _, folder, *__: folder)
    monkeypatch.setattr(growing._Rounds, "_measured", measured)
    kills, result = 0, None
    while result is None:
        assert kills < 60
        try:
            result = grow(content)
        except Killed:
            kills += 1
            assert [each.state for each in look(content).steps].count("next") <= 1
    assert kills == 2 + 4 * len(result.steps)  # the seed is measured alone
    assert models(result).keys() == models(whole).keys()
    for step, made in models(whole).items():
        assert equal(models(result)[step], made), step
    assert [each.losses for each in result.steps] == [each.losses for each in whole.steps]


@pytest.mark.slow
def test_a_branch_by_posteriors_is_the_mean_of_the_forest_that_its_text_decides(pico: Pico, tmp_path: Path) -> None:
    """``p(D=j | x_<t)`` in plain fp64, from the probabilities that stock transformers gives every next token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = {name: tmp_path / f"{name}.txt" for name in ("law", "code")}
    texts["law"].write_text("\n\n".join(["the cat sat on the mat"] * 60))
    texts["code"].write_text("\n\n".join(["for i in range(7): print(i)"] * 60))
    content = recipe(pico("llama"), tmp_path, rounds=2, branch="posteriors", sample=64)
    content["domains"] = {name: {"text": str(path), "separator": "\n\n"} for name, path in texts.items()}
    content["training"]["data"]["validation"]["fraction"] = 0
    content["training"]["stages"][0]["steps"] = 6
    result = grow(content)
    made = models(result)
    for domain in ("law", "code"):
        tokenizer = AutoTokenizer.from_pretrained(pico("llama"))
        begins = tmp_path / "forest" / "round-2" / f"{domain}-begins"
        text = json.loads((begins / "upcycle.json").read_text())["merging"]["text"]
        assert text["tokens"] == 64
        ids = torch.tensor(tokenizer(texts[domain].read_text())["input_ids"][:64])[None]
        logs = []
        for branch in ("law", "code"):
            folder = tmp_path / "forest" / "round-1" / branch / "model"
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
            with torch.no_grad():
                logits = model(ids).logits[0, :-1].log_softmax(-1)
            logs.append([float(logits[place, token]) for place, token in enumerate(ids[0, 1:].tolist())])
        shares = [0.0, 0.0]
        for t in range(len(logs[0])):  # the posterior before token t, from what was read of the sequence
            read = [sum(log[:t]) for log in logs]
            top = max(read)
            odds = [torch.tensor(each - top, dtype=torch.float64).exp().item() for each in read]
            shares = [share + each / sum(odds) / len(logs[0]) for share, each in zip(shares, odds, strict=True)]
        own = ("law", "code").index(domain)
        assert shares[own] > 0.6
        for name, begun in made[f"round-2/{domain}-begins"].items():
            mean = shares[0] * made["round-1/law"][name] + shares[1] * made["round-1/code"][name]
            torch.testing.assert_close(begun, mean, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_more_rounds_are_added_and_all_begin_again_with_restart(pico: Pico, tmp_path: Path) -> None:
    content = recipe(pico("llama"), tmp_path)
    first = grow(content)
    more = grow({**content, "rounds": 2})
    assert more.steps[: len(first.steps)] == first.steps
    content["training"]["stages"][0]["learning_rate"] = 0.03
    again = grow(content, restart=True)
    assert again.steps[0].losses != first.steps[0].losses
    assert equal(
        models(again)["round-1/merge"], models(grow({**content, "output": str(tmp_path / "new")}))["round-1/merge"]
    )


def test_what_others_wrote_is_left_alone(pico: Pico, tmp_path: Path) -> None:
    content = recipe(pico("llama"), tmp_path)
    (tmp_path / "forest").mkdir()
    (tmp_path / "forest" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="did not write what is in it"):
        grow(content)
    inside = {**content, "output": str(pico("llama") / "forest")}
    with pytest.raises(UsageError, match="lies in the seed"):
        look(inside)


def test_the_command_shows_what_is_next(pico: Pico, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "rounds.yaml"
    path.write_text(yaml.safe_dump(recipe(pico("llama"), tmp_path)))
    shown = CliRunner().invoke(cli, ["grow", str(path), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "round-1/law" in shown.stdout
    assert "3 of 3 steps" in " ".join(shown.stdout.split())
    keys = json.loads(CliRunner().invoke(cli, ["grow", str(path), "--dry-run", "--json"]).stdout)
    assert list(keys) == ["output", "stopped", "seed", "steps", "model", "seconds"]
    assert list(keys["steps"][0]) == ["step", "does", "state", "model", "losses"]


def test_the_recipe_that_is_written_into_the_forest_is_read_again(pico: Pico, tmp_path: Path) -> None:
    parsed = parse_rounds_recipe(recipe(pico("llama"), tmp_path), "recipe")
    (tmp_path / "recipe.yaml").write_text(parsed.dump())
    assert read_rounds_recipe(tmp_path / "recipe.yaml") == parsed
