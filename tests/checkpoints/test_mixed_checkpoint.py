"""Several sources: how they are named, compared, read and recorded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.cli.main import main
from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.recipe.conversion_recipe import parse_recipe

Branches = Callable[..., list[Path]]
MIX: dict[str, Any] = {"method": "branch_train_mix", "verification": {"enabled": False}}


def test_sources_are_names_or_mappings_and_the_first_is_the_source() -> None:
    recipe = parse_recipe({"sources": "a, b"}, "here")
    assert (recipe.source, recipe.revision) == ("a", None)
    assert [source.name for source in recipe.sources] == ["a", "b"]
    listed = [{"name": "x/a", "revision": "v1", "weight": 2}, "b"]
    recipe = parse_recipe({"sources": listed}, "here")
    assert (recipe.source, recipe.revision, recipe.sources[0].weight) == ("x/a", "v1", 2.0)
    assert parse_recipe({"sources": listed, "source": "c"}, "here").revision is None
    assert parse_recipe(yaml.safe_load(recipe.dump()), "again") == recipe


@pytest.mark.parametrize("sources", [3, [4], [{"weight": 1}], {"name": "a"}, [{"name": "a", "weight": "much"}]])
def test_sources_that_are_none(sources: Any) -> None:
    with pytest.raises(UsageError, match=r"here: key 'sources|here: key 'source'"):
        parse_recipe({"sources": sources}, "here")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pair(branches: Branches, tmp_path: Path) -> tuple[Path, Path]:
    one, two = branches(2)
    return one, Path(shutil.copytree(two, tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"rms_norm_eps": 1e-3}, ["'rms_norm_eps' is 1e-06", "0.001"]),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, ["'rope_parameters.rope_theta' is 10000.0", "500000.0"]),
        (
            {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
            ["'rope_parameters.factor' is None", "2.0"],
        ),
        ({"hidden_act": "gelu"}, ["'hidden_act' is silu", "gelu"]),
        ({"num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1}, ["'num_attention_heads' is 4", "2 in"]),
    ],
)  # fmt: skip
def test_configurations_that_differ(
    changes: dict[str, Any], parts: list[str], branches: Branches, tmp_path: Path
) -> None:
    one, two = pair(branches, tmp_path)
    change_config(two, **changes)
    with pytest.raises(UsageError, match=r"sources differ: config.json's") as caught:
        upcycle.plan(None, sources=[str(one), str(two)], **MIX)
    for part in [*parts, str(one), str(two)]:
        assert part in caught.value.message
    assert "fine-tunes of one model" in str(caught.value.hint)


def test_models_of_other_shapes_and_families(branches: Branches, pico: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, value in (("num_hidden_layers", 2), ("intermediate_size", 64), ("tie_word_embeddings", True)):
        sizes = json.loads((pico("llama") / "config.json").read_text()) | {name: value}
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / name)
        with pytest.raises(UsageError, match=f"'{name}' is "):
            upcycle.plan(None, sources=[str(pico("llama")), str(tmp_path / name)], **MIX)
    with pytest.raises(UsageError, match=r"'model_type' is llama in .* and mistral in "):
        upcycle.plan(None, sources=[str(pico("llama")), str(pico("mistral"))], **MIX)


def test_tokenizers_that_differ_name_their_tokens(branches: Branches, tmp_path: Path) -> None:
    one, two = pair(branches, tmp_path)
    path = two / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 4095, "content": "<|call|>"})
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"give different ids to") as caught:
        upcycle.plan(None, sources=[str(one), str(two)], **MIX)
    assert "'<|call|>' (absent, 4095)" in caught.value.message
    upcycle.plan(None, sources=[str(one), str(two)], tokenizer="none", **MIX)
    content["added_tokens"].pop()
    content["model"]["merges"] = content["model"]["merges"][::-1]
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"model.merges' is not the same"):
        upcycle.plan(None, sources=[str(one), str(two)], **MIX)


def test_vocabularies_of_other_sizes(pico: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = json.loads((pico("llama") / "config.json").read_text()) | {"vocab_size": 4097}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "larger")
    with pytest.raises(UsageError, match=r"'vocab_size' is 4096 in .* and 4097 in "):
        upcycle.plan(None, sources=[str(pico("llama")), str(tmp_path / "larger")], **MIX)


def test_dtypes_that_differ_are_refused_unless_one_is_chosen(branches: Branches, tmp_path: Path) -> None:
    one, two = pair(branches, tmp_path)
    tensors = load_file(two / "model.safetensors")
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halved, two / "model.safetensors", metadata={"format": "pt"})
    sources = [str(one), str(two)]
    with pytest.raises(UsageError, match=r"is float32 in .* and bfloat16 in ") as caught:
        upcycle.plan(None, sources=sources, **MIX)
    assert "--dtype float32" in str(caught.value.hint)
    upcycle.convert(None, tmp_path / "out", sources=sources, dtype="float32", **MIX)
    made = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.norm.weight"
    expected = (load_file(one / "model.safetensors")[name].double() + halved[name].double()) / 2
    assert torch.equal(made[name], expected.float())


def test_a_moe_among_the_sources(branches: Branches, tmp_path: Path) -> None:
    (one,) = branches(1)
    upcycle.convert(str(one), tmp_path / "moe", experts=2, verification={"enabled": False})
    with pytest.raises(upcycle.errors.RefusalError, match=r"mixtral"):
        upcycle.plan(None, sources=[str(one), str(tmp_path / "moe")], **MIX)


def test_everything_is_recorded(branches: Branches, tmp_path: Path) -> None:
    sources = branches(2)
    listed = [{"name": str(sources[0]), "weight": 2.0}, {"name": str(sources[1])}]
    upcycle.convert(None, tmp_path / "out", sources=listed, **MIX)
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert [(source["name"], source["weight"]) for source in record["sources"]] == [
        ("model", 2.0),
        ("model-2", 1.0),
    ]
    assert all(len(source["fingerprint"]) == 64 for source in record["sources"])
    assert [source["name"] for source in record["plan"]["sources"]] == ["model", "model-2"]
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (written["source"], len(written["sources"])) == ("model", 2)


def test_the_same_sources_give_the_same_bytes_from_recipe_and_blueprint(branches: Branches, tmp_path: Path) -> None:
    from upcycle.conversion.convert import run_recipe
    from upcycle.recipe.conversion_recipe import read_recipe

    sources = list(map(str, branches(3)))
    upcycle.convert(None, tmp_path / "one", sources=sources, parameters={"chunks": 2}, **MIX)
    run_recipe(parse_recipe(read_recipe(tmp_path / "one" / "recipe.yaml"), "recipe"), tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    saved = tmp_path / "one" / "blueprint.safetensors"
    upcycle.convert(None, tmp_path / "three", sources=sources, blueprint=saved, verification={"enabled": False})
    assert (tmp_path / "three" / "model.safetensors").read_bytes() == (
        tmp_path / "one" / "model.safetensors"
    ).read_bytes()


def test_the_command_line(branches: Branches, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ",".join(map(str, branches(2)))
    flags = ["--method", "branch_train_mix", "--no-verify", "-q"]
    for arguments in (["convert", str(tmp_path / "a")], ["convert", str(branches(1)[0]), str(tmp_path / "b")]):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--sources", names, *flags])
        assert not caught.value.code
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(tmp_path / "c"), *flags])
    assert caught.value.code == 2
    assert "missing argument 'OUT'" in capsys.readouterr().err


def test_an_out_that_is_one_of_the_sources(branches: Branches, tmp_path: Path) -> None:
    one, two = pair(branches, tmp_path)
    with pytest.raises(UsageError, match="upcycle did not write what is in it"):
        upcycle.convert(None, two, sources=[str(one), str(two)], overwrite=True, **MIX)


def test_any_source_that_changes_meanwhile_is_noticed(
    branches: Branches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upcycle.conversion import convert

    one, two = pair(branches, tmp_path)
    write = convert.write_index

    def touch(*arguments: object) -> None:
        (two / "model.safetensors").touch()
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "write_index", touch)
    with pytest.raises(CheckpointError, match=r"changed while it was read"):
        upcycle.convert(None, tmp_path / "out", sources=[str(one), str(two)], **MIX)


STOP = """
import os, sys
import upcycle
from upcycle.checkpoints.shard_writer import ShardWriter
finish = ShardWriter.finish
def stop(self, unit):
    finish(self, unit)
    if unit.name == "layer 1":
        os.kill(os.getpid(), 9)
ShardWriter.finish = stop
upcycle.convert(None, sys.argv[1], sources=sys.argv[2:], method="branch_train_mix", verification={"enabled": False})
"""


@pytest.mark.long
def test_killed_then_resumed_is_byte_equal(branches: Branches, tmp_path: Path) -> None:
    sources = list(map(str, branches(3)))
    killed = subprocess.run(
        [sys.executable, "-P", "-c", STOP, str(tmp_path / "out"), *sources], check=False, env=dict(os.environ)
    )
    assert killed.returncode == -9
    result = upcycle.convert(None, tmp_path / "out", sources=sources, **MIX)
    assert result.resumed
    upcycle.convert(None, tmp_path / "whole", sources=sources, **MIX)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_one_block_of_one_source_is_in_memory_whatever_their_number(
    branches: Branches, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upcycle.architectures.tensor_origin import Origin
    from upcycle.checkpoints import merged_checkpoint
    from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint
    from upcycle.files.formats.tensor_files import SafetensorsFolder
    from upcycle.planning.job import method_of
    from upcycle.planning.open_sources import open_sources

    monkeypatch.setattr(merged_checkpoint, "SUM_BYTES", 8 * 32 * 64)
    read, alive, most = SafetensorsFolder.chunks, weakref.WeakSet[Any](), []

    def watched(self: SafetensorsFolder, *arguments: Any) -> Iterator[torch.Tensor]:
        for block in read(self, *arguments):
            alive.add(block)
            most.append((len(alive), len(block)))
            yield block

    for count in (2, 4):
        recipe = parse_recipe({"sources": list(map(str, branches(count))), "method": "branch_train_mix"}, "test")
        checkpoint = open_sources(recipe, method_of(recipe))
        assert isinstance(checkpoint, MixedCheckpoint)
        assert checkpoint.rest == (*[1.0] * count, 0.0)
        with monkeypatch.context() as patched:
            patched.setattr(SafetensorsFolder, "chunks", watched)
            rows = sum(len(block) for block in checkpoint.blocks(Origin("model.embed_tokens.weight")))
        assert rows == 4096
        assert len(most) == count * 4096 // 64
        assert set(most) == {(1, 64)}
        most.clear()


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "two more tokens": ("llama", {"vocab_size": 4098}),
    "another rope": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "a tied head": ("llama", {"tie_word_embeddings": True}),
    "other heads": ("llama", {"num_key_value_heads": 4}),
    "a window": ("mistral", {"sliding_window": 16}),
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("what", OTHERS)
def test_what_only_ffns_are_read_of_may_differ_elsewhere(
    what: str, pico: Callable[[str], Path], branches: Branches, dense_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """With rest=base an expert's model gives its FFNs: each is in the result as it was; an average refuses the same models."""
    model_type, changes = OTHERS[what]
    other, plain = dense_maker(tmp_path / "other", model_type, **changes), branches(1)[0]
    keys = {"method": "branch_train_mix", "sources": [{"name": str(plain)}, {"name": str(other)}], "tokenizer": "none"}
    only = {"rest": "base"}
    made = upcycle.convert(
        str(pico("llama")), tmp_path / "out", parameters=only, verification={"tokens": 64}, top_k=2, **keys
    )
    assert made.verification is not None
    written = SafetensorsFolder(tmp_path / "out")
    for expert, source in enumerate((plain, other)):
        for name, part in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            stored = written.read(f"model.layers.2.block_sparse_moe.experts.{expert}.{name}.weight")
            assert torch.equal(stored, SafetensorsFolder(source).read(f"model.layers.2.mlp.{part}_proj.weight"))
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(written.read(embeddings), SafetensorsFolder(pico("llama")).read(embeddings))
    with pytest.raises(UsageError, match=r"sources differ: config.json's '(?!windows|family|qkv_bias)"):
        upcycle.plan(str(pico("llama")), top_k=2, **keys)


@pytest.mark.parametrize(
    ("model_type", "changes", "key"),
    [
        ("llama", {"intermediate_size": 48}, "intermediate_size"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"num_hidden_layers": 2}, "num_hidden_layers"),
        ("olmo2", {}, "model_type"),
    ],
)
def test_ffns_that_do_not_fit_are_refused_by_their_key(
    model_type: str,
    changes: dict[str, Any],
    key: str,
    pico: Callable[[str], Path],
    dense_maker: Callable[..., Path],
    tmp_path: Path,
) -> None:
    other = dense_maker(tmp_path / "other", model_type, **changes)
    keys = {"parameters": {"rest": "base"}, "sources": [{"name": str(pico("llama"))}, {"name": str(other)}]}
    with pytest.raises(UsageError, match=f"config.json's '{key}' is"):
        upcycle.plan(str(pico("llama")), method="branch_train_mix", top_k=2, tokenizer="none", **keys)
