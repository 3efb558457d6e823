"""The comparison measures what a written checkpoint would, and its baselines are what they claim."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import cross_entropy, linear, silu
from wrapped_models import small_model

import upcycle
from upcycle.architectures.stock import load_stock_model, load_tokenizer
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.cli.main import cli
from upcycle.cli.verbs import compare as compare_verb
from upcycle.conversion.threads import torch_threads
from upcycle.errors import RefusalError, UsageError
from upcycle.evaluation.comparison import recommend
from upcycle.ffn.feed_forward import FeedForward
from upcycle.progress import SILENT
from upcycle.text.mixture import mixed_windows
from upcycle.text.windows import demo_parts

Pico = Callable[[str], Path]
SMALL = {
    "active": [0.5],
    "pieces": 8,
    "calibration_tokens": 1024,
    "tokens": 256,
    "window": 64,
}


def test_numbers_are_those_of_the_checkpoint_that_convert_writes(pico: Pico, tmp_path: Path) -> None:
    dense = pico("llama")
    found = upcycle.compare(str(dense), methods=["coactivation_kmeans"], routers=["ridge"], **SMALL)
    best = found.best(0.5)
    assert best.command is not None
    arguments = best.command.replace("OUT", str(tmp_path / "out")).split()[1:]
    # The texts compare calibrates on: all but the last quarter of what it was given.
    for name in ("code", "prose"):
        content = demo_parts(name)[0]
        (tmp_path / f"{name}.txt").write_text(content)  # of which a conversion holds out the last quarter
    arguments[arguments.index("--calibration") + 1] = f"{tmp_path}/code.txt,{tmp_path}/prose.txt"
    flags = ["--set", "calibration.window=64", "--calibration-tokens", "1024", "--no-verify", "-q"]
    result = CliRunner().invoke(cli, [*arguments, *flags])
    assert result.exit_code == 0, result.output

    model = load_stock_model(tmp_path / "out")
    model.set_experts_implementation("eager")
    for name in ("code", "prose"):
        content = demo_parts(name)[0]
        held_out = content[content.find("\n", 3 * len(content) // 4) + 1 :]
        ids = mixed_windows({name: held_out}, load_tokenizer(dense), 256, 64)
        with torch.no_grad():
            logits = model(ids).logits[:, :-1]
        expected = math.exp(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())
        # The stock router weighs chosen experts equally but for 1%.
        assert best.perplexity[name] == pytest.approx(expected, rel=1e-3)


@pytest.mark.long
def test_oracle_beats_routers_and_refit_beats_none(pico: Pico) -> None:
    sizes = {**SMALL, "pieces": 12, "calibration_tokens": 3072}
    found = upcycle.compare("demo", methods=["random_split"], routers=["ridge", "cool"], **sizes)
    ratios = {(row.router, row.refit): row.ratio for row in found.results}
    assert 1 < ratios["oracle", "down"] < ratios["ridge", "down"] < ratios["cool", "down"]
    assert ratios["ridge", "down"] < ratios["ridge", "scale"]
    assert ratios["static", "down"] < ratios["static", "none"]
    assert found.best(0.5).router == "ridge"
    assert [row.ratio for row in found.results] == sorted(row.ratio for row in found.results)


def test_static_pruning_keeps_the_neurons_that_add_most() -> None:
    from upcycle.evaluation.candidate_walk import StaticPruning
    from upcycle.ffn.activations import Activations

    rng = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(shape, generator=rng) for shape in ((20, 8), (20, 8), (8, 20)))
    ffn = FeedForward(0, gate, up, down, torch.ones(8), "silu")
    x = torch.randn(50, 8, generator=rng)
    activations = Activations.of(ffn, x)
    static = StaticPruning(activations, 10)
    hidden = silu(linear(x, gate)) * linear(x, up)
    kept = (hidden.square().mean(0) * down.square().sum(0)).topk(10).indices.sort().values
    (batch,) = activations.batches()
    assert torch.allclose(static.active(batch), hidden[:, kept])
    assert torch.equal(static.down, down[:, kept])


@pytest.mark.long
def test_a_target_without_shared_experts_routes_them_all(pico: Pico) -> None:
    found = upcycle.compare(str(pico("qwen3")), methods=["random_split"], routers=["ridge"], **SMALL)
    command = found.best(0.5).command
    assert command is not None
    assert "--shared-unheld route" in command


def test_a_goal_recommends_one_row_by_its_time(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    from upcycle.evaluation import compare_times
    from upcycle.evaluation.shape_speed import OWN, STOCK, Times

    def clock(raw: dict, shapes: dict, *_: int, **__: object) -> tuple:
        times = {}
        for name, (config, _) in shapes.items():
            share = config["intermediate_size"] / raw["intermediate_size"]
            if "pruned" not in name:  # shared and chosen experts, of the same number of neurons; own kernels take half
                running = config["shared_expert_intermediate_size"] + (
                    config["num_experts_per_tok"] * config["moe_intermediate_size"]
                )
                share = running / raw["intermediate_size"]
            times |= {(name, STOCK): Times(share, share), (name, OWN): Times(share / 2, share / 2)}
        return Times(2.0, 0.5), times

    monkeypatch.setattr(compare_times, "relative_times", clock)
    sizes = {**SMALL, "active": [0.8, 0.6], "pieces": 12, "methods": ["random_split"], "routers": ["ridge"]}
    found = upcycle.compare(str(pico("llama")), faster=2.5, **sizes)
    (chosen,) = found.recommended
    fast = [row for row in found.results if row.baseline is None and row.time is not None and row.time <= 0.4]
    assert chosen.ratio == min(row.ratio for row in fast)
    assert (chosen.baseline, found.goal) == (None, {"faster": 2.5})
    assert chosen.times is not None
    assert chosen.time == pytest.approx(chosen.times["upcycle"]["decode"])
    assert chosen.command is not None
    assert all(row.command is None for row in found.results if not row.recommended)
    assert [row for row in found.results if row.frontier]
    assert any(row.baseline == "static" and row.time is not None for row in found.results)
    assert all(row.time is None or row.baseline != "oracle" for row in found.results if row.frontier)
    quick = recommend(found.results, None, 100.0)
    assert [row.active for row in quick if row.recommended] == [0.6]
    with pytest.raises(UsageError, match="no conversion is 9x as fast"):
        recommend(found.results, 9.0, None)


@pytest.mark.parametrize(("most", "expected"), [(1 << 26, 1), (0, 2)])
def test_small_models_are_timed_on_one_thread(
    most: int, expected: int, pico: Pico, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upcycle.evaluation import compare_times
    from upcycle.evaluation.shape_speed import Times

    checkpoint = DenseCheckpoint.open(str(pico("llama")), None)
    used: list[int] = []
    monkeypatch.setattr(compare_times, "_SMALL_BYTES", most)
    monkeypatch.setattr(
        compare_times, "relative_times", lambda *_, **__: used.append(torch.get_num_threads()) or (Times(1.0, 1.0), {})
    )
    with torch_threads(2):
        timing = compare_times.time_candidates(checkpoint, [], 1, SILENT)
        assert torch.get_num_threads() == 2
    assert used == [timing.about["threads"]] == [expected]
    assert timing.about["clock"] == ("process_time" if expected == 1 else "perf_counter")


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"active": [1.0]}, "between 0 and 1"),
        ({"active": [0.3]}, "no method can split"),
        ({"methods": ["kmeans"]}, "unknown method 'kmeans'"),
        ({"routers": ["rigde"]}, "unknown router 'rigde'"),
        ({"text": ["nowhere.txt"]}, "no such text file"),
        ({"faster": 1.2, "within": 1.1}, "two goals"),
        ({"faster": 0.9}, "factor above 1"),
        ({"within": 1.0}, "factor above 1"),
        ({"within": 1.1, "timed": False}, "a goal needs times"),
        ({"methods": ["depth_stack"]}, "depth_stack makes no experts from a dense FFN"),
        ({"methods": ["static_prune"]}, "static_prune makes no experts from a dense FFN"),
    ],
)
def test_bad_input(pico: Pico, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        upcycle.compare(str(pico("llama")), **{**SMALL, **changes})


def test_a_fraction_that_no_method_reaches_is_left_out_with_the_reason(pico: Pico) -> None:
    found = upcycle.compare(
        str(pico("llama")), methods=["random_split"], routers=["cool"], timed=False, **{**SMALL, "active": [0.5, 0.3]}
    )
    assert {row.active for row in found.results} == {0.5}
    assert any("active 0.3 would run" in note for note in found.skipped)


@pytest.mark.long
def test_a_kind_of_text_that_was_not_calibrated_on_is_measured_beside_the_others(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tale = (f"On day {i} the ship with {7 * i} sailors saw {13 * i} gulls above the grey water." for i in range(500))
    (tmp_path / "mine.txt").write_text("\n".join(tale))
    quick = {**SMALL, "methods": ["random_split"], "routers": ["cool"], "timed": False}
    quick |= {"calibration": str(tmp_path / "mine.txt"), "text": ["prose"]}
    found = upcycle.compare(str(pico("llama")), **quick)
    assert (found.unseen, list(found.dense)) == (["code", "everyday"], ["prose", "code", "everyday"])
    for row in found.results:
        ratios = {name: row.perplexity[name] / found.dense[name] for name in found.dense}
        assert row.ratio == pytest.approx(ratios["prose"])
        assert row.unseen_ratio == pytest.approx((ratios["code"] * ratios["everyday"]) ** 0.5)

    monkeypatch.setattr("upcycle.evaluation.compare.DEMO_TEXTS", {})
    monkeypatch.setattr("upcycle.evaluation.compare.seen_share", lambda *_: 1.0)
    alone = upcycle.compare(str(pico("llama")), **quick)
    assert alone.unseen == []
    assert [row.unseen_ratio for row in alone.results] == [None] * len(alone.results)
    assert [row.kl for row in alone.results] == pytest.approx([row.kl for row in found.results]), "of the same text"


def test_embedded_text_whose_lines_were_calibrated_on_is_not_called_unseen(pico: Pico, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(demo_parts("prose")[0])  # a copy; "code" shares lines with it, too
    quick = {**SMALL, "methods": ["random_split"], "routers": ["cool"], "timed": False}
    assert upcycle.compare(str(pico("llama")), calibration=str(tmp_path / "mine.txt"), **quick).unseen == ["everyday"]


@pytest.mark.parametrize(("unseen", "warned"), [(1.5, False), (1.6, True), (None, False)])
def test_much_loss_on_other_kinds_of_text_is_warned_of(unseen: float | None, warned: bool) -> None:
    row = SimpleNamespace(active=0.5, ratio=1.2, unseen_ratio=unseen, time=None, baseline=None)
    notes = compare_verb._warnings(SimpleNamespace(recommended=[row], results=[row]))
    assert any("add self to --calibration" in note for note in notes) == warned


@pytest.mark.long
def test_the_command_prints_saves_and_recommends(pico: Pico, tmp_path: Path) -> None:
    arguments = [
        "compare",
        str(pico("llama")),
        "--methods",
        "random_split,d2d",
        "--routers",
        "ridge",
        "--active",
        "0.5",
    ]
    sizes = ["--pieces", "8", "--calibration-tokens", "1024", "--tokens", "128", "--window", "64", "-q"]
    result = CliRunner().invoke(cli, [*arguments, *sizes, "--out", str(tmp_path / "table.json")])
    assert result.exit_code == 0, result.output
    assert "static pruning" in result.output
    assert "upcycle convert" in result.output
    saved = json.loads((tmp_path / "table.json").read_text())
    assert {row["method"] for row in saved["results"]} == {"random_split", "d2d", "-"}
    assert sum(row["recommended"] for row in saved["results"]) == 1
    result = CliRunner().invoke(cli, [*arguments, *sizes, "--out", str(tmp_path / "table.md")])
    assert (tmp_path / "table.md").read_text().startswith("| active | method |")
    wrong = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "no" / "table.md")])
    assert wrong.exit_code != 0


@pytest.mark.long
def test_what_cannot_run_is_left_out_with_the_reason(pico: Pico) -> None:
    sizes = {**SMALL, "pieces": 12, "calibration_tokens": 128}
    found = upcycle.compare(str(pico("llama")), methods=["importance", "d2d"], routers=["ridge"], **sizes)
    assert found.skipped == ["importance: too little calibration text to divide it into 10 kinds"]
    assert found.best(0.5).method == "d2d"


@pytest.mark.long
@pytest.mark.parametrize(("calibration", "measured"), [("self", ["code", "prose"]), (["self", "prose"], ["prose"])])
def test_nothing_is_measured_on_what_the_model_wrote(
    pico: Pico, calibration: str | list[str], measured: list[str]
) -> None:
    quick = {"methods": ["random_split"], "routers": ["ridge"], "timed": False}
    found = upcycle.compare(str(pico("llama")), calibration=calibration, **quick, **SMALL)
    assert [name for name in found.dense if name not in found.unseen] == measured
    assert found.calibration_tokens == SMALL["calibration_tokens"]
    command = found.best(0.5).command
    assert command is not None
    assert f"--calibration {calibration if isinstance(calibration, str) else ','.join(calibration)}" in command


@pytest.mark.parametrize("option", ["--batch", "--tokens", "--window", "--calibration-tokens"])
def test_zero_is_refused_before_anything_runs(pico: Pico, option: str) -> None:
    result = CliRunner().invoke(cli, ["compare", str(pico("llama")), option, "0"])
    assert result.exit_code == 2
    assert option in result.output


def test_models_that_cannot_be_compared_are_refused_before_text_is_read(pico: Pico, tmp_path: Path) -> None:
    shutil.copytree(pico("llama"), tmp_path / "mute", ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(UsageError, match="has no tokenizer, and a comparison reads text"):
        upcycle.compare(str(tmp_path / "mute"), **SMALL)
    small_model("bert").save_pretrained(tmp_path / "encoder")
    with pytest.raises(RefusalError, match="a bert model is an encoder, which predicts none"):
        upcycle.compare(str(tmp_path / "encoder"), **SMALL)
