"""A MoE whose experts stay in its files gives what the whole model gives, in the memory that it may use."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pico_models import PICO_MOE
from wrapped_models import small_model, wrapped

import upcycle
from upcycle.architectures.stock import load_stock_model
from upcycle.cli.main import cli
from upcycle.errors import CheckpointError, RefusalError, UsageError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.inference.offloading.device_reader import DeviceReader
from upcycle.inference.offloading.expert_files import SLACK, ExpertFiles, aligned_buffer
from upcycle.inference.offloading.offload import Budget, OffloadedModel, last_uses
from upcycle.models.experts import use_eager_experts
from upcycle.models.own.routing.top_k import TopKRule

Pico = Callable[..., Path]
PROMPT = torch.arange(5, 14)[None]
# Two more: one that chooses within groups, which is no source of upcycle's.
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12, "head_dim": 4,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v3-groups": {
        "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0,
        "moe_intermediate_size": 24, **LATENT,
    },
    "ernie4_5_moe-wide": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 0},
}  # fmt: skip


def tight(folder: Path, spare: int = 2) -> int:
    """The memory for one expert of every layer and ``spare`` more."""
    with upcycle.offload(folder, "1GB") as whole:
        return whole.budget.resident + whole.budget.expert * (len(whole.budget.places) + spare)


def whole_model(folder: Path) -> Any:
    """The stock model; its weights are copied, as products of matrices that a file's mapping puts at odd addresses round otherwise."""
    model = use_eager_experts(load_stock_model(folder)).eval()
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


@torch.no_grad()
def assert_same(folder: Path, offloaded: OffloadedModel, tokens: int = 6) -> None:
    stock = whole_model(folder)
    assert torch.equal(offloaded.model(PROMPT).logits, stock(PROMPT).logits)
    written = [m.generate(PROMPT, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True)
               for m in (offloaded.model, stock)]  # fmt: skip
    assert torch.equal(written[0].sequences, written[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(written[0].logits, written[1].logits, strict=True))


@pytest.mark.one_in(12)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [*(name for name in PICO_MOE if name != "qwen3_vl_moe"), *OTHERS])
def test_logits_and_text_are_those_of_the_whole_model(
    name: str, fused: bool, pico_moe: Pico, moe_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """Bit for bit, with fewer experts in memory than a token has in all layers."""
    folder = (
        pico_moe(name, fused) if name in PICO_MOE else moe_maker(tmp_path, name.partition("-")[0], OTHERS[name], fused)
    )
    with upcycle.offload(folder, tight(folder)) as offloaded:
        assert_same(folder, offloaded)
        assert offloaded.cache.written.hits
        assert offloaded.cache.written.misses
        assert offloaded.reader.bytes_read == offloaded.cache.loads * offloaded._files.layers[0].experts[0].stored_bytes


@pytest.mark.parametrize("settings", [{"prefetch": False}, {"threads": 0}, {"keep_pages": False}])
def test_settings_change_no_number(settings: dict[str, Any], pico_moe: Pico) -> None:
    folder = pico_moe("mixtral")
    with upcycle.offload(folder, tight(folder, 4), **settings) as offloaded:
        assert_same(folder, offloaded)
        guesses = offloaded.cache.written.guessed + offloaded.cache.wrong_guesses
        assert bool(guesses) == settings.get("prefetch", True)


def test_stored_bfloat16_is_kept_as_it_is_and_widened_when_used(pico_moe: Pico, tmp_path: Path) -> None:
    folder = shutil.copytree(pico_moe("mixtral"), tmp_path / "bf16")
    load_stock_model(folder, "bfloat16").save_pretrained(folder)
    with upcycle.offload(folder, tight(folder)) as offloaded, upcycle.offload(pico_moe("mixtral"), "1GB") as wide:
        nbytes = wide.budget.expert - SLACK
        assert (offloaded.budget.expert - SLACK) * 2 == nbytes
        assert offloaded.budget.resident == wide.budget.resident + nbytes  # where one expert is widened
        assert_same(folder, offloaded)


def test_the_wrapper_with_experts_of_several_widths(tmp_path: Path) -> None:
    wrapped(small_model("gpt2"), rule=TopKRule(2), widths=(16, 32, 8, 8)).save_pretrained(tmp_path)
    with upcycle.offload(tmp_path, tight(tmp_path)) as offloaded:
        assert_same(tmp_path, offloaded)
        assert offloaded.cache.prompt.misses


def test_no_more_memory_than_allowed(pico_moe: Pico) -> None:
    """Everything that holds weights, counted where it is."""
    folder = pico_moe("mixtral")
    for spare in (0, 1, 3):
        memory = tight(folder, spare)
        with upcycle.offload(folder, memory) as offloaded:
            offloaded.model.generate(PROMPT, max_new_tokens=4, do_sample=False)
            model, cache = offloaded.model, offloaded.cache
            held = [one.buffer for state in cache._layers for one in state.held.values()]
            held += [buffer for state in cache._layers for buffer in state.free]
            held += [*cache._spare, *(one.buffer for one in (*cache._ahead.values(), *cache._left))]
            others = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
            assert len(held) == sum(offloaded.budget.places) + offloaded.budget.ahead
            assert sum(others.values()) == offloaded.budget.resident
            assert sum(buffer.nbytes for buffer in held) + sum(others.values()) <= offloaded.budget.total <= memory


def test_memory_is_spent_evenly_and_none_is_wasted() -> None:
    def spent(memory: int, counts: list[int], top_k: int = 2) -> tuple[tuple[int, ...], int]:
        budget = Budget.of(memory, 100, 10, counts, top_k, "it")
        assert budget.total <= memory
        return budget.places, budget.ahead

    assert spent(140, [8] * 4) == ((1, 1, 1, 1), 0)
    assert spent(159, [8] * 4) == ((1, 1, 1, 1), 1)
    assert spent(280, [8] * 4) == ((4, 4, 4, 4), 2)
    assert spent(290, [8] * 4) == ((5, 4, 4, 4), 2)
    assert spent(10**6, [8, 4]) == ((8, 4), 4)
    with pytest.raises(
        UsageError, match=r"at least 140 B .* 100 B for everything .* one expert in each of 4 layers"
    ) as error:
        spent(139, [8] * 4)
    assert error.value.hint == "--memory 1MB, or more: what is left keeps experts"


def test_the_last_token_of_each_expert() -> None:
    chosen = torch.tensor([[3, 1], [0, 3], [1, 8]])  # 8: of no expert
    assert last_uses(chosen, 8) == {0: 1, 1: 2, 3: 1}
    assert last_uses(chosen[2:], 8) == {1: 0}


def test_reads_past_the_page_cache_give_the_same_bytes(pico_moe: Pico) -> None:
    """Whatever lay in the buffers before, and wherever a matrix begins."""
    with upcycle.offload(pico_moe("qwen3_moe"), "1GB") as whole:
        layers, size = whole._files.layers, whole.budget.expert - SLACK
    buffers = [aligned_buffer(size) for _ in range(2)]
    with ExpertFiles(layers) as plain, ExpertFiles(layers, keep_pages=False) as past:
        if not past._direct:
            pytest.skip("this file system has no such reads")
        for layer, stored in enumerate(layers):
            for expert in range(len(stored.experts)):
                plain.read(layer, expert, buffers[0])
                past.read(layer, expert, buffers[1])
                for matrix in stored.experts[expert].matrices:
                    bounds = slice(matrix.at, matrix.at + 4 * torch.Size(matrix.shape).numel())
                    assert torch.equal(buffers[0][bounds], buffers[1][bounds])
                    assert buffers[0][bounds].any()


@pytest.mark.parametrize("keep_pages", [True, False])
@pytest.mark.parametrize("how", ["shorter", "written"])
def test_a_file_that_changes_meanwhile_is_named(how: str, keep_pages: bool, pico_moe: Pico, tmp_path: Path) -> None:
    folder = shutil.copytree(pico_moe("mixtral"), tmp_path / "moe")
    file = folder / "model.safetensors"
    with upcycle.offload(folder, tight(folder), keep_pages=keep_pages) as offloaded:
        if how == "shorter":
            os.truncate(file, 4096)
        else:
            with file.open("r+b") as opened:
                opened.seek(-8, os.SEEK_END)
                opened.write(b"\0" * 8)
            os.utime(file, ns=(0, 0))
        with pytest.raises(CheckpointError, match=f"{file} changed while its experts were read"):
            offloaded.model(PROMPT)


def test_a_file_that_is_replaced_or_removed_is_read_as_it_was(pico_moe: Pico, tmp_path: Path) -> None:
    folder = shutil.copytree(pico_moe("mixtral"), tmp_path / "moe")
    with upcycle.offload(folder, tight(folder)) as offloaded:
        (folder / "model.safetensors").unlink()
        assert_same(pico_moe("mixtral"), offloaded)


def test_what_cannot_be_run_so_is_refused(pico_moe: Pico, pico: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="is dense: no layer has experts"):
        upcycle.offload(pico("llama"), "1GB")
    with pytest.raises(UsageError, match="'much' is not a size"):
        upcycle.offload(pico_moe("mixtral"), "much")
    one = tmp_path / "model.gguf"
    one.write_bytes(b"GGUF")
    with pytest.raises(RefusalError, match="is one file"):
        upcycle.offload(one, "1GB")
    with pytest.raises(RefusalError, match=r"experts' of a qwen3_vl_moe model is not stored expert by expert"):
        upcycle.offload(pico_moe("qwen3_vl_moe"), "1GB")  # transformers takes two layouts of them
    folder = shutil.copytree(pico_moe("granitemoe"), tmp_path / "moe")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_local_experts": 5}))
    with pytest.raises(RefusalError, match=r"experts' of a granitemoe model is not stored expert by expert"):
        upcycle.offload(folder, "1GB")


def test_host_memory_feeds_another_device(pico_moe: Pico) -> None:
    """Without a GPU, ``meta`` stands for one: what is read from files, what stays, and what is copied."""
    folder = pico_moe("mixtral")
    with upcycle.offload(folder, "1GB") as whole, ExpertFiles(whole._files.layers) as files:
        size = whole.budget.expert - SLACK
        reader = DeviceReader(files, size, torch.device("meta"), host_bytes=2 * whole.budget.expert)
        for expert in (0, 1, 2, 0, 1, 2):
            reader(0, expert, reader.make_buffer())()
        assert (reader.bytes_read, reader.bytes_copied) == (4 * size, 6 * size)
        kept, plain = reader._host[0, 1], aligned_buffer(size)
        files.read(0, 1, plain)
        assert torch.equal(kept[:size], plain[:size])


def test_the_command_writes_the_same_text_and_says_what_was_read(pico_moe: Pico) -> None:
    folder = pico_moe("qwen2_moe")

    def run(*more: str) -> Any:
        return CliRunner().invoke(cli, ["generate", str(folder), "--prompt", "def f():", "--tokens", "5", *more])

    whole = json.loads(run("--json").stdout)
    memory = f"{tight(folder)}"
    told = json.loads(run("--json", "--offload", "--memory", memory).stdout)
    assert whole["offload"] is None
    facts = told.pop("offload")
    assert [t["id"] for t in told["tokens"]] == [t["id"] for t in whole["tokens"]]
    assert [t["experts"] for t in told["tokens"]] == [t["experts"] for t in whole["tokens"]]
    assert facts["memory_bytes"] <= int(memory)
    assert sum(facts["written"].values()) == 5 * 2
    shown = run("--offload", "--memory", memory)
    assert "in memory, " in shown.stderr
    assert " read" in shown.stderr
    assert "--memory is a cap for --offload" in str(run("--memory", "4GB").exception)
    assert "needs at least" in str(run("--offload", "--memory", "1KB").exception)


def test_nothing_of_the_experts_is_read_before_it_is_needed(pico_moe: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = SafetensorsFolder.read
    monkeypatch.setattr(SafetensorsFolder, "read", lambda self, name: (read.append(name), plain(self, name))[1])
    with upcycle.offload(pico_moe("mixtral"), "1GB") as offloaded:
        assert read
        assert not [name for name in read if ".experts." in name]
        assert offloaded.reader.bytes_read == 0
