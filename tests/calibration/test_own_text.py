"""Text that a model writes itself: what it draws, that it is drawn once, how it is mixed with files, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.architectures.stock import load_stock_model, load_tokenizer
from upcycle.calibration import own_text
from upcycle.calibration.own_text import OwnText, draws_of, evenly_mixed, write_windows
from upcycle.calibration.repetition import repetition
from upcycle.errors import CheckpointError, EnvironmentFault, UsageError
from upcycle.files.records import hash_tokens, read_record
from upcycle.planning import own_text as planned
from upcycle.progress import SILENT, Progress
from upcycle.report.sections.made import made_view
from upcycle.text.mixture import mixed_windows
from upcycle.text.windows import demo_parts

Pico = Callable[[str], Path]
WINDOW = 24
SMALL = OwnText(windows=5, window=WINDOW, seed=3, vocabulary=1000, special=(0, 1, 2))
SPLIT: dict[str, Any] = {
    "method": "random_split",
    "experts": 8,
    "top_k": 4,
    "calibration": {"text": "self", "tokens": 512, "window": 32},
    "verification": {"tokens": 64},
}


class Stopping(Progress):
    """Stops the work at a step, as a user would."""

    def __init__(self, at: int) -> None:
        self.left = at

    def advance(self, steps: int = 1) -> None:
        self.left -= steps
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3.5", "lfm2", "granite4"])
def test_tokens_are_drawn_from_the_models_own_distribution(pico: Pico, tmp_path: Path, name: str) -> None:
    """Read again without a cache, every token lies where its random number falls among the cumulated probabilities."""
    written = write_windows(SMALL, pico(name), tmp_path / "kept", SILENT)
    assert written.shape == (5, WINDOW)
    assert written.max() < 1000
    draws = torch.stack([draws_of(3, number, WINDOW) for number in range(5)])
    assert written[:, 0].equal(3 + (997 * draws[:, 0]).long())
    with torch.no_grad():
        probabilities = load_stock_model(pico(name))(written).logits[:, :-1, :1000].double().softmax(-1)
    sums = torch.cat([torch.zeros(5, WINDOW - 1, 1), probabilities.cumsum(-1)], dim=-1)
    token, drawn = written[:, 1:, None], draws[:, 1:, None]
    assert (sums.gather(2, token) <= drawn + 1e-4).all()
    assert (sums.gather(2, token + 1) >= drawn - 1e-4).all()


def test_a_stopped_run_does_not_write_again(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "BATCH_TOKENS", 2 * WINDOW)
    whole = write_windows(SMALL, pico("llama"), tmp_path / "whole", SILENT)
    kept = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        write_windows(SMALL, pico("llama"), kept, Stopping(WINDOW + 3))
    assert load_file(kept)["token_ids"].equal(whole[:2])
    marked = whole[:2].clone()
    marked[0, 5] = 7
    save_file({"token_ids": marked}, kept)
    continued = write_windows(SMALL, pico("llama"), kept, SILENT)
    assert continued[:2].equal(marked)  # not written again
    assert continued[2:].equal(whole[2:])
    monkeypatch.setattr(own_text, "load_model", lambda _: pytest.fail("everything is written already"))
    assert write_windows(SMALL, pico("llama"), kept, SILENT).equal(continued)


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_what_cannot_be_continued_is_written_again(pico: Pico, tmp_path: Path, content: bytes | None) -> None:
    kept = tmp_path / "kept"
    if content is None:
        save_file({"token_ids": torch.zeros(1, WINDOW + 1, dtype=torch.long)}, kept)
    else:
        kept.write_bytes(content)
    assert write_windows(SMALL, pico("llama"), kept, SILENT).equal(
        write_windows(SMALL, pico("llama"), tmp_path / "other", SILENT)
    )


def test_seeds_write_unlike_texts(pico: Pico, tmp_path: Path) -> None:
    other = OwnText(windows=5, window=WINDOW, seed=4, vocabulary=1000)
    one, two = (write_windows(w, pico("llama"), tmp_path / str(w.seed), SILENT) for w in (SMALL, other))
    assert (one == two).double().mean() < 0.1


def test_windows_are_spread_evenly() -> None:
    few, many = torch.zeros(2, 1), torch.ones(6, 1)
    assert evenly_mixed([few, many]).flatten().tolist() == [1, 0, 1, 1, 1, 0, 1, 1]
    assert evenly_mixed([few, torch.ones(2, 1)]).flatten().tolist() == [0, 1, 0, 1]


@pytest.mark.long
def test_a_conversion_says_what_it_was_calibrated_on(pico: Pico, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    result = upcycle.convert(str(pico("llama")), first, **SPLIT)
    upcycle.convert(str(pico("llama")), second, **SPLIT)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "upcycle.json").read_bytes() == (second / "upcycle.json").read_bytes()
    tokenizer = load_tokenizer(pico("llama"))
    wanted = OwnText(16, 32, 0, min(len(tokenizer), 4096), tuple(sorted(set(tokenizer.all_special_ids))))
    windows = write_windows(wanted, pico("llama"), tmp_path / "kept", SILENT)
    calibration = read_record(first)["calibration"]
    assert calibration["token_ids_sha256"] == hash_tokens(windows)
    assert (calibration["text"], calibration["held_out"]) == (["self"], {})
    about = {"windows": 16, "window": 32, "seed": 0, "temperature": 1.0, "first": "random token"}
    assert about.items() <= calibration["written"].items()
    assert not list(first.glob("written*"))
    assert result.verification is not None
    assert result.verification.text == "embedded validation texts"
    assert upcycle.verify(first).text == "embedded validation texts"
    said = (
        "text the model wrote itself (16 windows of 32 tokens, from a random token, sampled at temperature 1.0, seed 0)"
    )
    upcycle.write_card(first)
    card = (first / "README.md").read_text().replace("\\", "")
    assert f"calibrated on: {said} (512 tokens)" in card
    facts = made_view({"calibration": calibration, "architecture": "", "layers": []})["facts"]
    assert ("calibrated on", f"512 tokens of {said}", None) in facts


def test_half_of_a_mix_is_of_files(pico: Pico, tmp_path: Path) -> None:
    mixed = {**SPLIT, "calibration": {"text": "self,prose", "tokens": 512, "window": 32}}
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", **mixed)
    calibration = read_record(tmp_path / "out")["calibration"]
    tokenizer = load_tokenizer(pico("llama"))
    files = mixed_windows({"prose": demo_parts("prose")[0]}, tokenizer, 256, 32)
    wanted = OwnText(8, 32, 0, min(len(tokenizer), 4096), tuple(sorted(set(tokenizer.all_special_ids))))
    own = write_windows(wanted, pico("llama"), tmp_path / "kept", SILENT)
    assert calibration["token_ids_sha256"] == hash_tokens(torch.stack([own, files], dim=1).flatten(0, 1))
    assert list(calibration["held_out"]) == ["prose"]
    assert result.verification is not None
    assert "not calibrated on" in result.verification.text


def test_a_short_file_leaves_more_to_the_model(pico: Pico, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(demo_parts("prose")[0][:800])
    mixed = {**SPLIT, "calibration": {"text": ["self", str(tmp_path / "short.txt")], "tokens": 1024, "window": 32}}
    upcycle.convert(str(pico("llama")), tmp_path / "out", **mixed)
    calibration = read_record(tmp_path / "out")["calibration"]
    assert calibration["tokens"] == 1024
    assert 16 < calibration["written"]["windows"] < 32


@pytest.mark.long
def test_a_conversion_that_was_stopped_does_not_write_again(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(str(pico("llama")), out, progress=Stopping(33), **SPLIT)
    upcycle.convert(str(pico("llama")), again, **SPLIT)
    monkeypatch.setattr(own_text, "load_model", lambda _: pytest.fail("everything is written already"))
    assert upcycle.convert(str(pico("llama")), out, **SPLIT).resumed
    assert (out / "upcycle.json").read_bytes() == (again / "upcycle.json").read_bytes()


def test_a_file_called_self_is_reached_by_its_path(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_text, "load_model", lambda _: pytest.fail("a file was named"))
    shutil.copyfile(upcycle.__path__[0] + "/demo/text/prose.txt", "self")
    keys = {**SPLIT, "calibration": {"text": "./self", "tokens": 512, "window": 32}}
    upcycle.convert(str(pico("llama")), tmp_path / "out", **keys)
    record = read_record(tmp_path / "out")
    assert record["calibration"]["text"] == ["self-2"]
    assert "written" not in record["calibration"]
    assert upcycle.verify(tmp_path / "out").text.startswith("what was held out of the calibration text")


def test_other_texts_cannot_be_self_written(pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="self is text that the model writes itself"):
        upcycle.convert(str(pico("llama")), tmp_path / "out", **{**SPLIT, "verification": {"text": "self"}})
    with pytest.raises(UsageError, match="self is text that the model writes itself"):
        upcycle.evaluate(str(pico("llama")), text="self")
    assert not list(tmp_path.iterdir())


def test_several_sources_refuse_the_text_of_one(branches: Callable[..., list[Path]], tmp_path: Path) -> None:
    keys = {"sources": list(map(str, branches(2))), "method": "symphony", "calibration": "self"}
    with pytest.raises(UsageError, match="there are several sources"):
        upcycle.plan(**keys)
    with pytest.raises(UsageError, match="there are several sources"):
        upcycle.convert(None, tmp_path / "out", **{**keys, "method": "branch_train_merge"})


def test_a_model_that_does_not_fit_is_refused_first(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forecast is what the plan says, and 10% less than that is too little."""
    from upcycle.calibration import read_tokens

    plain = upcycle.plan(str(pico("llama")), **{**SPLIT, "calibration": {"text": "demo", "tokens": 512}})
    own = upcycle.plan(str(pico("llama")), **{**SPLIT, "calibration": {"text": "self", "tokens": 1 << 20}})
    # 32 windows of 512: fp32 keys and values of 2 heads of 8 in 3 layers, and logits of 4,096 tokens.
    weights = own.parameters_dense
    needed = 4 * (weights + 32 * 512 * 2 * 2 * 8 * 3) + 32 * 4096 * 28
    assert planned.model_bytes(weights, json.loads((pico("llama") / "config.json").read_text()), 512, 1 << 20) == needed
    assert own.peak_memory_bytes >= needed
    assert own.peak_memory_bytes >= plain.peak_memory_bytes
    monkeypatch.setattr(read_tokens, "available_memory", lambda: needed - 1)
    keys = {**SPLIT, "calibration": {"text": "self", "tokens": 1 << 20}}
    with pytest.raises(EnvironmentFault, match="the whole model must be in memory"):
        upcycle.convert(str(pico("llama")), tmp_path / "out", **keys)
    assert not list(tmp_path.iterdir())


def changed(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def test_a_model_that_repeats_itself_is_found_out(pico: Pico, tmp_path: Path) -> None:
    def echo(weights: dict[str, torch.Tensor]) -> None:
        """Every token's likeliest successor is the token itself: layers add nothing, and the head is the embedding."""
        for name, tensor in weights.items():
            if "o_proj" in name or "down_proj" in name:
                tensor.zero_()
        weights["lm_head.weight"] = 10 * weights["model.embed_tokens.weight"]

    model = changed(pico("llama"), tmp_path / "echo", echo)
    with pytest.raises(UsageError, match="16 of 16 windows repeat the same few words") as found:
        upcycle.convert(str(model), tmp_path / "out", **SPLIT)
    assert found.value.hint == "give a text file: --calibration FILE, or self,FILE"
    assert {path.name for path in tmp_path.iterdir()} == {"echo"}  # no --restart is needed


def test_logits_that_are_not_finite_are_an_error(pico: Pico, tmp_path: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"][5] = torch.nan

    with pytest.raises(CheckpointError, match="its logits are not finite"):
        write_windows(SMALL, changed(pico("llama"), tmp_path / "model", spoil), tmp_path / "kept", SILENT)


def test_repetition_is_told_from_text(pico: Pico) -> None:
    tokenizer = load_tokenizer(pico("llama"))
    text = torch.cat([mixed_windows({n: demo_parts(n)[0]}, tokenizer, 4096, 256) for n in ("prose", "code")])
    assert repetition(text).collapsed == 0
    assert repetition(text).distinct > 0.7
    loops = torch.arange(40).repeat(4, 10)[:, :256]
    assert repetition(loops).collapsed == 4
    same = text[:1].repeat(8, 1)
    assert repetition(same).collapsed == 0
    assert repetition(same).distinct < 0.25
    assert repetition(torch.cat([text[:6], loops[:2]])).collapsed == 2


def test_experts_to_copy_are_chosen_on_what_the_moe_wrote(pico_moe: Callable[..., Path], tmp_path: Path) -> None:
    keys = {
        "method": "expert_upcycling",
        "experts": 6,
        "parameters": {"utility": "load"},
        "verification": {"tokens": 64},
    }
    upcycle.convert(str(pico_moe("qwen3_moe")), tmp_path / "out", **keys, calibration=SPLIT["calibration"])
    calibration = read_record(tmp_path / "out")["calibration"]
    assert calibration["written"]["windows"] == 16
    assert not list((tmp_path / "out").glob("written*"))
