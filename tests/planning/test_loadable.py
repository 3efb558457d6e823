"""What stock transformers refuses is refused before the first byte, by every conversion and by ``plan``, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import upcycle
from upcycle.errors import CheckpointError, EnvironmentFault, UpcycleError, UsageError
from upcycle.planning import loadable

Pico = Callable[[str], Path]
WRONG: dict[str, dict[str, Any]] = {
    "pad_token_id": {"pad_token_id": 9999},
    "bos_token_id": {"bos_token_id": [1]},
    "rms_norm_eps": {"rms_norm_eps": "1e-5"},
    "hidden_act": {"hidden_act": "nosuch"},
    "initializer_range": {"initializer_range": "small"},
}


def copied(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def refused(tmp_path: Path, kind: type[UpcycleError], match: str, **keys: Any) -> None:
    """By a conversion, verified or not, and by a plan; nothing is written."""
    keys = {"experts": 2, **keys}
    for verified in (True, False):
        with pytest.raises(kind, match=match):
            upcycle.convert(out=tmp_path / "out", verification={"enabled": verified}, **keys)
    with pytest.raises(kind, match=match):
        upcycle.plan(**keys)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize("key", WRONG)
def test_a_config_that_stock_refuses_is_refused_by_its_key(key: str, pico: Pico, tmp_path: Path) -> None:
    source = copied(pico("llama"), tmp_path / "dense", **WRONG[key])
    refused(tmp_path, CheckpointError, f"config.*{key}", source=str(source))


def test_the_refused_key_is_found_by_leaving_keys_out(pico: Pico, tmp_path: Path) -> None:
    raw = json.loads((copied(pico("llama"), tmp_path / "d", pad_token_id=9999) / "config.json").read_text())
    with pytest.raises(CheckpointError, match="'pad_token_id': 9999") as caught:
        loadable.check_config(raw, "somewhere")
    assert "pad_token_id" in (caught.value.hint or "")
    assert loadable.check_config({**raw, "pad_token_id": 4095}, "somewhere").config.vocab_size == 4096


def test_a_refused_config_is_named_among_several_sources(branches: Callable[..., list[Path]], tmp_path: Path) -> None:
    one, two = branches(2)
    wrong = copied(two, tmp_path / "two", pad_token_id=9999)
    refused(
        tmp_path, CheckpointError, "pad_token_id",
        source=None, sources=[str(one), str(wrong)], method="branch_train_mix", router="random",
    )  # fmt: skip


def test_growth_refuses_a_config_that_stock_refuses(pico: Pico, pico_moe: Pico, tmp_path: Path) -> None:
    dense = copied(pico("llama"), tmp_path / "dense", pad_token_id=9999)
    keys: dict[str, Any] = {"method": "depth_stack", "parameters": {"growth": 2}}
    for verified in (True, False):
        with pytest.raises(CheckpointError, match="pad_token_id"):
            upcycle.convert(str(dense), tmp_path / "out", verification={"enabled": verified}, **keys)
    moe = copied(pico_moe("mixtral"), tmp_path / "moe", pad_token_id=9999)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        upcycle.convert(str(moe), tmp_path / "out", method="expert_upcycling", experts=8)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{}"}, "tokenizer.json"),
        ({"tokenizer.json": "{broken"}, "tokenizer.json"),
        (
            {
                "tokenizer.json": "{}",
                "tokenizer_config.json": '{"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", null]}}',
            },
            "of its own code",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_refused(
    files: dict[str, str], hint: str, dense: Path, tmp_path: Path
) -> None:
    for name, text in files.items():
        (dense / name).write_text(text)
    refused(tmp_path, EnvironmentFault, "tokenizer in .* cannot be loaded", source=str(dense))
    with pytest.raises(EnvironmentFault) as caught:
        upcycle.plan(str(dense), experts=2)
    assert hint in (caught.value.hint or "")
    result = upcycle.convert(str(dense), tmp_path / "out", experts=2, tokenizer="none", verification={"enabled": False})
    assert result.out.is_dir()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(pico: Pico, tmp_path: Path) -> None:
    """Otherwise, tokens that the model does not have end in an index error deep inside torch."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = tmp_path / "dense"
    raw = json.loads((pico("llama") / "config.json").read_text())
    small: Any = {k: v for k, v in raw.items() if k not in ("model_type", "architectures", "dtype")}
    torch.manual_seed(0)
    settings = AutoConfig.for_model("llama", **{**small, "vocab_size": 64})
    AutoModelForCausalLM.from_config(settings).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(pico("llama") / name, source / name)
    with pytest.raises(CheckpointError, match="the model has 64"):
        upcycle.convert(str(source), tmp_path / "out", experts=2)
    assert not list(tmp_path.glob("out*"))


def test_a_verification_text_that_is_too_short_is_refused(pico: Pico, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("short")
    with pytest.raises(UsageError, match="fewer than"):
        upcycle.convert(str(pico("llama")), tmp_path / "out", verification={"text": str(tmp_path / "t.txt")})
    assert not list(tmp_path.glob("out*"))


def test_a_result_that_stock_refuses_is_never_written(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A faulty target writes a configuration that no stock class takes."""
    from upcycle.architectures.moe.base import Target

    right = Target.full_config
    monkeypatch.setattr(Target, "full_config", lambda *args: {**right(*args), "num_local_experts": "two"})
    refused(tmp_path, CheckpointError, "num_local_experts", source=str(pico("llama")))


def test_a_weight_that_stock_would_not_find_is_named(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upcycle's own reader takes the stored tensors; a weight that stock transformers would have to make up is named."""
    from upcycle.architectures.dense.base import Family

    source = copied(pico("llama"), tmp_path / "dense", attention_bias=True)
    right = Family.layer_specs
    monkeypatch.setattr(
        Family,
        "layer_specs",
        lambda *args: {name: shape for name, shape in right(*args).items() if not name.endswith("bias")},
    )
    refused(tmp_path, CheckpointError, r"finds no weight for 'model\.layers\.0\.self_attn\..*bias'", source=str(source))
