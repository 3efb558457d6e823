"""An architecture with names of its own for everything outside a layer runs, converts, grows and is recorded like the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import upcycle
from upcycle.architectures.dense.llama_like.llama import Llama
from upcycle.architectures.module_paths import ModulePaths, find_module_paths
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.models.layer_runner import LayerRunner, logits_of
from upcycle.models.stock_model import dense_reader, skeleton, source_model
from upcycle.registry import FAMILIES
from upcycle.trainers.distillation.losses import capture_outputs, layer_outputs

PATHS = ModulePaths(body="trunk", layers="trunk.stack", embedding="trunk.table", final_norm="trunk.last", head="out")


class Renamed(Llama):
    """Llama in a stock class of other names."""

    name = "renamed"
    module_paths = PATHS


class RenamedConfig(LlamaConfig):
    model_type = "renamed"


class RenamedBody(LlamaModel):
    config_class = RenamedConfig
    layers = property(lambda self: self.stack)
    embed_tokens = property(lambda self: self.table)
    norm = property(lambda self: self.last)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for mine, llamas in (("stack", "layers"), ("table", "embed_tokens"), ("last", "norm")):
            setattr(self, mine, self._modules.pop(llamas))


class RenamedForCausalLM(LlamaForCausalLM):
    config_class = RenamedConfig
    base_model_prefix = "trunk"
    _tied_weights_keys = {"out.weight": "trunk.table.weight"}
    model = property(lambda self: self.trunk)
    lm_head = property(lambda self: self.out)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self._modules["model"]
        self.trunk = RenamedBody(config)
        self.out = self._modules.pop("lm_head")
        self.post_init()


@pytest.fixture
def renamed(
    pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, Path]]:
    """The same weights as a Llama and under the other names, which transformers and the list of families know for a while."""
    monkeypatch.setitem(FAMILIES, "renamed", f"{__name__}:Renamed")
    AutoConfig.register("renamed", RenamedConfig)
    AutoModelForCausalLM.register(RenamedConfig, RenamedForCausalLM)
    llama, folder = pico("llama"), tmp_path / "renamed"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "renamed", "architectures": ["RenamedForCausalLM"]})
    )
    (file,) = folder.glob("*.safetensors")
    tensors = {ModulePaths().renamed(name, PATHS): tensor for name, tensor in load_file(file).items()}
    assert "trunk.stack.1.mlp.up_proj.weight" in tensors
    assert not any(name.startswith(("model.", "lm_head")) for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    yield llama, folder
    del CONFIG_MAPPING._extra_content["renamed"]
    del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[RenamedConfig]


def test_layers_run_one_by_one_and_end_in_the_same_logits(renamed: tuple[Path, Path]) -> None:
    llama, folder = renamed
    checkpoint = DenseCheckpoint.open(str(folder))
    runner = LayerRunner(checkpoint, "keep", 48)
    ids = torch.randint(4096, (2, 48), generator=torch.Generator().manual_seed(5))
    states = runner.embed(ids.flatten())
    for index in range(checkpoint.config.num_hidden_layers):
        with runner.loaded(index), torch.no_grad():
            x, residual = runner.around(index, states)
            states = runner.whole(index, states)
            torch.testing.assert_close(residual + runner.block(index)(x), states)
    model = skeleton(checkpoint.raw_config, dense_reader(checkpoint, "keep")(None))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)(ids).logits
        actual = logits_of(model, checkpoint, states.view(2, 48, -1))
    assert torch.linalg.norm(actual - expected) < 1e-6 * torch.linalg.norm(expected)
    assert torch.equal(
        source_model(checkpoint, None, True).logits(ids), source_model(checkpoint, None, False).logits(ids)
    )


@pytest.mark.long
def test_the_converted_model_has_the_names_of_its_target(renamed: tuple[Path, Path], tmp_path: Path) -> None:
    llama, folder = renamed
    keys = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, "target": "mixtral", "verification": {"tokens": 64}}
    results = [upcycle.convert(str(source), tmp_path / name, **keys) for source, name in ((llama, "a"), (folder, "b"))]
    assert results[1].verification is not None
    assert results[1].verification.verdict == "exact"
    one, other = (SafetensorsFolder(tmp_path / name) for name in "ab")
    assert set(one.specs) == set(other.specs)
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.specs)


def test_layers_are_stacked_under_their_own_names(renamed: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = renamed
    upcycle.convert(str(folder), tmp_path / "tall", method="depth_stack", verification={"tokens": 64})
    tall = SafetensorsFolder(tmp_path / "tall").specs
    assert set(SafetensorsFolder(folder).specs) < set(tall)
    assert {PATHS.layer_of(name) for name in tall} > {None, 0, 1, 2}


def test_training_reads_its_layers(renamed: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(renamed[1], dtype=torch.float32)
    assert find_module_paths(model.config.model_type) == PATHS
    recorder = capture_outputs(model)
    hidden = model(torch.arange(8)[None], output_hidden_states=True).hidden_states
    found = layer_outputs(recorder.take())
    assert torch.equal(found[0].hidden, hidden[1])


def test_names_outside_and_inside_layers() -> None:
    llamas = ModulePaths()
    assert llamas.layer_of("model.layers.12.mlp.up_proj.weight") == 12
    assert llamas.layer_of("model.layersX12.mlp.up_proj.weight") is None
    assert llamas.layer_of("model.norm.weight") is None
    for name in (
        "model.layers.3.self_attn.q_proj.bias",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ):
        assert llamas.renamed(name, llamas) == name
        assert PATHS.renamed(llamas.renamed(name, PATHS), llamas) == name
    assert llamas.renamed("model.norm_of_another.weight", PATHS) == "trunk.norm_of_another.weight"
    assert llamas.renamed("models.norm.weight", PATHS) == "models.norm.weight"
