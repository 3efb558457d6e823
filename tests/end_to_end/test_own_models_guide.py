"""The scripts of the guide to ``upcycle_moe`` run as they are printed, on models that ``upcycle convert`` wrote."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from wrapped_models import SMALL, auto_class, small_model

from upcycle.cli.main import cli
from upcycle.files.locate import DEMO_FOLDER
from upcycle.models.own.moe_block import MoeBlock

pytestmark = pytest.mark.one_in(3)  # the other cases are long

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "own_models.md"
SCRIPTS = dict(
    re.findall(r"^## (\w+)\n\n```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
)
SECTION = {"CausalLM": "Text", "MaskedLM": "Encoders", "ImageClassification": "Images"}


@pytest.fixture
def converted(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with ``moe``, a split with routers, and a picture."""
    name: str = request.param
    pictures = SMALL[name][1] == "ImageClassification"
    dense = tmp_path / "dense"
    small_model(name, **({} if pictures else {"vocab_size": 4096})).save_pretrained(dense)
    if pictures:
        from PIL import Image
        from transformers import ViTImageProcessorPil

        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(dense)
        Image.effect_noise((20, 20), 60).convert("RGB").save(tmp_path / "cat.png")
    else:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEMO_FOLDER / "model" / file, dense / file)
    split = ["--method", "random_split", "--experts", "3", "--top-k", "2", "--shared", "1", "--verify-tokens", "64"]
    done = CliRunner().invoke(cli, ["convert", str(dense), str(tmp_path / "moe"), *split])
    assert done.exit_code == 0, done.output
    return tmp_path


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a new Python says, which has imported nothing of upcycle yet."""
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.long
@pytest.mark.parametrize("converted", ["gpt2", "phi", "gemma2", "bert", "falcon", "vit"], indirect=True)
def test_the_script_runs_as_it_is_printed(converted: Path, request: pytest.FixtureRequest) -> None:
    name: str = request.node.callspec.params["converted"]
    script = SCRIPTS[SECTION[SMALL[name][1]]]
    done = python(converted, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    adapters = load_file(converted / "adapters" / "adapter_model.safetensors")
    blocks = [key for key in adapters if "experts" in key or "router" in key]
    of_blocks = {key.split(".lora_")[0].rpartition(".")[2] for key in blocks}
    assert {"experts", "router"} <= of_blocks, of_blocks
    before = auto_class(name).from_pretrained(converted / "moe")
    after, report = auto_class(name).from_pretrained(converted / "tuned", output_loading_info=True)
    assert not any(report.values()), report
    for old, new in zip(before.modules(), after.modules(), strict=True):
        if isinstance(old, MoeBlock):
            for (key, was), (_, now) in zip(old.named_parameters(), new.named_parameters(), strict=True):
                assert torch.equal(was, now) == (key.endswith("bias")), key


@pytest.mark.long
@pytest.mark.parametrize("converted", ["gpt2"], indirect=True)
def test_without_the_import_transformers_says_what_the_faq_quotes_and_verify_needs_none(converted: Path) -> None:
    load = 'from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained("./moe")'
    done = python(converted, "-c", load)
    assert done.returncode != 0
    message = "model type `upcycle_moe` but Transformers does not recognize this architecture"
    assert message in done.stderr
    faq = (GUIDE.parent / "faq.md").read_text(encoding="utf-8")
    assert message in faq
    done = python(converted, "-c", f"import upcycle.models\n{load}")
    assert done.returncode == 0, done.stderr
    done = python(converted, "-m", "upcycle.cli.main", "verify", "./moe")
    assert done.returncode == 0, done.stderr
