"""README, recipes, help and code agree."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from picture_chats import pictured_llava
from pictures import LARGEST, SHOTS
from wrapped_models import small_model

import upcycle
from upcycle import errors
from upcycle.branching.grow import RoundsResult, StepShown
from upcycle.cli.main import cli
from upcycle.cli.reference.exit_codes_page import EXIT_CODES
from upcycle.cli.reference.json_page import JSON_KEYS
from upcycle.cli.reference.write import PAGES, page
from upcycle.conversion.merge_adapter import Merged
from upcycle.conversion.merge_check import MergeCheck
from upcycle.evaluation.compressing.cut_comparison import CutComparison, CutResult
from upcycle.evaluation.encoders.embeddings import EmbeddingResult
from upcycle.evaluation.encoders.image_classes import ClassResult
from upcycle.evaluation.encoders.two_inputs import RetrievalResult
from upcycle.evaluation.forecast.forecast import Forecast
from upcycle.evaluation.routing_habits import EarlierChoices, LayerHabits, RoutingHabits
from upcycle.evaluation.speed import KernelSpeed, ModelSpeed, Speed
from upcycle.evaluation.task_scores import TaskScore, TaskScores
from upcycle.publishing.gguf import GgufExport
from upcycle.recipe.conversion_recipe import parse_recipe
from upcycle.registry import DESCRIBED, FAMILIES, METHODS, TARGETS, WRAPPERS, load
from upcycle.report.collect import Wanted
from upcycle.trainers.run.shown_rows import ShownPart, ShownRow
from upcycle.verification.engines.verify_with import ServingCheck

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
REFERENCE = ROOT / "docs" / "reference"
GUIDES = ROOT / "docs" / "guides"


def test_the_commands_stand_before_line_40() -> None:
    top = "\n".join(README.splitlines()[:40])
    for command in ("make demo", "make test", "upcycle convert"):
        assert command in top
    assert "| " in top


def test_the_readme_is_short() -> None:
    assert len(README.encode()) < 10_000
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_every_command_line_parses(path: Path) -> None:
    """And means a verb and options that exist; paths are placeholders."""
    lines = [
        line
        for block in re.findall(r"```(?:sh|console)\n(.*?)```", path.read_text(), re.DOTALL)
        for line in block.splitlines()
    ]
    commands = [
        shlex.split(line.removeprefix("$ ").partition(" > ")[0], comments=True)  # what goes into a file is the shell's
        for line in lines
        if line.removeprefix("$ ").startswith("upcycle ")
    ]
    assert len(commands) > 4 or path.name != "README.md"
    for _, verb, *arguments in commands:
        command = cli.get_command(None, verb)  # type: ignore[arg-type]
        assert command is not None, verb
        command.make_context(verb, list(arguments))


@pytest.mark.parametrize("name", PAGES)
def test_reference_pages_are_what_the_code_says(name: str) -> None:
    assert (REFERENCE / f"{name}.md").read_text(encoding="utf-8") == page(name), "make reference"


def test_reference_holds_nothing_else() -> None:
    assert {path.name for path in REFERENCE.iterdir()} == {f"{name}.md" for name in PAGES}


def test_every_page_is_linked_and_every_link_leads_somewhere() -> None:
    pages = set((ROOT / "docs").rglob("*.md"))
    linked: set[Path] = set()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            found = (path.parent / target).resolve()
            assert found.exists(), f"{path.name} links to {target}"
            linked.add(found)
    assert not pages - linked, "no page links to it"


def test_pictures_are_small() -> None:
    for path in (ROOT / "docs").rglob("*"):
        assert path.suffix in ("", ".md", ".png", ".svg", ".css", ".html"), path
        assert path.suffix in ("", ".md", ".html") or path.stat().st_size < LARGEST, path
    for name in SHOTS:
        assert (ROOT / "docs" / "images" / name).read_bytes().startswith(b"\x89PNG")


def test_every_training_recipe_is_documented() -> None:
    documented = set(re.findall(r"`(\w+\.yaml)`", (GUIDES / "training.md").read_text()))
    shipped = {path.name for path in (ROOT / "configs" / "train").glob("*.yaml")} - {"demo_model.yaml"}
    assert documented == shipped


def test_every_method_is_in_a_guide() -> None:
    guides = "".join(path.read_text() for path in GUIDES.glob("*.md"))
    assert not [name for name in METHODS if f"`{name}`" not in guides]


def test_python_in_guides_parses_and_names_what_exists() -> None:
    for path in GUIDES.glob("*.md"):
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "upcycle":
                    assert hasattr(upcycle, node.attr), f"{path.name}: upcycle.{node.attr}"


@pytest.mark.parametrize(("measured", "guide"), [("mixing_quality", "mixing"), ("added_expert", "growing")])
def test_the_table_of_a_guide_is_the_one_that_its_benchmark_left(measured: str, guide: str) -> None:
    table = (ROOT / "docs" / "measured" / f"{measured}.md").read_text(encoding="utf-8")
    assert table in (GUIDES / f"{guide}.md").read_text(encoding="utf-8")


def test_exit_codes() -> None:
    raised = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.UpcycleError)
    }
    assert set(EXIT_CODES) == raised | {0, 130}


def keys_of(kind: Any) -> dict[str, None]:
    """The keys of what an extra or a slow run would give."""
    return {field.name: None for field in fields(kind)}


def of_compressions(pico_moe: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    """What commands that make models smaller print."""
    calibration = {"text": "demo", "tokens": 512, "window": 64}
    cutting = {"method": "naee", "keep": 0.5, "calibration": calibration, "verification": {"enabled": False}}
    compressed = upcycle.convert(str(pico_moe("mixtral")), tmp_path / "cut", **cutting).as_dict()
    rounding = {"method": "quantize", "precision": {"bits": 8}, "verification": {"enabled": False}}
    in_bits = upcycle.convert(str(pico_moe("mixtral")), tmp_path / "bits", **rounding).as_dict()
    cutting = {**cutting, "method": "qmoe"}
    upcycle.convert(str(pico_moe("mixtral")), tmp_path / "ternary", **cutting)
    packing = ["pack", str(tmp_path / "ternary"), str(tmp_path / "packed"), "--json"]
    packed = json.loads(CliRunner().invoke(cli, packing).stdout)
    thinning = {
        "keep": 0.5,
        "parameters": {"heads": 0.5},
        "calibration": calibration,
        "verification": {"enabled": False},
    }
    narrowed = upcycle.convert("demo", tmp_path / "narrow", method="modegpt", **thinning).as_dict()
    seen = upcycle.observe(str(pico_moe("mixtral")), tmp_path / "seen.safetensors", "demo", 64)
    return {
        "convert layers of a compressed MoE": compressed["layers"][0],
        "convert layers of a MoE in few bits": in_bits["layers"][0],
        "pack and unpack": packed,
        "export --gguf": keys_of(GgufExport),
        "convert layers of a narrower model": narrowed["layers"][0],
        "observe": seen,
        "observe layers": seen["layers"][0],
    }


@pytest.mark.long
def test_json_keys(
    pico: Callable[[str], Path],
    pico_moe: Callable[[str], Path],
    tmp_path: Path,
    zoo: Callable[[str], list[Path]],
    hub: Any,
) -> None:
    dense = str(pico("llama"))
    plan = upcycle.plan(dense).as_dict()
    converted = upcycle.convert(dense, tmp_path / "out", verification={"tokens": 64}).as_dict()
    split = {
        "method": "random_split",
        "experts": 4,
        "top_k": 2,
        "calibration": {"text": "demo", "tokens": 512, "window": 64},
    }
    calibrated = upcycle.convert(dense, tmp_path / "split", **split, verification={"tokens": 64}).as_dict()
    blocks = {**split, "refit": "blocks", "verification": {"enabled": False}}
    trained_layers = upcycle.convert(dense, tmp_path / "blocks", **blocks).as_dict()
    for layer in trained_layers["layers"]:
        layer.pop("not_trained", None)  # the reason is there where training did not help
    attention = {
        "routing": "dynamic_k",
        "refit": "none",
        "projections": {"experts": 2, "epochs": 1},
        "target": "upcycle_moe",
    }
    attention |= {"method": "d2d", "experts": 4, "calibration": split["calibration"]}
    imitated = upcycle.convert(dense, tmp_path / "imitated", **attention, verification={"enabled": False}).as_dict()
    told = [{"name": dense, "positive_prompts": [prompt]} for prompt in ("def f():", "She said")]
    mixing = {"method": "branch_train_mix", "sources": told, "router": "hidden", "verification": {"enabled": False}}
    mixed = upcycle.convert(None, tmp_path / "mix", **mixing).as_dict()
    growing = {"method": "expert_upcycling", "parameters": {"utility": "norm"}, "verification": {"enabled": False}}
    grown = upcycle.convert(str(pico_moe("mixtral")), tmp_path / "grown", **growing).as_dict()
    adding = {
        "method": "add_expert",
        "sources": [{"name": dense, "text": "prose"}],
        "calibration": split["calibration"],
    }
    added = upcycle.convert(
        str(tmp_path / "mix"), tmp_path / "added", **adding, verification={"enabled": False}
    ).as_dict()
    aligning = {"method": "symphony", "sources": told, "calibration": split["calibration"]}
    aligned = upcycle.convert(None, tmp_path / "aligned", **aligning, verification={"enabled": False}).as_dict()
    text = {"text": "code", "tokens": 64, "window": 32}
    merging = {"sources": list(map(str, zoo("ab"))), "calibration": text, "verification": {"enabled": False}}
    glued = upcycle.convert(None, tmp_path / "glue", method="model_glue", **merging).as_dict()
    merged = upcycle.convert(None, tmp_path / "merge", method="branch_train_merge", **merging).as_dict()
    compared = upcycle.compare(
        dense,
        methods=["random_split"],
        routers=["ridge"],
        active=[0.5],
        pieces=8,
        calibration_tokens=512,
        tokens=128,
        window=64,
    ).as_dict()
    from training_runs import recipe_for, run

    trained, _ = run(recipe_for(tmp_path / "out", tmp_path / "training", stage={"steps": 1}))
    from upcycle.trainers.checkpoints.export import export

    exported = export(trained.output, tmp_path / "exported").as_dict()
    stage = {"steps": 1, "learning_rate": 0.001}
    planned = upcycle.plan_training({"model": str(tmp_path / "out"), "stages": stage}, world="8xH100").as_dict()
    reported = upcycle.write_report(tmp_path / "out", wanted=Wanted(["prose"], 64, ["def"])).data
    evaluated = upcycle.evaluate(tmp_path / "out", text="prose", tokens=200).as_dict()
    pushed = upcycle.push(tmp_path / "out", "you/moe", dry_run=True).as_dict()
    writing = [str(tmp_path / "out"), "--tokens", "2", "--json"]
    generated = json.loads(CliRunner().invoke(cli, ["generate", *writing, "--prompt", "def"]).stdout)
    small = ["--offload", "--memory", "1GB"]
    offloaded = json.loads(CliRunner().invoke(cli, ["generate", *writing, "--prompt", "def", *small]).stdout)
    file = tmp_path / "loads.safetensors"
    upcycle.observe(tmp_path / "out", file, "demo", tokens=512, window=64)
    near = json.loads(
        CliRunner().invoke(cli, ["plan", "run", writing[0], "--observations", str(file), "--json"]).stdout
    )
    talked = json.loads(CliRunner().invoke(cli, ["chat", *writing], input="hello\n").stdout)
    carded = CliRunner().invoke(cli, ["card", str(tmp_path / "out"), "--json"])
    timed = upcycle.plan("demo", method="random_split", active=0.5, calibration="demo").as_dict()["time"]
    begun = CliRunner().invoke(
        cli, ["init", str(tmp_path / "first.yaml"), "--model", "demo", "--json"], catch_exceptions=False
    )
    actual = {
        "plan": plan,
        "plan time": timed,
        "plan forecast": {"seconds": 0.0, **asdict(Forecast({}))},
        "plan train": {**planned, "command": ""},
        "plan train options": planned["options"][0],
        "plan train options memory": planned["options"][0]["memory"],
        "plan train options communication": planned["options"][0]["communication"],
        "plan train options speed": planned["options"][0]["speed"],
        "plan run": near,
        "plan run layers": near["layers"][0],
        "convert": converted,
        "verify": converted["verification"],
        "verify with an engine": keys_of(ServingCheck),
        "convert layers": calibrated["layers"][0],
        "convert layers with refit blocks": trained_layers["layers"][0],
        "convert layers with projections": imitated["layers"][0],
        "convert layers with projections, projections": imitated["layers"][0]["projections"][0],
        "convert layers of a mix": mixed["layers"][0],
        "convert merging of a zoo": glued["merging"],
        "convert merging of posteriors": merged["merging"],
        "convert layers of a grown MoE": grown["layers"][0],
        "convert layers of an added expert": added["layers"][0],
        **of_compressions(pico_moe, tmp_path),
        "convert layers of symphony": aligned["layers"][0],
        "compare": compared,
        "compare results": compared["results"][0],
        "compare of a MoE": keys_of(CutComparison),
        "compare of a MoE, results": keys_of(CutResult),
        "compare timing": compared["timing"],
        "train": trained.as_dict(),
        "train --show": {"rows": []},
        "train --show rows": keys_of(ShownRow),
        "train --show documents": keys_of(ShownPart),
        "export": exported,
        "merge": keys_of(Merged),
        "merge check": keys_of(MergeCheck),
        "report": reported,
        "report summary": reported["summary"],
        "report quality": reported["quality"],
        "report quality domains": reported["quality"]["domains"][0],
        "report routing": reported["routing"],
        "report routing layers": reported["routing"]["layers"][0],
        "report routing shown": reported["routing"]["shown"][0],
        "report experts layers": reported["experts"]["layers"][0],
        "card": json.loads(carded.stdout),
        "push": pushed,
        "push files": pushed["files"][0],
        "evaluate": evaluated,
        "evaluate texts": evaluated["texts"][0],
        "generate": generated,
        "generate tokens": generated["tokens"][0],
        "generate offload": offloaded["offload"],
        "chat, a line for each answer": talked,
        "evaluate layers": evaluated["layers"][0],
        "evaluate embeddings": keys_of(EmbeddingResult),
        "evaluate classes": keys_of(ClassResult),
        "evaluate retrieval": keys_of(RetrievalResult),
        "init": json.loads(begun.stdout),
        "grow": keys_of(RoundsResult),
        "grow steps": keys_of(StepShown),
        "evaluate routing": keys_of(RoutingHabits),
        "evaluate routing layers": keys_of(LayerHabits),
        "evaluate routing earlier": keys_of(EarlierChoices),
        "evaluate tasks": keys_of(TaskScores),
        "evaluate tasks scores": keys_of(TaskScore),
        "evaluate speed": keys_of(Speed),
        "evaluate speed kernels": keys_of(KernelSpeed),
        "evaluate speed model": keys_of(ModelSpeed),
    }
    documented = {name: set(keys.split()) for name, keys in JSON_KEYS.items()}
    assert documented == {name: set(data) for name, data in actual.items()}
    json.dumps(actual)


@pytest.mark.long
@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "convert").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_work(path: Path, pico_moe: Callable[[str], Path], tmp_path: Path) -> None:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    assert path.read_text().startswith("# ")
    parse_recipe({"source": "demo", **content}, str(path))
    source = str(pico_moe("mixtral")) if load("method", content["method"]).takes == "moe" else "demo"
    if isinstance(content.get("part"), list):  # of a model of parts alone
        source = str(pictured_llava(tmp_path / "llava"))
    if "expert_choice" in str(content.get("routing")):  # not for what writes token by token
        small_model("vit").save_pretrained(tmp_path / "vit")
        source = str(tmp_path / "vit")
    sizes = ["--verify-tokens", "64", *(["--calibration-tokens", "2048"] if "calibration" in content else [])]
    result = CliRunner().invoke(cli, ["convert", str(path), str(tmp_path / "out"), "--source", source, *sizes, "-q"])
    assert result.exit_code == 0, result.output


def test_the_training_recipe_of_the_demo_is_valid() -> None:
    from upcycle.trainers.demo.demo_model import DemoRecipe

    recipe = DemoRecipe.model_validate(yaml.safe_load((ROOT / "configs" / "train" / "demo_model.yaml").read_text()))
    made = json.loads((ROOT / "upcycle" / "demo" / "training.json").read_text())
    assert recipe.model_dump() == made["recipe"]
    assert made["training_tokens"] >= 5_000_000


def test_the_readme_counts_what_is_registered() -> None:
    wrappers = {load("wrapper", name).name for name in WRAPPERS}
    described = [name for name in DESCRIBED if name not in FAMILIES]
    for number, words in (
        (len(FAMILIES), "dense families"),
        (len(wrappers), "[kinds of multimodal model]"),
        (len(TARGETS), "MoE architectures"),
        (len(described), "more, such as GPT-2"),
    ):
        assert f"{number} {words}" in " ".join(README.split())
