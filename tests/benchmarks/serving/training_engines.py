"""What torchtitan and Megatron-Bridge call the tensors of exported models: is every one of them named by their converters?

Both train MoEs of stock transformers folders after a conversion of their own, which goes by names. Their wheels are downloaded from
the package registry (nothing is installed, and none of their code runs: it needs Megatron-Core and GPUs), and every text in the file
of a converter that is a name in a transformers folder is taken as a pattern. Tiny random dense models are converted to each
target, and every tensor of the result must match a pattern. Prints a line per engine and target; passes when converters know and
lack what ``EXPECTED`` says.

    python -P tests/benchmarks/serving/training_engines.py
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import upcycle
from upcycle.files.formats.tensor_files import SafetensorsFolder

# Target -> the pico model that is converted to it, and how its experts are stored there.
SOURCES = {
    "qwen3_moe": ("qwen3", "per-expert"),
    "deepseek_v3": ("youtu-halves", "per-expert"),
    "glm4_moe": ("seed-oss", "per-expert"),
    "gpt_oss": ("llama", "fused"),
}
# Engine and target -> files of the converter, and the last parts of names that it does not know.
EXPECTED: dict[tuple[str, str], tuple[tuple[str, ...], set[str]]] = {
    ("torchtitan", "qwen3_moe"): (("torchtitan/models/qwen3/state_dict_adapter.py",), set()),
    ("torchtitan", "deepseek_v3"): (("torchtitan/models/deepseek_v3/state_dict_adapter.py",), set()),
    ("torchtitan", "gpt_oss"): (
        ("torchtitan/models/gpt_oss/state_dict_adapter.py",),
        {"gate_up_proj", "down_proj"},  # it reads the blocks of MXFP4 alone
    ),
    ("megatron-bridge", "qwen3_moe"): (("megatron/bridge/models/qwen/qwen3_moe_bridge.py",), set()),
    ("megatron-bridge", "deepseek_v3"): (
        ("megatron/bridge/models/deepseek/common.py", "megatron/bridge/models/deepseek/deepseek_v3_bridge.py"),
        set(),
    ),
    ("megatron-bridge", "glm4_moe"): (("megatron/bridge/models/glm/glm45_bridge.py",), set()),
    ("megatron-bridge", "gpt_oss"): (("megatron/bridge/models/gpt_oss/gpt_oss_bridge.py",), set()),
}


def wheel(engine: str, folder: Path) -> Path:
    """The engine's wheel in ``folder``, downloaded where it is not there."""
    name = engine.replace("-", "_")
    if not list(folder.glob(f"{name}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), engine]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return next(iter(folder.glob(f"{name}-*.whl")))


def patterns(source: str) -> list[re.Pattern[str]]:
    """What matches the tensors that a converter's code names: ``{}`` and ``*`` stand for numbers."""
    texts = {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    names = [text for text in texts if re.fullmatch(r"(model\.|lm_head)[\w.{}*]+", text)]
    return [re.compile(re.escape(name).replace(r"\{\}", r"\d+").replace(r"\*", r"\d+")) for name in sorted(names)]


def exported(target: str, work: Path) -> list[str]:
    """The names of the tensors of a tiny model that was converted to a target."""
    from pico_models import PICO

    path = Path(__file__).resolve().parents[2] / "conftest.py"
    spec = importlib.util.spec_from_file_location("pico_maker", path)
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    name, layout = SOURCES[target]
    dense = work / name
    if not dense.exists():
        dense.mkdir()
        model_type, changes = PICO[name]
        maker.make_dense(dense, model_type, **changes)
    out = work / target
    keys = {"tokenizer": "none", "verification": {"enabled": False}, "layout": layout}
    upcycle.convert(str(dense), out, target=target, experts=2, top_k=2, **keys)
    return sorted(SafetensorsFolder(out).specs)


def main() -> int:
    """Print the table; returns 1 if a name is known or unknown otherwise than expected."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--wheels", type=Path, help="a folder of wheels; default: they are downloaded")
    options = parser.parse_args()
    good = True
    print("| engine | target | tensors | without a name there |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        names = {target: exported(target, work) for target in SOURCES}
        for (engine, target), (files, missing) in EXPECTED.items():
            path = wheel(engine, options.wheels or work)
            version = path.name.split("-")[1]
            with zipfile.ZipFile(path) as archive:
                known = [each for file in files for each in patterns(archive.read(file).decode())]
            unnamed = [name for name in names[target] if not any(each.fullmatch(name) for each in known)]
            found = {name.rpartition(".")[2] for name in unnamed}
            good &= found == missing
            print(f"| {engine} {version} | {target} | {len(names[target])} | {', '.join(sorted(found)) or 'none'} |")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
