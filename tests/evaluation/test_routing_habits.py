"""OpenMoE's questions, answered anew in plain Python from what stock transformers says its routers chose."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from training_runs import recipe_for, run

import upcycle
from upcycle.cli.main import cli
from upcycle.errors import UpcycleError, UsageError
from upcycle.evaluation.evaluate import Evaluation
from upcycle.evaluation.routing_habits import predictable, shared_information

Moe = Callable[..., Path]
WINDOW = 32


def test_a_router_of_token_ids_is_told_from_one_that_does_not_look_at_them() -> None:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (4000,), generator=draw)
    decided, free = ids % 4, torch.randint(4, (4000,), generator=draw)
    by_token, by_majority = predictable(ids[:2000], decided[:2000], ids[2000:], decided[2000:])
    assert by_token == 1
    assert by_majority is not None
    assert abs(by_majority - 0.25) < 0.05
    by_token, by_majority = predictable(ids[:2000], free[:2000], ids[2000:], free[2000:])
    assert by_token is not None
    assert abs(by_token - 0.25) < 0.05  # 4 standard deviations of a share of 2,000 are 0.04
    information = shared_information(ids, decided), shared_information(ids, free)
    assert information[0] == pytest.approx(1, abs=0.01)
    assert information[1] == pytest.approx(
        0, abs=0.02
    )  # without Miller and Madow's term: 117 / 8000 / ln 4 = 0.01 more
    assert shared_information(ids, torch.zeros_like(ids)) is None
    assert predictable(ids[:5], free[:5], ids[5:9] + 40, free[5:9]) == (None, None)


def entropy(values: list[object]) -> float:
    counts = Counter(values)
    shares = [count / len(values) for count in counts.values()]
    return -sum(share * math.log(share) for share in shares) + (len(counts) - 1) / (2 * len(values))


def test_the_numbers_of_a_model(pico_moe: Moe, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = pico_moe("mixtral")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"the {word} of a {word[::-1]}" for word in ["cat", "dog", "tree", "house", "river"] * 12))
    found = upcycle.evaluate(folder, text=str(text), routing=True, window=WINDOW, tokens=260).routing
    assert found is not None
    assert found.window == WINDOW
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), add_special_tokens=False)["input_ids"][:260]
    rows = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
    assert found.tokens == len(rows) * WINDOW
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor(rows), output_router_logits=True, use_cache=False).router_logits
    for layer, scores in zip(found.layers, logits, strict=True):
        choices = scores.topk(2).indices.view(len(rows), WINDOW, 2).tolist()
        firsts = [[token[0] for token in row] for row in choices]
        half = len(rows) // 2
        before: dict[int, Counter[int]] = defaultdict(Counter)
        for row, first in zip(rows[:half], firsts[:half], strict=True):
            for token, expert in zip(row, first, strict=True):
                before[token][expert] += 1
        overall = sum(before.values(), Counter())
        pairs = [
            (token, expert)
            for row, first in zip(rows[half:], firsts[half:], strict=True)
            for token, expert in zip(row, first, strict=True)
            if token in before
        ]
        assert found.seen_tokens == len(pairs)
        right = [before[token].most_common(1)[0][0] == expert for token, expert in pairs if _clear(before[token])]
        unclear = len(pairs) - len(right)  # ties may go either way
        assert sum(right) <= (layer.by_token or 0) * len(pairs) + 1e-9 <= sum(right) + unclear + 1e-9
        if _clear(overall):
            usual = overall.most_common(1)[0][0]
            assert layer.by_majority == pytest.approx(sum(expert == usual for _, expert in pairs) / len(pairs))
        flat = [
            (token, expert)
            for row, first in zip(rows, firsts, strict=True)
            for token, expert in zip(row, first, strict=True)
        ]
        of_expert = entropy([expert for _, expert in flat])
        shared = of_expert + entropy([token for token, _ in flat]) - entropy(list(flat))
        assert layer.information == pytest.approx(min(1, max(0, shared / of_expert)), abs=1e-9)
        lost = [0] * WINDOW
        for row in choices:
            room = [max(4, math.ceil(1.25 * WINDOW * 2 / 4))] * 4
            for slot in range(2):
                for place, token in enumerate(row):
                    room[token[slot]] -= 1
                    lost[place] += room[token[slot]] < 0
        assert layer.dropped == pytest.approx(sum(lost) / (2 * len(rows) * WINDOW))
        parts = [[place for place in range(WINDOW) if place * 5 // WINDOW == part] for part in range(5)]
        shares = [sum(lost[place] for place in part) / (2 * len(rows) * len(part)) for part in parts]
        assert layer.dropped_by_part == pytest.approx(shares, abs=1e-6)


def _clear(counts: Counter[int]) -> bool:
    top = counts.most_common(2)
    return len(top) < 2 or top[0][1] > top[1][1]


@pytest.mark.long
def test_checkpoints_of_a_run_are_compared(pico_moe: Moe, tmp_path: Path) -> None:
    source = pico_moe("mixtral")
    recipe = recipe_for(source, tmp_path, saving={"every": 2, "keep": 3, "export": True})
    result, _ = run(recipe)
    asked = ["evaluate", str(result.model), "--routing", "--earlier", str(recipe.output), "--earlier", str(source)]
    shown = CliRunner().invoke(cli, [*asked, "--tokens", "256", "--window", "32", "--json", "-q"])
    assert shown.exit_code == 0, shown.output
    earlier = json.loads(shown.stdout)["routing"]["earlier"]
    assert [each["step"] for each in earlier] == [2, 4, 6, None]
    assert earlier[2]["same"] == 1  # the last checkpoint is what was exported
    assert 1 >= earlier[1]["same"] >= earlier[3]["same"]
    table = CliRunner().invoke(cli, [*asked, "--tokens", "256", "--window", "32", "-q"])
    assert "step 4" in table.stdout
    assert "fifth 5" in table.stdout


def test_what_cannot_be_asked_is_said(pico_moe: Moe, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    with pytest.raises(UsageError, match="two windows of 32 are needed"):
        upcycle.evaluate(pico_moe("mixtral"), text=str(text), routing=True, window=32)
    with pytest.raises(UsageError, match="compares what routers choose"):
        upcycle.evaluate(pico_moe("mixtral"), earlier=["x"])
    with pytest.raises(UsageError, match=r"dense model|MoE layer"):
        upcycle.evaluate("demo", routing=True, window=32, tokens=64)


def test_what_is_missing_is_noticed_before_a_model_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unwanted(*_: object, **__: object) -> None:
        raise AssertionError("dear work")

    monkeypatch.setattr("upcycle.evaluation.routing_habits.load_model", unwanted)
    monkeypatch.setattr("upcycle.evaluation.evaluate.score_tasks", unwanted)
    with pytest.raises(UpcycleError, match="away"):
        upcycle.evaluate("demo", routing=True, earlier=[tmp_path / "away"])
    with pytest.raises(UpcycleError, match="away"):
        upcycle.evaluate("demo", routing=True, text=str(tmp_path / "away.txt"))
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(UsageError, match="two windows of 32 are needed"):
        upcycle.evaluate("demo", routing=True, text=str(tmp_path / "short.txt"), window=32)
    with pytest.raises(UsageError, match="--earlier compares"):
        upcycle.evaluate("demo", tasks="arc_easy", earlier=["run"])


def test_a_reference_is_compared_beside_what_routers_follow(pico_moe: Moe) -> None:
    folder = pico_moe("mixtral")
    found = upcycle.evaluate(folder, routing=True, reference=folder, window=WINDOW, tokens=96)
    assert found.routing
    assert [text.reference_nats_per_token for text in found.texts] == [text.nats_per_token for text in found.texts]
    assert len(found.texts) == 2


def test_speed_and_routing_of_encoders_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured by other code than texts, whose result was returned alone."""
    monkeypatch.setattr("upcycle.evaluation.evaluate.encoder_folder", Path)
    monkeypatch.setattr("upcycle.evaluation.evaluate._of_encoder", lambda *_: Evaluation("m", None, 8, 8, [], []))
    monkeypatch.setattr("upcycle.evaluation.evaluate.measure_speed", lambda *_, **__: SimpleNamespace(as_dict=dict))
    monkeypatch.setattr("upcycle.evaluation.evaluate.routing_habits", lambda *_, **__: "habits")
    found = upcycle.evaluate("demo", text="prose", speed=True, routing=True)
    assert found.speed
    assert found.routing == "habits"
