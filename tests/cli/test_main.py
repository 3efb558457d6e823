"""The command line: start-up, help, exit codes, what goes where."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import upcycle
from upcycle.cli.main import VERBS, cli, main
from upcycle.cli.shared import options
from upcycle.cli.verbs import demo
from upcycle.errors import EnvironmentFault, UsageError
from upcycle.models.own.routing.rules import RULES
from upcycle.recipe.conversion_recipe import Recipe

Pico = Callable[[str], Path]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments))


@pytest.mark.one_in(17)
@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_needs_no_torch(verb: str | None) -> None:
    arguments = [verb, "--help"] if verb else ["--help"]
    code = (
        "import sys, upcycle.cli.main as m\n"
        f"try: m.main({arguments})\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: upcycle" in done.stdout


def test_help_answers_at_once() -> None:
    """It loads nothing that takes long: whatever reads or computes is imported when it is needed."""
    code = """
import sys
from upcycle.cli.main import main
try:
    main(["convert", "--help"])
except SystemExit:
    print([name for name in ("torch", "numpy", "transformers", "safetensors", "huggingface_hub") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_recipe_key_has_a_flag_or_is_reached_by_one() -> None:
    flagged = {key.partition(".")[0] for key in options._FLAGS.values()} | {
        "source",
        "parameters",
        "projections",
    }  # reached by --set and --param
    assert flagged == set(Recipe.model_fields)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"source": "demo", "experts": 4, "top_k": 1, "router": "random", "seed": 3}))
    result = run(
        "plan", str(recipe), "--top-k", "2", "--set", "router.parameters.std=0.5", "--set", "layout=fused", "--json"
    )
    assert result.exit_code == 0, result.output
    flags = dict.fromkeys(key.replace(".", "__") for key in options._FLAGS.values())
    flags |= {"top_k": 2, "param": (), "router_param": ("std=0.5",), "set_": ("layout=fused",), "source_flag": None}
    made = options.build_recipe(str(recipe), flags)
    assert (made.experts, made.top_k, made.seed, made.layout, made.method) == (4, 2, 3, "fused", "sparse_upcycling")
    assert made.router.name == "random"
    assert made.router.parameters == {"std": 0.5}


@pytest.mark.long
def test_a_parameter_with_a_flag_of_its_own(pico: Pico) -> None:
    grouped = ("plan", str(pico("llama")), "--method", "virtual_groups", "--json")
    for placement, promise in (("down", "exact"), ("up_down", "exact"), ("paper", "approximate")):
        result = run(*grouped, "--scale-placement", placement)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["promise"] == promise
    assert run(*grouped, "--scale-placement", "gate").exit_code == 2
    # Other methods have no such parameter.
    refused = run("plan", str(pico("llama")), "--scale-placement", "down")
    assert "unknown key 'scale_placement'" in str(refused.exception)


@pytest.mark.long
def test_source_flag_gives_a_recipe_its_source(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("experts: 4\n")
    assert run("plan", str(tmp_path / "r.yaml"), "--source", "demo").exit_code == 0


@pytest.mark.long
def test_convert_prints_the_verdict_and_the_next_command(pico: Pico, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    result = run("convert", str(pico("llama")), out, "-e", "4", "--verify-tokens", "64")
    assert result.exit_code == 0, result.output
    for part in (
        "verdict",
        "exact: the same function",
        "promised below 1e-05",
        "parameters",
        "peak",
        f"upcycle evaluate {out}",
    ):
        assert part in result.stdout
    assert "2x its compute" in result.stderr
    assert run("convert", str(pico("llama")), str(tmp_path / "b"), "-e", "4", "--no-verify", "-q").stderr == ""


@pytest.mark.long
def test_sparse_split_hints_to_heal_and_exits_0(pico: Pico, tmp_path: Path) -> None:
    arguments = ("-m", "random_split", "-e", "8", "-k", "4", "--verify-tokens", "64")
    result = run("convert", str(pico("llama")), str(tmp_path / "out"), *arguments)
    assert result.exit_code == 0
    assert "approximate: 4 of 8 experts run per token" in result.stdout
    assert "healed by continual pre-training" in result.stdout
    assert "all experts on" in result.stdout


@pytest.mark.long
def test_json_is_the_python_functions_result(pico: Pico, tmp_path: Path) -> None:
    dense, out = str(pico("llama")), tmp_path / "out"
    result = run("convert", dense, str(out), "-e", "4", "--verify-tokens", "64", "--json")
    converted = json.loads(result.stdout)
    assert converted["verification"]["verdict"] == "exact"
    planned = json.loads(run("plan", dense, "-e", "4", "--json").stdout)
    assert planned == converted["plan"] == upcycle.plan(dense, experts=4).as_dict()
    assert planned == json.loads(run("convert", dense, "unused", "-e", "4", "--dry-run", "--json").stdout)
    assert not Path("unused").exists()
    verified = json.loads(run("verify", str(out), "--tokens", "64", "--json").stdout)
    assert verified == converted["verification"]
    evaluated = json.loads(run("evaluate", str(out), "--text", "prose", "--tokens", "200", "--json").stdout)
    assert evaluated == upcycle.evaluate(str(out), text=["prose"], tokens=200).as_dict()


def test_evaluate_prints_texts_and_load(pico: Pico, tmp_path: Path) -> None:
    run("convert", str(pico("llama")), str(tmp_path / "out"), "-e", "4", "--no-verify", "-q")
    result = run("evaluate", str(tmp_path / "out"), "--tokens", "300", "--reference", str(pico("llama")))
    assert result.exit_code == 0, result.output
    for part in ("windows of 512 tokens, stride 256", "nats/token", "reference", "expert load", "max/mean", "+0.0%"):
        assert part in result.stdout.replace("-0.0%", "+0.0%")


def test_verify_exits_3_when_broken(pico: Pico, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from upcycle.verification import verify_experts

    upcycle.convert(str(pico("llama")), tmp_path / "out", experts=4, verification={"enabled": False})
    tolerance, verify_experts.EXACT_TOLERANCE = verify_experts.EXACT_TOLERANCE, 0.0
    try:
        with pytest.raises(SystemExit) as caught:
            main(["verify", str(tmp_path / "out"), "--tokens", "64"])
    finally:
        verify_experts.EXACT_TOLERANCE = tolerance
    assert caught.value.code == 3
    assert "is broken" in capsys.readouterr().err


def test_list_shows_every_plugin_with_its_paper() -> None:
    result = json.loads(run("list", "--json").stdout)
    assert set(result) == {"methods", "routers", "rules", "families", "targets", "wrappers", "losses", "recipes"}
    ours = {method["name"] for method in result["methods"] if method["paper"] is None}
    assert ours == {"alternating", "random_experts"}
    assert all(method["paper"].startswith("https://") for method in result["methods"] if method["name"] not in ours)
    assert {rule["name"] for rule in result["rules"]} == set(RULES)
    assert all(rule["paper"].startswith("https://") for rule in result["rules"])
    text = run("list", "methods").stdout
    assert all(method["name"] in text for method in result["methods"])
    assert "[default: 0.02]" in run("list", "routers", "random").stdout  # brackets are text, not markup
    assert "lfm2_moe" in run("list", "families").stdout
    assert "switch_balance" in run("list", "losses").stdout
    assert "| `alternating` |" in run("list", "methods", "--markdown").stdout
    assert "say which" in str(run("list", "--markdown").exception)


def test_env_prints_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/private/place")
    result = run("env")
    assert upcycle.__version__ in result.stdout
    assert "hf_secret" not in result.output
    assert "/private" not in result.output


def test_the_demo_ends_on_the_split_that_compare_recommends() -> None:
    measured = (Path(__file__).parents[2] / "docs" / "measured" / "compare_demo.md").read_text()
    (recommended,) = re.findall(r"`upcycle convert demo OUT (.* --active 0\.5 .*)`", measured)
    assert recommended == demo.flags(demo.RECOMMENDED)
    assert demo.flags(demo.CONVERSIONS[-1][2]) == f"{recommended} --calibration-tokens 6144"


@pytest.mark.long
def test_demo_converts_four_ways(tmp_path: Path) -> None:
    upcycle.convert("demo", tmp_path / "demo" / "upcycled", experts=2, top_k=1, verification={"enabled": False})
    result = run("demo", str(tmp_path / "demo"), "--json", "-q")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [c["verification"]["verdict"] for c in data["conversions"]] == ["exact"] * 3 + ["approximate"]
    dense, copies, split = data["continuations"].values()
    assert dense == copies
    assert len(split.split()) > 10
    sparse = data["conversions"][-1]
    assert (
        sparse["verification"]["perplexity"] < 1.3 * sparse["verification"]["perplexity_dense"]
    )  # a random split: 3 times
    assert sparse["plan"]["flops_per_token"] < 0.8 * sparse["plan"]["flops_per_token_dense"]
    assert data["report"] == str(tmp_path / "demo" / "report.html")
    assert "approximate" in Path(data["report"]).read_text(encoding="utf-8")
    (tmp_path / "mine" / "upcycled").mkdir(parents=True)
    (tmp_path / "mine" / "upcycled" / "thesis.txt").write_text("keep me")
    with pytest.raises(UsageError, match="is not empty"):
        CliRunner().invoke(cli, ["demo", str(tmp_path / "mine")], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "code"), [(["convret"], 2), (["convert"], 2), (["convert", "demo", "x", "-e", "y"], 2)]
)
def test_usage_errors(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "--help" in message.partition("hint: ")[2]


def test_a_fault_of_ours_is_one_message_and_a_traceback_only_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from upcycle.evaluation.forecast import forecast

    def fail(_: Recipe) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(forecast, "job_of", fail)
    with pytest.raises(SystemExit) as caught:
        main(["plan", "demo"])
    assert caught.value.code == 1
    assert "ZeroDivisionError: by nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["plan", "demo", "--debug"])
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert "in fail\n" in text
    assert text.index("Traceback") < text.index("error: ZeroDivisionError: by nothing")


def test_a_growth_step_says_what_it_did_and_what_comes_next(
    pico: Pico, pico_moe: Callable[..., Path], tmp_path: Path
) -> None:
    deep, moe = str(tmp_path / "deep"), str(pico_moe("mixtral"))
    quick = ("--tokenizer", "none", "--verify-tokens", "64")
    planned = run("plan", moe, "--method", "expert_upcycling", *quick[:2]).output
    assert "mixtral by expert_upcycling: 8 experts from 4, top-2" in planned
    assert "per token" in planned
    assert "x the source" in planned
    done = run("convert", str(pico("llama")), deep, "--method", "depth_stack", "--param", "growth=2", *quick)
    assert "6 layers from 3" in done.output
    assert "each equal bit for bit to what it was made from" in done.output
    assert " before " in done.output
    assert "layers           differ" not in done.output  # there are none to compare
    assert "error" not in done.output
    folded = "".join(done.output.split())  # a long path breaks the line
    assert f"upcycleconvert{deep}MOE--experts8--top-k2" in folded
    grown = run("convert", moe, str(tmp_path / "more"), "--method", "expert_upcycling", *quick)
    assert f"upcycleevaluate{tmp_path / 'more'}--reference{moe}" in "".join(grown.output.split())


def test_a_lack_of_memory_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(cli, "main", fail)
    with pytest.raises(SystemExit) as ended:
        main(["list"])
    assert ended.value.code == EnvironmentFault.exit_code
    said = capsys.readouterr().err
    assert "error: out of memory" in said
    assert "bug" not in said
