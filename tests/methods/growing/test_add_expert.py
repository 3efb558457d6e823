"""An added expert: the fine-tune's FFN bit for bit, a row by ridge regression, and everything else as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from any_moe import auto_class_of
from click.testing import CliRunner
from pico_models import PICO, PICO_MOE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.checkpoints.shard_writer import ShardWriter
from upcycle.cli.main import cli
from upcycle.errors import CheckpointError, RefusalError, UsageError
from upcycle.files import hashing, records
from upcycle.registry import FAMILIES, TARGETS, load

Models = Callable[..., Path]
PROSE = "demo:prose"
E = 4
SMALL: dict[str, Any] = {"verification": {"tokens": 64}, "calibration": {"text": "demo", "tokens": 512, "window": 64}}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text of another kind than the demo's."""
    path = tmp_path_factory.mktemp("text") / "law.txt"
    lines = [
        f"Section {i}. The party of part {i % 7} shall, by law {i * i}, pay {i} crowns to the other party."
        for i in range(400)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def keys(dense: Path | str, text: str, **told: Any) -> dict[str, Any]:
    return {"method": "add_expert", "sources": [{"name": str(dense), "text": text, **told}], **SMALL}


FITTING = {"phimoe": "stablelm", "granitemoehybrid": "granite"}  # FFNs of the first families are of another form


def dense_for(name: str, width: int, dense_maker: Models, folder: Path) -> Path:
    """A dense model whose FFNs can be experts of a pico MoE."""
    able = [f for f in FAMILIES if name in load("family", f).targets] if name in TARGETS else ["llama"]
    able = [FITTING[name]] if name in FITTING else able
    case = next(case for case, (family, _) in PICO.items() if family == able[0])
    changes = {**PICO[case][1], "num_hidden_layers": 2, "intermediate_size": width}
    changes |= {key: changes[key][:2] for key in ("layer_types", "layer_rope_theta") if key in changes}
    changes |= {"shared_intermediate_size": width} if "shared_intermediate_size" in changes else {}
    own = PICO_MOE[name][1].get("residual_multiplier", 1.0) if name in PICO_MOE else 1.0
    changes |= {"residual_multiplier": own} if "residual_multiplier" in changes else {}
    return dense_maker(folder, able[0], **changes)


def experts(folder: Path, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate_up, down and the router's rows of a layer, as stock transformers loads them."""
    state = auto_class_of(folder).from_pretrained(folder, dtype=torch.float32).state_dict()
    own = {name: part for name, part in state.items() if f".layers.{layer}." in name}
    pick = lambda *ends: next(part for name, part in own.items() if name.endswith(ends) and "shared" not in name)  # noqa: E731
    return (
        pick("experts.gate_up_proj"),
        pick("experts.down_proj"),
        pick(".gate.weight", ".router.weight", "gate.wg.weight"),
    )


def matrices(folder: Path, layer: int) -> list[torch.Tensor]:
    """gate, up and down of a dense layer, as stock transformers loads them."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    own = {name.split(".")[-2]: part for name, part in state.items() if f".layers.{layer}." in name}
    if "input_linear" in own:
        return [*own["input_linear"].chunk(2), own["output_linear"]]
    return [own[name] for name in (("w1", "w3", "w2") if "w1" in own else ("gate_proj", "up_proj", "down_proj"))]


@pytest.mark.one_in(18)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [name for name in PICO_MOE if name != "gpt_oss"])
def test_every_architecture_gets_the_ffn_bit_for_bit(
    name: str, fused: bool, pico_moe: Models, dense_maker: Models, text: str, tmp_path: Path
) -> None:
    """The stock class loads the result; old experts and rows are as they were, whole and with zero neurons behind."""
    moe = pico_moe(name, fused)
    gate_up, down, rows = experts(moe, 1)
    width = down.shape[-1] - (8 if fused else 0)
    dense = dense_for(PICO_MOE[name][0], width, dense_maker, tmp_path / "dense")
    result = upcycle.convert(str(moe), tmp_path / "out", **keys(dense, text))
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    made = experts(tmp_path / "out", 1)
    for old, new in zip((gate_up, down, rows), made, strict=True):
        assert torch.equal(new[:E], old)
        assert len(new) == E + 1
    ffn = matrices(dense, 1)
    own, zeros = made[0][E].chunk(2), torch.zeros(down.shape[-1] - width, 32)
    for part, matrix in zip(own, ffn[:2], strict=True):
        assert torch.equal(part, torch.cat([matrix, zeros]))
    assert torch.equal(made[1][E], torch.cat([ffn[2], zeros.T], 1))
    assert made[2][E].any()


def test_experts_with_biases_and_a_clamp_get_no_dense_ffn(
    pico_moe: Models, dense_maker: Models, text: str, tmp_path: Path
) -> None:
    dense = dense_maker(tmp_path / "dense", "llama", num_hidden_layers=2, intermediate_size=24)
    with pytest.raises(
        RefusalError, match="experts of a 'gpt_oss' model have biases and a clamped activation"
    ) as caught:
        upcycle.plan(str(pico_moe("gpt_oss")), **keys(dense, text))
    assert "expert_upcycling" in str(caught.value.hint)


@pytest.fixture
def mixture(branches: Callable[..., list[Path]], tmp_path: Path) -> tuple[Path, Path]:
    """A Mixtral of two "fine-tunes", and a third one."""
    *two, third = branches(3)
    options = {"method": "branch_train_mix", "sources": [str(one) for one in two], "verification": {"enabled": False}}
    upcycle.convert(None, tmp_path / "moe", **options)
    return tmp_path / "moe", third


def test_with_the_old_rows_alone_the_function_is_as_it_was(
    mixture: tuple[Path, Path], text: str, tmp_path: Path
) -> None:
    """A token that does not choose the added expert gets what it got, bit for bit."""
    moe, third = mixture
    upcycle.convert(str(moe), tmp_path / "out", **keys(third, text))
    before, after = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (moe, tmp_path / "out"))
    ids = torch.randint(4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, chosen = before(ids).logits, after(ids).logits
        for layer in after.model.layers:
            layer.mlp.gate.weight = torch.nn.Parameter(layer.mlp.gate.weight[:-1])
        assert torch.equal(after(ids).logits, expected)
    assert not torch.equal(chosen, expected)


@pytest.mark.long
def test_experts_that_are_all_one_ffn_are_the_dense_model(text: str, tmp_path: Path) -> None:
    upcycle.convert("demo", tmp_path / "moe", experts=2, top_k=2, verification={"enabled": False})
    upcycle.convert(str(tmp_path / "moe"), tmp_path / "out", **keys("demo", text), dtype="float32")
    dense, made = (
        upcycle.evaluate(p, text=text, tokens=512, window=128, stride=127).texts[0] for p in ("demo", tmp_path / "out")
    )
    assert made.nats_per_token == pytest.approx(dense.nats_per_token, rel=1e-5)


@pytest.mark.long
def test_the_row_knows_the_text(text: str, tmp_path: Path) -> None:
    """On held-out windows, beside rows of zeros: tokens of the new kind choose the expert, and most others do not."""
    upcycle.convert("demo", tmp_path / "moe", experts=2, top_k=2, router="zero", verification={"enabled": False})
    options = keys("demo", text) | {"calibration": {"text": "demo", "tokens": 4096, "window": 128}}
    result = upcycle.convert(str(tmp_path / "moe"), tmp_path / "out", **options, dtype="float32")
    assert [layer["layer"] for layer in result.layers] == [*range(6)]
    assert [layer["unit"] for layer in result.layers] == [1.0] * 6
    assert min(layer["own_tokens"] for layer in result.layers) > 0.95
    assert max(layer["other_tokens"] for layer in result.layers) < 0.5


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.long
def test_same_inputs_give_the_same_bytes_as_planned(mixture: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    moe, third = mixture
    options = {**keys(third, text), "max_shard_size": "60KB"}
    plan = upcycle.plan(str(moe), **options)
    results = [upcycle.convert(str(moe), tmp_path / name, **options) for name in ("one", "two")]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert results[0].plan == plan
    assert (plan.kind, plan.summary[:14]) == ("addition", "3 experts from")
    assert plan.parameters_total - plan.parameters_dense == 3 * (3 * 32 * 96 + 32)  # an FFN and a row for every layer
    assert plan.parameters_active == plan.parameters_dense + 3 * 32  # two experts run, as before
    assert upcycle.verify(tmp_path / "one", tokens=64) == results[0].verification
    (source,) = records.read_record(tmp_path / "one")["sources"]
    assert source["fingerprint"]


@pytest.mark.long
def test_a_stopped_run_continues_byte_equal(
    mixture: tuple[Path, Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, third = mixture
    finish, finished = ShardWriter.finish, []

    def stop(writer: ShardWriter, unit: Any) -> None:
        finish(writer, unit)
        finished.append(unit.name)
        if len(finished) == 2:
            writer._wait_for_oldest()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            upcycle.convert(str(moe), tmp_path / "out", **keys(third, text))
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(
            "upcycle.calibration.compressing.fit_added.fit_row", None
        )  # what was decided is not decided again
        assert upcycle.convert(str(moe), tmp_path / "out", **keys(third, text)).resumed
    upcycle.convert(str(moe), tmp_path / "whole", **keys(third, text))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["layers.1.block_sparse_moe.gate.weight", "layers.2.block_sparse_moe.experts.2.w2.weight"]
)
def test_a_changed_tensor_is_found_by_name(name: str, mixture: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    """Of the router the last number, which is the new row's."""
    moe, third = mixture
    upcycle.convert(str(moe), tmp_path / "out", **keys(third, text))
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"model.{name}"][-1, -1] *= -1
    save_file(tensors, path, {"format": "pt"})
    record = records.read_record(tmp_path / "out")
    record["files"][path.name] = hashing.hash_file(path)
    (tmp_path / "out" / records.FILE).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=f"tensor 'model.{name}' is not"):
        upcycle.verify(tmp_path / "out", tokens=64)


@pytest.mark.long
def test_the_scale_multiplies_what_the_expert_adds(mixture: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    moe, third = mixture
    upcycle.convert(str(moe), tmp_path / "one", **keys(third, text))
    upcycle.convert(str(moe), tmp_path / "two", **keys(third, text, scale=2.5))
    (_, one, _), (_, two, _) = (experts(tmp_path / name, 0) for name in ("one", "two"))
    assert torch.equal(two[2], one[2] * 2.5)
    assert torch.equal(two[:2], one[:2])


@pytest.mark.parametrize(
    ("changed", "error", "message", "hint"),
    [
        ({"sources": []}, UsageError, "none is named", "--sources ./law --set sources.0.text=law.txt"),
        ({"sources": [{"name": "demo"}, {"name": "demo"}]}, UsageError, "2 models are named", "one at a time"),
        ({"sources": [{"name": "demo"}]}, UsageError, "demo has no 'text'", "sources.0.text=law.txt"),
        ({"sources": [{"name": "demo", "text": "T", "weight": 2.0}]}, UsageError, "demo has 'weight'", "leave it out"),
        (
            {"sources": [{"name": "demo", "text": "demo"}]},
            UsageError,
            "the text demo of demo is a calibration text, too",
            "are for",
        ),
        ({"calibration": {}}, UsageError, "the router's row of a new expert looks at text", "--calibration demo"),
        ({"refit": "down"}, UsageError, "does not read the key 'refit'", "calibration"),
        ({"dtype": "keep"}, UsageError, "experts are float32 in .+ is bfloat16 in", "--dtype float32"),
        ({}, UsageError, "'hidden_size' is 32 in .+ and 192 in demo", "a fine-tune of the model"),
    ],
)
def test_what_cannot_be_is_refused(
    changed: dict[str, Any], error: type[Exception], message: str, hint: str, mixture: tuple[Path, Path], text: str
) -> None:
    options = {**keys("demo", text), "dtype": "float32", **changed}
    with pytest.raises(error, match=message) as caught:
        upcycle.plan(str(mixture[0]), **options)
    assert hint in (caught.value.hint or "")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("family", "changes", "error", "message"),
    [
        (
            "llama",
            {"intermediate_size": 104},
            UsageError,
            "layer 0: the FFN of .+ has 104 neurons, and experts of .+ have 96",
        ),
        ("llama", {"hidden_act": "gelu"}, UsageError, "'hidden_act' is silu in .+ and gelu in"),
        ("llama", {"mlp_bias": True}, RefusalError, "layer 0: the FFN of .+ has biases"),
        ("llama", {"num_hidden_layers": 2}, UsageError, "'num_hidden_layers' is 3 in .+ and 2 in"),
        ("llama", {"vocab_size": 4100}, UsageError, "'vocab_size' is 4096 in .+ and 4100 in"),
        ("qwen3", {"head_dim": 16}, RefusalError, "is a 'qwen3' model, whose block is not that of the 'mixtral' model"),
    ],
)
def test_dense_models_that_do_not_fit_are_refused(
    family: str,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    mixture: tuple[Path, Path],
    dense_maker: Models,
    text: str,
    tmp_path: Path,
) -> None:
    dense = dense_maker(tmp_path / "dense", family, **changes)
    with pytest.raises(error, match=message):
        upcycle.convert(str(mixture[0]), tmp_path / "out", **keys(dense, text))
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(
    mixture: tuple[Path, Path], text: str, tmp_path: Path, dense_maker: Models
) -> None:
    dense = dense_maker(tmp_path / "dense", "llama")
    tokenizer = json.loads((dense / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (dense / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="give different ids to 2 tokens") as caught:
        upcycle.plan(str(mixture[0]), **keys(dense, text))
    assert "a fine-tune of this vocabulary" in (caught.value.hint or "")


def test_a_dense_model_gets_no_expert(text: str) -> None:
    with pytest.raises(RefusalError, match="demo is a dense 'llama' model, and a Mixture-of-Experts is needed"):
        upcycle.plan("demo", **keys("demo", text))


@pytest.mark.long
def test_card_and_report_name_both_models(mixture: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    moe, third = mixture
    upcycle.convert(str(moe), tmp_path / "out", **keys(third, text))
    CliRunner().invoke(cli, ["card", str(tmp_path / "out"), "--license", "mit"])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "made from `moe` and `model`: 3 experts from 2, top-2: one is a dense model's FFN." in card
    assert str(third.parent) not in (tmp_path / "out" / "upcycle.json").read_text()  # no path of this machine
    upcycle.write_report(tmp_path / "out", tmp_path / "report.html")
    assert "added model" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.long
def test_the_moe_may_write_the_text_for_its_experts(text: str, tmp_path: Path) -> None:
    """On the command line, as a user would; what it prints says who chooses the new expert."""
    upcycle.convert("demo", tmp_path / "moe", experts=2, top_k=2, verification={"enabled": False})
    arguments = [
        "--method",
        "add_expert",
        "--sources",
        "demo",
        "--set",
        f"sources.0.text={text}",
        "--calibration",
        "self",
    ]
    small = ["--calibration-tokens", "512", "--set", "calibration.window=64", "--verify-tokens", "64"]
    done = CliRunner().invoke(cli, ["convert", str(tmp_path / "moe"), str(tmp_path / "out"), *arguments, *small])
    assert done.exit_code == 0, done.output
    assert "of the new expert's own text choose it" in done.output
    assert "3 experts from 2, top-2" in done.output


def test_of_a_short_text_some_tokens_judge(mixture: tuple[Path, Path], tmp_path: Path) -> None:
    """Two windows of the new kind: the last eighth of them, 16 tokens, says which share chose the expert."""
    moe, third = mixture
    short = tmp_path / "short.txt"
    short.write_text("The party shall pay ten crowns. " * 20, encoding="utf-8")
    result = upcycle.convert(str(moe), tmp_path / "out", **keys(third, str(short)))
    shares = [16 * layer["own_tokens"] for layer in result.layers]
    assert shares == [round(share) for share in shares]
