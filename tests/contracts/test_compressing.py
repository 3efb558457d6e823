"""What every registered method that compresses a MoE promises, on every stock MoE."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from any_moe import auto_class_of
from permuted_experts import permuted
from pico_models import PICO_MOE
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.architectures.moe_families import MOES
from upcycle.calibration.compressing import observe_moe, refit_cut, refit_depth, round_ternary
from upcycle.checkpoints.shard_writer import ShardWriter
from upcycle.conversion.convert import run_recipe
from upcycle.errors import CheckpointError, RefusalError, UsageError
from upcycle.files import hashing, records
from upcycle.files.output.workspace import LAYER_BLUEPRINTS
from upcycle.recipe.conversion_recipe import parse_recipe, read_recipe
from upcycle.registry import METHODS, load

pytestmark = pytest.mark.one_in(40)  # the other cases are long

Models = Callable[..., Path]
COMPRESSIONS = [
    name for name in METHODS if load("method", name).kind == "compression" and load("method", name).removes
]  # quantize: test_precision.py
NAMES = [  # to_dense: test_to_dense.py; layer_drop: test_layer_drop.py, as few architectures can have such layers
    name  # those that no stock class holds: test_wrapped_moe.py
    for name in COMPRESSIONS
    if not load("method", name).dense and not load("method", name).mixes and not load("method", name).wrapped
]
INSIDE = ("slim", "resplit")  # those that change the width of experts
WHOLE = [
    name for name in NAMES if name not in (*INSIDE, "lower_top_k", "sparse_experts", "block_drop", "qmoe")
]  # those whose result has fewer experts
SAME_SIZE = ("lower_top_k", "resplit", "sparse_experts", "qmoe")
LEFT = {
    "slim": 4,
    "lower_top_k": 4,
    "resplit": 8,
    "sparse_experts": 4,
    "block_drop": 4,
    "qmoe": 4,
}  # experts that others leave of four, here
TEXT: dict[str, Any] = {"text": "demo", "tokens": 512, "window": 32}
QUICK: dict[str, Any] = {"keep": 0.75, "calibration": TEXT, "verification": {"tokens": 64}}
ONE_WIDTH = (  # of routed and shared experts
    *(
        "hunyuan_v1_moe",
        "glm4_moe",
        "glm4_moe-sigmoid",
        "dots1",
        "solar_open",
        "deepseek_v3",
        "deepseek_v2",
        "glm4_moe_lite",
    ),
    *("exaone_moe", "ernie4_5_moe"),
)
MIXED = ("phimoe", "phimoe-constant")  # two experts by SparseMixer, whatever the configuration says
REFUSED = {  # what cannot be done truly, and why
    **{("lower_top_k", name): "top_k 1: a 'phimoe' router always chooses 2 experts" for name in MIXED},
    **{("resplit", name): "SparseMixer, by which a 'phimoe' routes, divides weights" for name in MIXED},
    ("resplit", "gpt_oss"): "every expert adds a bias to its output, and finer ones would add it once each",
    ("qmoe", "gpt_oss"): "qmoe rounds gate, up and down of experts alone, and those of a 'gpt_oss' model have biases",
}
CELLS = [
    (method, name, fused)
    for method in NAMES
    for name in PICO_MOE
    for fused in (False, True)
    if (method not in INSIDE or name not in ONE_WIDTH) and (method, name) not in REFUSED
]


def quick(method: str) -> dict[str, Any]:
    """Recipe keys with a part that can be kept: of four experts, two per token, sixteen neurons in steps of eight, or two layers."""
    return QUICK if method in WHOLE else {**QUICK, "keep": 0.5}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def logits(folder: Path) -> torch.Tensor:
    model = auto_class_of(folder).from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return torch.as_tensor(
            model(torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))).logits.double()
        )


@pytest.mark.parametrize("method", INSIDE)
@pytest.mark.parametrize("name", ONE_WIDTH)
def test_experts_whose_width_is_another_matrix_too_are_not_made_narrower(
    name: str, method: str, pico_moe: Models
) -> None:
    with pytest.raises(RefusalError, match=r"their width in config\.json is that of '.*shared.*', too"):
        upcycle.plan(str(pico_moe(name)), method=method, **quick(method))


@pytest.mark.parametrize(("method", "name"), REFUSED)
def test_what_an_architecture_cannot_have_is_refused_with_the_reason(method: str, name: str, pico_moe: Models) -> None:
    with pytest.raises(RefusalError, match=REFUSED[method, name]) as caught:
        upcycle.plan(str(pico_moe(name)), method=method, **quick(method))
    assert caught.value.hint


def test_experts_with_biases_are_not_trained_by_blocks(pico_moe: Models) -> None:
    with pytest.raises(RefusalError, match="refit: blocks trains gate, up and down of experts alone"):
        upcycle.plan(str(pico_moe("gpt_oss")), method="reap", refit="blocks", **QUICK)


def test_every_method_and_architecture_is_here() -> None:
    assert {"frequency", "reap", "naee", "hc_smoe", "m_smoe", "random_experts"} <= set(NAMES)
    assert {PICO_MOE[name][0] for _, name, _ in CELLS} == set(MOES)


@pytest.mark.one_in(240)
@pytest.mark.parametrize(("method", "name", "fused"), CELLS)
def test_keeping_all_changes_nothing_bit_for_bit(
    method: str, name: str, fused: bool, pico_moe: Models, tmp_path: Path
) -> None:
    source, out = pico_moe(name, fused), tmp_path / "out"
    result = upcycle.convert(str(source), out, method=method, keep=1.0, verification={"tokens": 64})
    assert result.verification is not None
    assert (result.verification.verdict, result.verification.relative_logit_error) == ("exact", 0.0)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


@pytest.mark.one_in(240)
@pytest.mark.parametrize(("method", "name", "fused"), CELLS)
def test_a_smaller_model_loads_in_stock_transformers_and_writes(
    method: str, name: str, fused: bool, pico_moe: Models, tmp_path: Path
) -> None:
    source, out = pico_moe(name, fused), tmp_path / "out"
    before = contents(source)
    result = upcycle.convert(str(source), out, method=method, **quick(method))
    assert contents(source) == before
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    assert result.verification.relative_logit_error > 1e-4  # something is gone: the comparison sees it
    model, loading = auto_class_of(out).from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    model.set_experts_implementation("eager")
    blocks = [module for name, module in model.named_modules() if name.endswith(".experts")]
    layers = json.loads((out / "compression.json").read_text())["experts"]
    assert len(blocks) == 1 if load("method", method).depth else len(blocks) == len(layers)
    left = 12 if (method, name) == ("resplit", "qwen3_vl_moe") else LEFT.get(method, 3)  # of 24 neurons each, in eights
    assert all(len(block.down_proj) == left for block in blocks)
    written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape == (1, 7)
    elements = {name: tensor.numel() for name, tensor in load_file(out / "model.safetensors").items()}
    assert sum(elements.values()) == result.plan.parameters_total
    assert result.plan.flops_per_token < result.plan.flops_per_token_dense or method in (
        *WHOLE,
        "sparse_experts",
        "qmoe",
    )
    assert result.plan.parameters_total < result.plan.parameters_dense or method in SAME_SIZE


@pytest.mark.one_in(60)
@pytest.mark.parametrize("method", NAMES)
def test_same_inputs_give_the_same_bytes_as_planned(method: str, pico_moe: Models, tmp_path: Path) -> None:
    keys = {"method": method, **quick(method), "max_shard_size": "60KB"}
    source = str(pico_moe("qwen3_moe"))
    plan = upcycle.plan(source, **keys)
    results = [upcycle.convert(source, tmp_path / folder, **keys) for folder in ("one", "two")]
    run_recipe(parse_recipe(read_recipe(tmp_path / "one" / "recipe.yaml"), "recipe"), tmp_path / "again")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "again")
    assert results[0].plan == plan
    refit = "down" if load("method", method).refits else "none"
    assert (plan.kind, plan.refit, plan.promise) == ("compression", refit, "approximate")
    assert method not in WHOLE or plan.summary == "3 experts from 4, top-2"
    sizes = [(tmp_path / "one" / shard["file"]).stat().st_size for shard in plan.shards]
    assert len(sizes) > 2
    assert plan.bytes_output < sum(sizes) < 1.3 * plan.bytes_output  # and headers
    assert upcycle.verify(tmp_path / "one", tokens=64) == results[0].verification
    assert not (tmp_path / "one" / LAYER_BLUEPRINTS).exists()


def tries(method: str) -> bool:
    """Whether a method, by default, runs layers on text before it decides."""
    made = load("method", method)
    return bool(made(made.Parameters()).tries)


@pytest.mark.one_in(48)
@pytest.mark.parametrize("refit", ["none", "down"])
@pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for method in NAMES
        for name in ("mixtral", "dots1", "granitemoe", "qwen3_vl_moe", "gpt_oss", "phimoe")
        if (method, name) not in REFUSED
        and method not in ("random_experts", "sparse_experts")
        and (method not in INSIDE or name not in ONE_WIDTH)
        and (method, name)
        not in (
            ("resplit", "granitemoe"),
            ("resplit", "qwen3_vl_moe"),
        )  # finer experts with equal rows, of which top-k takes any
    ],
)
def test_the_order_of_the_experts_does_not_matter(
    method: str, name: str, refit: str, pico_moe: Models, tmp_path: Path
) -> None:
    other = permuted(pico_moe(name), tmp_path / "permuted")
    keys = {"method": method, **quick(method), "keep": 0.5, "refit": refit, "verification": {"enabled": False}}
    assert torch.dist(logits(pico_moe(name)), logits(other)) < 1e-5 * torch.linalg.norm(logits(other))
    upcycle.convert(str(pico_moe(name)), tmp_path / "one", **keys)
    upcycle.convert(str(other), tmp_path / "two", **keys)
    one, two = logits(tmp_path / "one"), logits(tmp_path / "two")
    assert torch.dist(one, two) < 1e-4 * torch.linalg.norm(one)  # sums in another order, and least squares of them


@pytest.mark.one_in(60)
@pytest.mark.parametrize(
    ("method", "stop"),
    [
        (method, stop)
        for stop in ("after observing", "while refitting", "while writing")
        for method in NAMES
        if (stop != "after observing" or load("method", method).observes)
        and (stop != "while refitting" or load("method", method).refits)
    ],
)
def test_a_stopped_compression_continues_byte_equal(
    method: str, stop: str, pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, keys = str(pico_moe("mixtral")), {"method": method, **quick(method)}

    def interrupt(*given: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    if stop == "after observing":
        monkeypatch.setattr(load("method", method), "cuts", interrupt)
    elif stop == "while refitting":
        monkeypatch.setattr(refit_cut.LayerFit, "set", interrupt)
        monkeypatch.setattr(round_ternary, "_round_layer", interrupt)
    else:
        finish, finished = ShardWriter.finish, []

        def stopping(writer: ShardWriter, unit: Any) -> None:
            finish(writer, unit)
            finished.append(unit.name)
            if len(finished) == 2:
                writer._wait_for_oldest()
                raise KeyboardInterrupt

        monkeypatch.setattr(ShardWriter, "finish", stopping)
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(source, tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr(observe_moe, "MoeWalk", interrupt)  # what was observed is not observed again
    if stop != "after observing":
        monkeypatch.setattr(load("method", method), "cuts", interrupt)
    if stop == "while writing":
        monkeypatch.setattr(refit_cut, "refit_cuts", interrupt)
        monkeypatch.setattr(refit_depth, "refit_depth", interrupt)
        monkeypatch.setattr(round_ternary, "round_ternary", interrupt)
    upcycle.convert(source, tmp_path / "out", **keys)
    monkeypatch.undo()
    upcycle.convert(source, tmp_path / "whole", **keys)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("method", list(filter(tries, NAMES)))
def test_a_method_that_runs_layers_asks_for_text_beside_observations(
    method: str, pico_moe: Models, tmp_path: Path
) -> None:
    source, seen = str(pico_moe("mixtral")), tmp_path / "seen.safetensors"
    upcycle.observe(source, seen, "demo", 256)
    with pytest.raises(UsageError, match=f"{method}.* text"):
        upcycle.plan(source, method=method, keep=0.5, refit="none", observations=str(seen))
    plan = upcycle.plan(source, method=method, keep=0.5, refit="none", observations=str(seen), calibration=TEXT)
    assert plan.calibration_tokens == TEXT["tokens"]


@pytest.mark.one_in(16)
@pytest.mark.parametrize("method", [name for name in NAMES if not tries(name) and not load("method", name).makes])
def test_observations_of_the_same_text_decide_the_same(method: str, pico_moe: Models, tmp_path: Path) -> None:
    source, seen = str(pico_moe("mixtral" if method in INSIDE else "dots1")), tmp_path / "seen.safetensors"
    text = {"text": "demo", "tokens": 512}
    upcycle.observe(source, seen, "demo", 512)
    keys = {"method": method, **quick(method), "refit": "none"}
    upcycle.convert(source, tmp_path / "one", **{**keys, "calibration": text})
    keys.pop("calibration")
    result = upcycle.convert(source, tmp_path / "two", observations=str(seen), **keys)
    assert result.plan.calibration_tokens == 0
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.one_in(24)
@pytest.mark.parametrize("method", NAMES)
def test_a_changed_tensor_is_found_by_name(method: str, pico_moe: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    keys = {**quick(method), **({"refit": "none"} if method == "qmoe" else {})}  # else that tensor is refitted
    upcycle.convert(str(pico_moe("mixtral")), out, method=method, **keys)
    path = out / "model.safetensors"
    tensors = load_file(path)
    # The weights that SparseGPT leaves in experts make up for those that go, and are in no file to compare with.
    changed = "self_attn.q_proj" if method == "sparse_experts" else "experts.2.w1"
    victim = [name for name in tensors if changed in name][-1]
    save_file({**tensors, victim: -tensors[victim]}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="not the file that was written"):
        upcycle.verify(out, tokens=64)
    record = records.read_record(out)
    record["files"][path.name] = hashing.hash_file(path)
    (out / records.FILE).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=f"tensor '{victim}' is not"):
        upcycle.verify(out, tokens=64)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("experts", 4), ("top_k", 1), ("shared", 1), ("active", 0.5), ("router", "zero"), ("scale", "sum")),
        *(("layers", "all"), ("layout", "fused"), ("pad", True), ("width", 8)),
    ],
)
def test_keys_that_mean_nothing_are_refused(
    method: str, key: str, value: Any, pico_moe: Models, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"{method} compresses .* does not read the key '{key}'") as caught:
        upcycle.convert(str(pico_moe("mixtral")), tmp_path / "out", method=method, **quick(method), **{key: value})
    assert "keep" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.one_in(16)
@pytest.mark.parametrize("method", NAMES)
def test_half_precision_is_kept_and_refits_are_rounded_once(method: str, pico_moe: Models, tmp_path: Path) -> None:
    source = shutil.copytree(pico_moe("mixtral"), tmp_path / "half")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    result = upcycle.convert(str(source), tmp_path / "out", method=method, **quick(method))
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
