"""What every method promises that puts experts beside FFNs: the dense model bit for bit, and experts that add nothing yet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from training_runs import recipe_for, run
from transformers import AutoModelForCausalLM
from wrapped_models import small_model

import upcycle
import upcycle.models
from upcycle.checkpoints.shard_writer import ShardWriter
from upcycle.cli.main import cli
from upcycle.conversion.beside_conversion import instruction_clusters
from upcycle.errors import CheckpointError, RefusalError, UsageError
from upcycle.files import hashing, records
from upcycle.files.locate import DEMO_FOLDER
from upcycle.registry import METHODS, load
from upcycle.text.beginnings import beginnings

Pico = Callable[[str], Path]
NAMES = [name for name in METHODS if load("method", name).kind == "beside"]
QUICK: dict[str, Any] = {"verification": {"tokens": 64}}
TEXT: dict[str, Any] = {"text": "demo", "tokens": 1024}
KEYS: dict[str, dict[str, Any]] = {
    "mocle": {"calibration": TEXT, "parameters": {"rank": 2, "clusters": 4, "instruction": 8}},
    "pesc": {"parameters": {"rank": 4}, "experts": 3, "dtype": "bfloat16"},
}
CASES = [*KEYS.items(), ("mocle", {"parameters": {"rank": 2, "router": "tokens", "universal": False}, "layers": [1]})]


def dense_of(name: str, pico: Pico, folder: Path) -> Path:
    """A folder with a tokenizer: of a family with stock targets, or of one that is described by its FFNs."""
    if name == "llama":
        return pico("llama")
    small_model(name, vocab_size=4096).save_pretrained(folder / "dense")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / "model" / file, folder / "dense" / file)
    return folder / "dense"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_method_is_tried() -> None:
    assert set(KEYS) == set(NAMES)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("source", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(("name", "keys"), CASES, ids=["mocle", "pesc", "tokens"])
def test_the_result_is_the_dense_model(
    name: str, keys: dict[str, Any], source: str, pico: Pico, tmp_path: Path
) -> None:
    dense = dense_of(source, pico, tmp_path)
    done = upcycle.convert(str(dense), tmp_path / "out", method=name, **keys, **QUICK)
    assert done.verification is not None
    assert (done.verification.promise, done.verification.verdict) == ("exact", "exact")
    assert done.plan == upcycle.plan(str(dense), method=name, **keys, **QUICK)
    stored, written = load_file(dense / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    new = {key for key in written if key.replace(".dense.", ".") not in stored and f"transformer.{key}" not in stored}
    assert all(".experts." in key or ".router." in key or "instruction_clusters" in key for key in new)
    assert done.verification.compared_tensors == sum(not _drawn(key) for key in written)
    assert done.plan.parameters_total - done.plan.parameters_dense == sum(written[key].numel() for key in new)
    assert sum(key.endswith(".b") for key in new) * 2 == sum(key.endswith((".a", ".b")) for key in new)
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    dtype = getattr(torch, str(keys.get("dtype", "float32")))
    with torch.no_grad():
        loaded = [AutoModelForCausalLM.from_pretrained(at, dtype=dtype) for at in (dense, tmp_path / "out")]
        assert torch.equal(*(model(ids).logits for model in loaded))


def _drawn(name: str) -> bool:
    return name.endswith((".a", "router.weight", "router.clusters", ".products", ".norms"))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", NAMES)
def test_same_inputs_give_the_same_bytes_and_a_stopped_run_goes_on(
    name: str, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, dense = {"method": name, **KEYS[name], **QUICK}, str(pico("llama"))
    upcycle.convert(dense, tmp_path / "one", **keys)
    finish, finished = ShardWriter.finish, []

    def stop(writer: ShardWriter, unit: Any) -> None:
        finish(writer, unit)
        finished.append(unit.name)
        if len(finished) == 2:
            writer._wait_for_oldest()
            raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(dense, tmp_path / "two", **keys)
    monkeypatch.undo()
    monkeypatch.setattr("upcycle.conversion.beside_conversion.instruction_clusters", None)  # not decided again
    assert upcycle.convert(dense, tmp_path / "two", **keys).resumed
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    monkeypatch.undo()
    other = upcycle.convert(dense, tmp_path / "other", **{**keys, "seed": 1})
    assert (other.out / "model.safetensors").read_bytes() != (tmp_path / "one" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_tensor_of_the_dense_model_is_found(name: str, pico: Pico, tmp_path: Path) -> None:
    out = tmp_path / "out"
    upcycle.convert(str(pico("llama")), out, method=name, **KEYS[name], **QUICK)
    path, victim = out / "model.safetensors", "model.layers.1.mlp.dense.up_proj.weight"
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    content[7 + header + json.loads(content[8 : 8 + header])[victim]["data_offsets"][1]] ^= 0x80
    path.write_bytes(content)
    record = records.read_record(out)
    record["files"][path.name] = hashing.hash_file(path)
    (out / records.FILE).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=f"tensor '{victim}' is not"):
        upcycle.verify(out, tokens=64)


def test_clusters_are_those_of_the_instructions(tmp_path: Path) -> None:
    """Rows of two kinds, which share no token, are two clusters, and the model tells them apart by their first tokens."""
    from upcycle.architectures.stock import load_tokenizer
    from upcycle.recipe.recipe_parts import CalibrationRecipe

    kinds = ["translate into French", "42 plus 17 is"]
    rows = [json.dumps({"prompt": f"{kinds[n % 2]} {n // 2}"}) for n in range(20)]
    (tmp_path / "asked.jsonl").write_text("\n".join(rows))
    tokenizer = load_tokenizer(DEMO_FOLDER / "model")
    wanted = CalibrationRecipe(text=str(tmp_path / "asked.jsonl"), tokens=4096, column="prompt")
    windows = beginnings(wanted, tokenizer, 16)
    assert windows.shape == (20, 16)
    one = tokenizer(f"{kinds[0]} 0", add_special_tokens=False)["input_ids"]
    assert windows[0].tolist() == (one * 16)[:16]  # a short row counts as often as it fits
    embeddings = torch.randn(4096, 24, generator=torch.Generator().manual_seed(0))
    centroids, sizes = instruction_clusters(embeddings, windows, 2, 0)
    assert sorted(sizes) == [10, 10]
    means = torch.stack([embeddings[windows[kind::2]].mean((0, 1)) for kind in range(2)])
    assert torch.cdist(means, centroids).min(1).values.max() < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_experts_and_routers_train_while_the_dense_model_stays(name: str, pico: Pico, tmp_path: Path) -> None:
    """And the trained folder verifies, generates, evaluates and reports as any other does."""
    moe = tmp_path / "moe"
    upcycle.convert(str(pico("llama")), moe, method=name, **{**KEYS[name], "dtype": "keep"}, **QUICK)
    stage = {"train": ["router", "experts"], "losses": {"switch_balance": {}} if name == "pesc" else {}}
    recipe = recipe_for(moe, tmp_path, stage=stage, saving={"every": 9, "export": True})
    result, _ = run(recipe)
    before, after = (load_file(Path(at) / "model.safetensors") for at in (moe, str(result.model)))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    trained = {key for key in before if (".experts." in key or ".router." in key)}
    assert changed <= trained
    assert {key for key in trained if key.endswith(".b")} <= changed
    assert {key for key in trained if ".router." in key} <= changed
    verified = upcycle.verify(str(result.model), tokens=64)
    assert verified.promise == "trained"
    assert verified.relative_logit_error > 1e-4
    for command in (
        ["generate", str(result.model), "--prompt", "the cat", "--tokens", "4"],
        ["evaluate", str(result.model), "--text", "prose", "--window", "64", "--tokens", "256"],
        ["card", str(result.model)],
    ):
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 0, (command, done.output)


@pytest.mark.parametrize(
    ("keys", "fault", "message"),
    [
        ({"method": "pesc", "top_k": 9}, UsageError, "top_k is 9, and there are 8 experts"),
        ({"method": "pesc", "target": "mixtral"}, UsageError, "only upcycle_moe holds such a model, not 'mixtral'"),
        ({"method": "pesc", "shared": 1}, UsageError, "puts experts beside FFNs, and does not read the key 'shared'"),
        ({"method": "mocle"}, UsageError, "the clustering of instructions looks at text and needs some"),
        (
            {"method": "mocle", "calibration": {"text": "prose", "tokens": 65536}, "parameters": {"instruction": 4096}},
            UsageError,
            r"there are \d instructions in the calibration text, and 16 clusters",
        ),
        (
            {"method": "mocle", "calibration": {"text": "prose"}, "parameters": {"instruction": 10**8}},
            UsageError,
            "16 clusters need as many instructions of 100,000,000 tokens, and calibration.tokens is 65,536",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(
    keys: dict[str, Any], fault: type[Exception], message: str, pico: Pico, tmp_path: Path
) -> None:
    with pytest.raises(fault, match=message):
        upcycle.convert(str(pico("llama")), tmp_path / "out", **keys)


def test_models_whose_ffn_is_no_module_are_refused(tmp_path: Path, pico: Pico) -> None:
    with pytest.raises(RefusalError, match="its FFN is two modules that a layer calls one after another"):
        upcycle.convert(str(dense_of("bert", pico, tmp_path)), tmp_path / "out", method="pesc")
