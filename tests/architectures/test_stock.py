"""Nothing that a folder says makes transformers run code, load kernels, ask, or reach for other repositories; over every verb."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner

from upcycle.architectures.clean_settings import clean_config, clean_generation, clean_tokenizer
from upcycle.architectures.stock import (
    build_config,
    empty_model,
    load_stock_model,
    load_tokenizer,
    view,
)
from upcycle.cli.main import VERBS, cli
from upcycle.errors import CheckpointError, EnvironmentFault
from upcycle.files.locate import DEMO_FOLDER

ROOT = Path(__file__).parents[2]
EVIL = "evil.Class"
REPOSITORY = "someone/kernel"
CODE = (
    "import pathlib; pathlib.Path(__file__).with_name('RAN').touch()\nclass Class: pass\ndef generate(*_, **__): pass\n"
)
# What a stranger may have written into the settings of a model: each names code, a kernel, a repository or a file.
CONFIG = {
    "auto_map": {"AutoConfig": EVIL, "AutoModelForCausalLM": f"someone/code--{EVIL}", "AutoTokenizer": [None, EVIL]},
    "attn_implementation": REPOSITORY,
    "_attn_implementation": f"{REPOSITORY}@main:function",
    "_attn_implementation_internal": REPOSITORY,
    "_attn_implementation_autoset": True,
    "experts_implementation": "sonicmoe",
    "_experts_implementation_internal": "deepgemm",
    "attribute_map": {"harmless": "_attn_implementation_internal"},
    "harmless": REPOSITORY,
    "custom_pipelines": {"text-generation": {"impl": EVIL, "pt": ["AutoModel"]}},
    "custom_generate": REPOSITORY,
    "trust_remote_code": True,
    "code_revision": "main",
    "kernel_config": {"kernel_mapping": {"RMSNorm": REPOSITORY}},
    "use_kernels": True,
    "fusion_config": {"patch_embeddings": True},
    "distributed_config": {"tp_plan": "auto"},
    "transformers_weights": "../elsewhere.safetensors",
    "_name_or_path": "someone/model",
    "name_or_path": "someone/model",
    "_commit_hash": "0" * 40,
    "tokenizer_class": "EvilTokenizer",
    "processor_class": "EvilProcessor",
    "to_dict": "no method any more",
    "backbone": REPOSITORY,
    "use_pretrained_backbone": True,
}
REFUSED = ("fusion_config", "transformers_weights")  # by whoever reads sources: they change the function
GENERATION = {
    "custom_generate": REPOSITORY,
    "trust_remote_code": True,
    "penalty_alpha": 0.6,
    "top_k": 4,
    "dola_layers": "high",
    "cache_implementation": "someone/cache",
    "eos_token_id": 0,
    "_from_model_config": False,
}
TOKENIZER = {
    "auto_map": {"AutoTokenizer": [EVIL, EVIL]},
    "tokenizer_class": "EvilTokenizer",
    "processor_class": "EvilProcessor",
    "tokenizer_file": "/etc/passwd",
    "vocab_file": "/etc/passwd",
    "special_tokens_map_file": "/home/somebody/special_tokens_map.json",
    "name_or_path": "someone/model",
    "fast_tokenizer_files": ["tokenizer.4.0.0/../../../etc/passwd.json"],
    "init_inputs": ["/etc/passwd"],
}
ADAPTER = {"base_model_name_or_path": "someone/model", "peft_type": "LORA", "auto_mapping": {"parent_library": "evil"}}
_NAMED = re.compile(
    r"evil|Evil|sonicmoe|deepgemm|passwd|somebody|elsewhere|trust_remote_code|auto_map|custom_|name_or_path|attribute_map"
    r"|(attn|experts)_implementation|kernel_config|use_kernels|processor_class"
)


def hostile_adapter(folder: Path) -> Path:
    """A LoRA folder of the demo model whose settings name code and another repository."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER, "r": 1, "lora_alpha": 1}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(1, 192), name.format("B"): torch.ones(192, 1)},
        folder / "adapter_model.safetensors",
    )
    return folder


def poison(folder: Path) -> Path:
    """Put all of it into a folder, and code beside it; records of the files' hashes say what is there now."""
    for name, content in (
        ("config.json", {key: value for key, value in CONFIG.items() if key not in REFUSED}),
        ("generation_config.json", GENERATION),
        ("tokenizer_config.json", TOKENIZER),
        ("special_tokens_map.json", {"vocab_file": "/etc/passwd", "auto_map": {"AutoTokenizer": [EVIL, EVIL]}}),
    ):
        path = folder / name
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(before | content))
    for place in (folder, folder / "custom_generate"):
        place.mkdir(exist_ok=True)
        (place / "evil.py").write_text(CODE)
        (place / "generate.py").write_text(CODE)
    if (record := folder / "upcycle.json").is_file():
        content = json.loads(record.read_text())
        for name in content["files"]:
            content["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        record.write_text(json.dumps(content))
    return folder


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    return poison(Path(shutil.copytree(DEMO_FOLDER / "model", tmp_path / "hostile")))


@pytest.fixture
def traps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for what loads code and kernels, for questions on the terminal, and for the network; says which were reached."""
    import transformers
    from transformers import dynamic_module_utils
    from transformers.integrations import hub_kernels
    from transformers.models.auto import auto_factory, configuration_auto, tokenization_auto

    reached: list[str] = []

    def trap(name: str) -> Callable[..., NoReturn]:
        def spring(*arguments: Any, **_: Any) -> NoReturn:
            reached.append(f"{name}{arguments}")
            raise AssertionError(reached[-1])

        return spring

    for name in ("get_class_from_dynamic_module", "get_cached_module_file", "get_class_in_module"):
        for module in (dynamic_module_utils, auto_factory, configuration_auto, tokenization_auto):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, trap(name))
    for name in ("get_kernel", "load_and_register_attn_kernel", "lazy_load_kernel"):
        monkeypatch.setattr(hub_kernels, name, trap(name))
    monkeypatch.setattr(transformers.GenerationMixin, "load_custom_generate", trap("load_custom_generate"))
    monkeypatch.setattr(builtins, "input", trap("input"))
    monkeypatch.setattr(socket.socket, "connect", trap("connect"))
    monkeypatch.setattr(socket, "getaddrinfo", trap("getaddrinfo"))
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdin", closed)
    return reached


@pytest.mark.parametrize(
    ("clean", "content", "kept"),
    [
        (clean_config, CONFIG, {"harmless"}),
        (
            clean_generation,
            GENERATION,
            {"penalty_alpha", "top_k", "dola_layers", "cache_implementation"} | {"eos_token_id"},
        ),
        (clean_tokenizer, TOKENIZER, set()),
    ],
)
def test_what_is_left_of_settings(
    clean: Callable[..., dict[str, Any]], content: dict[str, Any], kept: set[str]
) -> None:
    assert set(clean(content)) - {"_from_model_config"} == kept


def test_nested_settings_are_cleaned_and_the_rest_is_what_it_was() -> None:
    plain = {
        "model_type": "llama",
        "tokenizer_class": "LlamaTokenizer",
        "rope_parameters": {"rope_type": "llama3", "factor": 8.0},
        "layer_types": ["full_attention"],
        "id2label": {"0": "a"},
        "dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
    }
    assert clean_config(plain) == plain
    assert list(clean_config(CONFIG | plain)) == ["harmless", "tokenizer_class", *list(plain)[:1], *list(plain)[2:]]
    deep = clean_config(
        {"text_config": {**CONFIG, "hidden_size": 8, "per_layer_config": {"0": CONFIG}}, "parts": [CONFIG]}
    )
    assert deep == {
        "text_config": {"harmless": REPOSITORY, "hidden_size": 8, "per_layer_config": {"0": {"harmless": REPOSITORY}}},
        "parts": [{"harmless": REPOSITORY}],
    }
    template = {
        "chat_template": {"default": "{{ auto_map }}"},
        "extra_special_tokens": {"_x": "<x>"},
        "pad_token": "<p>",
    }
    assert clean_tokenizer(template | {"tokenizer_class": "PreTrainedTokenizerFast"}) == template | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    # transformers has this class, but it is no tokenizer.
    assert clean_tokenizer({"tokenizer_class": "AutoModelForCausalLM"}) == {}
    assert clean_tokenizer({"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.2.json"]})


def test_the_configuration_is_the_one_that_stock_transformers_makes() -> None:
    from transformers import AutoConfig

    folder = DEMO_FOLDER / "model"
    raw = json.loads((folder / "config.json").read_text())
    theirs = AutoConfig.from_pretrained(folder).to_dict() | {"dtype": None, "_name_or_path": ""}
    assert build_config(raw, "demo").to_dict() == theirs
    assert build_config(raw | CONFIG, "demo").to_dict() == theirs | {"harmless": REPOSITORY}
    assert empty_model(raw | CONFIG, "demo").config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": ["llama"]}, "'model_type' must be a name, got ['llama']"),
        ({"model_type": "evil"}, "transformers has no 'evil' model"),
        ({"hidden_act": 7}, "it: transformers"),
        ({"rope_parameters": "x"}, "it: transformers"),
        ({"layer_types": 3}, "it: transformers"),
        ({"num_attention_heads": 0}, "it: transformers"),
    ],
)
def test_settings_that_no_class_takes(changes: dict[str, Any], said: str) -> None:
    raw = json.loads((DEMO_FOLDER / "model" / "config.json").read_text())
    with pytest.raises(CheckpointError) as caught:
        empty_model(raw | changes, "it")
    assert said in caught.value.message


def test_a_hostile_folder_is_loaded_as_if_it_said_nothing(hostile: Path, traps: list[str]) -> None:
    import torch

    (hostile / "adapter_config.json").write_text(json.dumps(ADAPTER))
    plain, loaded = load_stock_model(DEMO_FOLDER / "model"), load_stock_model(hostile)
    ids = torch.arange(12)[None]
    assert torch.equal(plain(ids).logits, loaded(ids).logits)
    assert loaded.name_or_path == loaded.config.name_or_path == ""
    tokenizer = load_tokenizer(hostile)
    assert tokenizer("a word")["input_ids"] == load_tokenizer(DEMO_FOLDER / "model")("a word")["input_ids"]
    assert not _NAMED.search(json.dumps({key: str(value) for key, value in tokenizer.init_kwargs.items()}))
    with view(hostile, weights=True, tokenizer=True) as shown:
        assert not [path.name for path in shown.rglob("*") if path.suffix == ".py" or "adapter" in path.name]
    assert not traps
    assert not list(hostile.rglob("RAN"))


def test_a_gguf_file_is_shown_alone(hostile: Path, traps: list[str]) -> None:
    """Beside it may lie settings that name code, which transformers would ask about on the terminal."""
    (hostile / "model.gguf").write_bytes(b"GGUF")
    with view(hostile / "model.gguf", weights=True, tokenizer=True) as shown:
        assert [path.name for path in shown.rglob("*")] == ["model.gguf"]
    with pytest.raises(EnvironmentFault, match="cannot be loaded"):  # damaged; nothing was asked
        load_tokenizer(hostile / "model.gguf")
    assert not traps


def test_a_tokenizer_of_its_own_code_is_refused_by_name(hostile: Path) -> None:
    (hostile / "tokenizer.json").unlink()
    with pytest.raises(EnvironmentFault) as caught:
        load_tokenizer(hostile)
    assert caught.value.hint
    assert "its own code, which is never run" in caught.value.hint
    (hostile / "tokenizer_config.json").write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match="nested deeper"):
        load_tokenizer(hostile)


@pytest.mark.long
def test_a_grown_model_keeps_none_of_it(pico_moe: Callable[[str], Path], tmp_path: Path) -> None:
    """A growth step copies the configuration of its source."""
    import upcycle

    source = poison(Path(shutil.copytree(pico_moe("mixtral"), tmp_path / "source")))
    upcycle.convert(str(source), tmp_path / "out", method="expert_upcycling", experts=8, verification={"tokens": 64})
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not set(written) & set(CONFIG) - {"harmless"}


RECIPE = """
model: {model}
output: {output}
data: {{domains: {{text: demo}}}}
stages: [{{name: heal, steps: 1, learning_rate: 0.0001, distillation: {{parent: {parent}}}}}]
length: 32
global_batch: 1
micro_batch: 1
saving: {{every: 1, keep: 1}}
"""
FEW = ["--verify-tokens", "64", "-q"]
COMMANDS = [
    "plan hostile --experts 4",
    "init first.yaml --model hostile --engine llama.cpp",
    "convert hostile moe --experts 4",
    "convert hostile split --method alternating --experts 4 --top-k 2 --calibration demo --calibration-tokens 512 "
    "--set calibration.window=64",
    "convert mix --method branch_train_mix --sources hostile,hostile2",
    "POISON moe",
    "verify moe --tokens 64",
    "convert moe grown --method expert_upcycling --experts 8",
    "convert moe more --method add_expert --sources hostile --set sources.0.text=recipe.yaml --calibration demo "
    "--calibration-tokens 512 --set calibration.window=32",
    "observe moe seen.safetensors --calibration demo --calibration-tokens 512 -q",
    "plan run moe --observations seen.safetensors",
    "compress moe smaller --keep 0.5 --method frequency --observations seen.safetensors --refit none",
    "compress moe ternary --method qmoe --observations seen.safetensors --refit none",
    "pack ternary packed",
    "unpack packed unpacked",
    "evaluate moe --reference hostile --tokens 64 --window 32",
    "evaluate moe --tasks passages --limit 1 --task-folder TASKS",
    "generate moe --prompt a --tokens 1",
    "generate moe --prompt a --tokens 1 --offload --memory 1GB",
    "chat hostile --tokens 1",
    "compare hostile --methods coactivation_kmeans --routers ridge --calibration-tokens 512 --tokens 64 --window 64",
    "report moe --tokens 64",
    "card moe",
    "push grown someone/grown --dry-run",
    "plan train recipe.yaml",
    "train recipe.yaml -q",
    "export run exported -q",
    "merge lora merged --base hostile -q",
    "grow rounds.yaml -q",
]
ROUNDS = """
source: hostile
output: forest
domains: {a: demo, b: demo}
rounds: 1
training: {length: 32, global_batch: 1, micro_batch: 1, stages: [{steps: 1, learning_rate: 0.0001}]}
merge: {verification: {tokens: 64}}
"""
NO_MODEL = {"list", "recipe", "completion", "demo", "env", "tune-kernels"}  # they load nothing of the user's


def test_every_verb_is_tried() -> None:
    assert {command.split()[0] for command in COMMANDS} - {"POISON"} | NO_MODEL == set(VERBS)


@pytest.mark.slow
def test_no_verb_runs_what_a_folder_names(
    hostile: Path, tmp_path: Path, traps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(hostile, tmp_path / "hostile2")
    hostile_adapter(tmp_path / "lora")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model="moe", output="run", parent="hostile"))
    (tmp_path / "rounds.yaml").write_text(ROUNDS)
    said = []
    for command in COMMANDS:
        verb, *arguments = command.replace("TASKS", str(ROOT / "tests" / "tasks")).split()
        if verb == "POISON":
            if (tmp_path / arguments[0]).is_dir():
                poison(tmp_path / arguments[0])
            continue
        if verb == "convert":
            arguments += FEW
        result = CliRunner().invoke(cli, [verb, *arguments], input="hello\n" if verb == "chat" else None)
        if verb == "push":  # asks the hub what is there, and nothing else
            assert traps
            assert all("huggingface.co" in each for each in traps)
            traps.clear()
        elif result.exit_code or traps:
            said.append(f"{command}: {result.exit_code} {traps} {result.output[-400:]} {result.exception!r}")
            traps.clear()
    assert not said, "\n".join(said)
    assert not list(tmp_path.rglob("RAN"))
    for name in ("moe", "split", "mix", "grown", "exported", "merged"):
        if name == "moe":
            continue  # poisoned since
        for path in (tmp_path / name).glob("*.json"):
            assert not _NAMED.search(path.read_text()), path
