"""Model-GLUE: alike sources are merged, the merges are mixed; what was decided is written down and not decided again."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.conversion.convert import run_recipe
from upcycle.errors import UsageError
from upcycle.methods.mixing import model_glue as glue
from upcycle.recipe.conversion_recipe import parse_recipe, read_recipe
from upcycle.text.windows import encode

Zoo = Callable[[str], list[Path]]
NO_CHECK: dict[str, Any] = {"verification": {"enabled": False}}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some dozens of tokens."""
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 12)
    return path


def convert(out: Path, sources: list[Path], text: Path | None, **keys: Any) -> upcycle.Conversion:
    calibration = {"calibration": {"text": str(text), "tokens": 96, "window": 32}} if text else {}
    made = {"method": "model_glue", **calibration, "verification": {"tokens": 64}, **keys}
    return upcycle.convert(None, out, sources=list(map(str, sources)), **made)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def written_mean(folders: list[Path], parts: list[float], to: Path) -> Path:
    """A checkpoint of the weighted mean, fp64 rounded to fp32."""
    shutil.copytree(folders[0], to)
    stored = [tensors(folder) for folder in folders]
    mean = {
        name: torch.from_numpy(
            sum(c * one[name].double().numpy() for c, one in zip(parts, stored, strict=True))
        ).float()
        for name in stored[0]
    }
    save_file(mean, to / "model.safetensors", metadata={"format": "pt"})
    return to


def perplexity_of(folder: Path, text: Path) -> float:
    """Of the windows that a calibration on 96 tokens in windows of 32 reads."""
    ids = encode(load_tokenizer(folder), text.read_text())
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    windows = windows[torch.linspace(0, len(windows) - 1, 3).long()]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(windows).logits.double().numpy()
    total, count = 0.0, 0
    for n in range(len(windows)):
        for t in range(31):
            row = logits[n, t]
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[windows[n, t + 1]]
            count += 1
    return math.exp(total / count)


@pytest.mark.long
@pytest.mark.parametrize("search", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_clusters_are_merged_and_mixed(search: bool, zoo: Zoo, text: Path, tmp_path: Path) -> None:
    sources = zoo("abba")
    result = convert(tmp_path / "out", sources, text, parameters={"search": search}, **NO_CHECK)
    report = result.merging
    assert report is not None
    assert report["clusters"] == [[0, 3], [1, 2]]
    for cluster, step in zip(report["clusters"], report["steps"], strict=True):
        first, second = sorted(cluster, key=lambda i: report["perplexity"][i])
        assert (step["cluster"], step["source"]) == (report["clusters"].index(cluster), second)
        parts = [step["coefficient"], 1 - step["coefficient"]]
        mean = written_mean([sources[first], sources[second]], parts, tmp_path / f"mean-{first}")
        # fp32 logits, computed in batches of another size.
        for folder, measured in ((sources[first], step["before"]), (mean, step["perplexity"])):
            assert perplexity_of(folder, text) == pytest.approx(measured, rel=1e-4)
        assert step["kept"] == (step["perplexity"] <= step["before"])
        if search:  # no other coefficient is better
            for c in (0.3, 0.5, 0.9):
                other = written_mean([sources[first], sources[second]], [c, 1 - c], tmp_path / f"{first}-{c}")
                assert perplexity_of(other, text) >= step["perplexity"] * (1 - 1e-4)
        row = [0.0] * 4
        row[first] = step["coefficient"] if step["kept"] else 1.0
        row[second] = 1 - step["coefficient"] if step["kept"] else 0.0
        assert report["coefficients"][step["cluster"]] == pytest.approx(row)
    assert report["discarded"] == [step["source"] for step in report["steps"] if not step["kept"]]
    two = upcycle.plan(None, method="branch_train_mix", sources=list(map(str, sources[:2])))
    assert result.plan.parameters_total == two.parameters_total


def test_the_mix_is_that_of_merges_written_to_disk(zoo: Zoo, tmp_path: Path) -> None:
    sources, rows = zoo("abba"), [[0.5, 0, 0, 0.5], [0, 0.75, 0.25, 0], [0, 0, 1, 0]]
    listed = [{"name": str(folder), "weight": weight} for folder, weight in zip(sources, (1, 2, 4, 5), strict=True)]
    keys = {"seed": 3, **NO_CHECK}
    upcycle.convert(
        None, tmp_path / "glued", method="model_glue", sources=listed, parameters={"coefficients": rows}, **keys
    )
    merges = [
        written_mean([sources[0], sources[3]], [0.5, 0.5], tmp_path / "one"),
        written_mean([sources[1], sources[2]], [0.75, 0.25], tmp_path / "two"),
        sources[2],
    ]
    weights = (0.5 * 1 + 0.5 * 5, 0.75 * 2 + 0.25 * 4, 4)
    mixed = [{"name": str(folder), "weight": weight} for folder, weight in zip(merges, weights, strict=True)]
    upcycle.convert(str(sources[0]), tmp_path / "mixed", method="branch_train_mix", sources=mixed, **keys)
    found, expected = tensors(tmp_path / "glued"), tensors(tmp_path / "mixed")
    assert set(found) == set(expected)
    for name, tensor in found.items():  # these coefficients multiply fp32 exactly, in whatever order
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.long
def test_a_real_zoo_is_verified_and_recorded(zoo: Zoo, text: Path, tmp_path: Path) -> None:
    sources = zoo("aba")
    result = convert(tmp_path / "out", sources, text)
    checked = result.verification
    assert checked is not None
    assert checked.verdict == "approximate"
    assert checked.all_experts_error is not None
    assert checked.all_experts_error < 1e-6  # of fp32 sums
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert result.merging is not None
    names = ["model", "model-2", "model-3"]
    told = {**result.merging, "sources": names, "text": {**result.merging["text"], "text": ["sample.txt"]}}
    assert record["merging"] == told, "files and models by name: no folder of this machine is published"
    assert [source["name"] for source in record["sources"]] == names
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert written["parameters"]["coefficients"] == record["merging"]["coefficients"]
    assert (written["experts"], written["top_k"]) == (2, 2)
    assert not (tmp_path / "out" / "measured.jsonl").exists()


@pytest.mark.long
def test_nothing_is_decided_again(zoo: Zoo, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = zoo("aba")
    result = convert(tmp_path / "out", sources, text)

    def never(*_: object) -> None:
        raise AssertionError("decided again")

    monkeypatch.setattr(glue, "similarities", never)
    monkeypatch.setattr(glue, "log_likelihoods", never)
    assert upcycle.verify(tmp_path / "out", tokens=64) == result.verification
    run_recipe(parse_recipe(read_recipe(tmp_path / "out" / "recipe.yaml"), "recipe"), tmp_path / "again")
    saved = tmp_path / "out" / "blueprint.safetensors"
    upcycle.convert(None, tmp_path / "built", sources=list(map(str, sources)), blueprint=saved, **NO_CHECK)
    for name in ("again", "built"):
        made = (tmp_path / name / "model.safetensors").read_bytes()
        assert made == (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="makes as many experts as it finds clusters, and 2 are asked for"):
        convert(tmp_path / "none", sources, text, blueprint=saved, parameters={})


STOP = """
import json, os, sys
import upcycle
from upcycle.methods.mixing import model_glue as glue
from upcycle.checkpoints.shard_writer import ShardWriter
where, arguments = sys.argv[1], json.loads(sys.argv[2])
finish, score, scored = ShardWriter.finish, glue.log_likelihoods, []
def stop_writing(self, unit):
    finish(self, unit)
    if where == "writing" and unit.name == "layer 1":
        os.kill(os.getpid(), 9)
def stop_scoring(*rest):
    if where == "scoring" and len(scored) == 2:
        os.kill(os.getpid(), 9)
    scored.append(1)
    return score(*rest)
ShardWriter.finish, glue.log_likelihoods = stop_writing, stop_scoring
upcycle.convert(None, **arguments)
"""


@pytest.mark.long
@pytest.mark.parametrize("where", ["scoring", "writing"])
def test_killed_then_resumed_is_byte_equal(
    where: str, zoo: Zoo, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = zoo("aba")
    arguments = {
        "out": str(tmp_path / "out"), "sources": list(map(str, sources)), "method": "model_glue", **NO_CHECK,
        "calibration": {"text": str(text), "tokens": 96, "window": 32},
    }  # fmt: skip
    killed = subprocess.run(
        [sys.executable, "-P", "-c", STOP, where, json.dumps(arguments)], check=False, env=dict(os.environ)
    )
    assert killed.returncode == -9
    score, scored = glue.log_likelihoods, []
    monkeypatch.setattr(glue, "log_likelihoods", lambda *rest: scored.append(1) or score(*rest))
    result = convert(tmp_path / "out", sources, text, **NO_CHECK)
    assert result.resumed
    assert len(scored) == (1 if where == "scoring" else 0)  # two sources and their merge, in all
    convert(tmp_path / "whole", sources, text, **NO_CHECK)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


@pytest.mark.long
def test_differences_from_the_ancestor(zoo: Zoo, pico: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    sources = list(map(str, zoo("aab")))
    keys = {"method": "model_glue", "sources": sources, "calibration": {"text": str(text), "tokens": 96, "window": 32}}
    parameters = {"compare": "deltas", "threshold": 0.5}
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", parameters=parameters, **keys, **NO_CHECK)
    assert result.merging is not None
    assert result.merging["clusters"] == [[0, 1], [2]]
    similarity = result.merging["similarity"]
    # Two differences d + e with |e| = |d| / 5: a cosine of 1 / (1 + 1 / 25); of other families about none, in 32 rows or more.
    assert similarity[0][1] == pytest.approx(1 / 1.04, abs=0.02)
    assert abs(similarity[0][2]) < 0.1
    with pytest.raises(UsageError, match="takes differences from the recipe's source, and it is one of the sources"):
        upcycle.plan(None, parameters=parameters, **keys)


def test_sources_that_are_all_alike(zoo: Zoo, text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"all 3 sources are alike: their weights resemble .* one cluster is one expert"
    ) as caught:
        convert(tmp_path / "out", zoo("aaa"), text)
    hint = str(caught.value.hint)
    assert "branch_train_merge" in hint
    assert "compare=deltas" in hint
    assert not (tmp_path / "out.partial").exists()
    threshold = float(hint.split("threshold=")[1].split(maxsplit=1)[0])
    found = convert(tmp_path / "out", zoo("aaa"), text, parameters={"threshold": threshold}, **NO_CHECK).merging
    assert found is not None
    assert len(found["clusters"]) > 1


def test_routers_are_told_of_all_sources_of_a_merge(zoo: Zoo, tmp_path: Path) -> None:
    sources = zoo("aba")
    prompts = (["Solve x"], ["def f():", "class A:"], ["Prove that"])
    texts = ("The sum of two even numbers is even. " * 9, "for i in range(3): print(i)\n" * 9, "Let n be a prime. " * 9)
    listed = []
    for i, (folder, positive, sample) in enumerate(zip(sources, prompts, texts, strict=True)):
        path = tmp_path / f"{i}.txt"
        path.write_text(sample)
        told = {"positive_prompts": positive, "negative_prompts": prompts[2 - i], "text": str(path)}
        listed.append({"name": str(folder), **told})
    keys = {"method": "model_glue", "parameters": {"coefficients": [[1, 0, 1], [0, 1, 0]]}, **NO_CHECK}
    keys |= {"calibration": {"tokens": 64, "window": 16}}
    for router in ("hidden", "domain_ridge"):
        upcycle.convert(None, tmp_path / router, sources=listed, router=router, **keys)
        record = json.loads((tmp_path / router / "upcycle.json").read_text())["calibration"]
        both = f"{sources[0]} + {sources[2]}"
        told = [f"prompts of {both}", f"prompts of {sources[1]}"]
        assert record["text"] == (told if router == "hidden" else [Path(listed[i]["text"]).name for i in (0, 2, 1)])
    # 0 and 2 hold each other's prompts as negative ones: together these say nothing against them.
    assert json.loads((tmp_path / "hidden" / "upcycle.json").read_text())["calibration"]["tokens"] > 0
    listed[1].pop("positive_prompts")
    with pytest.raises(UsageError, match="has no 'positive_prompts'"):
        upcycle.plan(None, sources=listed, router="hidden", **keys)


def test_a_plan_says_what_it_does_not_know(zoo: Zoo, text: Path) -> None:
    keys = {"method": "model_glue", "sources": list(map(str, zoo("aba"))), "calibration": str(text)}
    plan = upcycle.plan(None, **keys)
    assert "which sources are merged is decided" in " ".join(plan.warnings)
    assert "3 experts are the most there can be" in " ".join(plan.warnings)
    assert plan.promise_reason == "experts of merges of 3 models; compared with the model 'source'"
    assert plan.calibration_tokens == 65536
    decided = upcycle.plan(None, **keys, parameters={"coefficients": [[1, 0, 1], [0, 1, 0]]})
    assert decided.parameters_total < plan.parameters_total
    assert "calibration text is not used" in " ".join(decided.warnings)


def test_a_plan_of_models_on_the_hub(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    local = {f"org/{name}": folder for name, folder in zip("abc", zoo("aba"), strict=True)}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(local[name]))
    keys = {"method": "model_glue", "sources": list(local), "parameters": {"coefficients": [[0, 0.5, 0.5], [1, 0, 0]]}}
    here = {**keys, "sources": list(map(str, local.values()))}
    assert upcycle.plan(None, **keys).parameters_total == upcycle.plan(None, **here).parameters_total
    generalist = {**keys["parameters"], "generalist": True}
    with pytest.raises(UsageError, match="it is one of the sources already"):
        upcycle.plan(None, **{**keys, "parameters": generalist})
    merged = {"coefficients": [[0, 1, 0], [0.5, 0, 0.5]], "generalist": True}  # the base alone is no expert here
    assert upcycle.plan(None, **{**keys, "parameters": merged}).promise_reason.startswith("experts of 3 different")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "method model_glue keeps a merge that does not predict your text worse, and there is none"),
        ({"calibration": "x.txt", "experts": 2}, "makes as many experts as it finds clusters, and 2 are asked for"),
        ({"calibration": "x.txt", "shared": 1}, "no shared experts"),
        ({"calibration": "x.txt", "parameters": {"treshold": 1}}, "unknown key 'treshold'"),
        ({"calibration": "x.txt", "parameters": {"compare": "norms"}}, "key 'compare'"),
        ({"parameters": {"coefficients": [[1, 1, 0]]}}, "needs two rows or more"),
        ({"parameters": {"coefficients": [[1, 1, 0], [0, 0, 0]]}}, "needs two rows or more"),
        ({"parameters": {"coefficients": [[1, -1, 1], [0, 0, 1]]}}, "numbers that are 0 or positive"),
        ({"parameters": {"coefficients": [[1, 1], [0, 1]]}}, "has a row of 2 numbers, and there are 3 sources"),
        ({"parameters": {"coefficients": [[1, 0, 1], [0, 1, 0]]}, "experts": 3}, "makes 2 experts of 2 models"),
    ],
)
def test_bad_input(keys: dict[str, Any], message: str, zoo: Zoo) -> None:
    with pytest.raises(UsageError, match=message):
        upcycle.plan(None, sources=list(map(str, zoo("aba"))), method="model_glue", **keys)


def test_one_source(zoo: Zoo) -> None:
    with pytest.raises(UsageError, match="mixes several sources, and there is one"):
        upcycle.plan(str(zoo("a")[0]), method="model_glue", calibration="x.txt")
