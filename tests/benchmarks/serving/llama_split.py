"""How fast llama.cpp runs a split of SmolLM2-135M, beside the dense model's file and a statically pruned one.

Converts with ``configs/convert/split_50.yaml`` (its widths, but few calibration tokens: the time does not depend on them) to targets
that llama.cpp knows, writes GGUF files with llama.cpp's converter, and times reading a prompt and writing after it, in turns.
``upcycle verify --with llama.cpp`` says whether it writes what transformers writes. Needs llama-cpp-python in the Python that
``--engine-python`` names, and the folder of llama.cpp in ``LLAMA_CPP`` (docs/guides/serving.md).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import yaml
from smollm2 import dense_folder

import upcycle
from upcycle.errors import EnvironmentFault, UpcycleError
from upcycle.ffn.blueprint import BlueprintFile
from upcycle.files.records import BLUEPRINT_FILE
from upcycle.text.reading.plain_text import DEMO_TEXTS, read_text
from upcycle.verification.engines.engine import WORKERS, run_worker
from upcycle.verification.engines.llama_cpp_engine import LlamaCpp, convert_to_gguf

RECIPE = Path(__file__).resolve().parents[3] / "configs" / "convert" / "split_50.yaml"
# What each model is called, with what differs from the recipe. None of these architectures holds a dense
# first layer. The recipe's own target, qwen2_moe, is left out: llama.cpp loads it with an untied head only, and SmolLM2's is tied.
MODELS: dict[str, dict[str, Any]] = {
    "pruned": {"method": "static_prune", "active": 0.5, "layers": "all"},
    "mixtral": {"target": "mixtral", "layers": "all"},
    "granitemoeshared": {"target": "granitemoeshared", "layers": "all"},
}
DENSE = "dense"


def converted(source: Path, name: str, out: Path, tokens: int) -> Path:
    """The model of a name, converted where it was not yet."""
    content = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    keys = {**content, **MODELS[name]}
    keys["calibration"] = {**content["calibration"], "tokens": tokens}
    if keys["method"] == content["method"]:
        keys["parameters"] = {"tokens": tokens // 2}
        keys["router"] = {**content["router"], "parameters": {"tokens": tokens}}
    else:
        for key in ("parameters", "router", "pieces", "always_on", "shared_unheld"):
            keys.pop(key)
    if not out.is_dir():
        upcycle.convert(str(source), out, **keys, verification={"enabled": False})
    return out


def shape_of(folder: Path) -> str:
    """What a converted model's FFNs consist of."""
    layer = BlueprintFile(folder / BLUEPRINT_FILE).layer(0)
    if not layer.routed:
        return f"{len(layer.shared) * layer.intermediate_size} neurons"
    shape = f"{layer.top_k} of {len(layer.routed)} experts of {layer.intermediate_size}"
    return f"{shape}, beside a shared one of {len(layer.shared) * layer.intermediate_size}" if layer.shared else shape


def cell(times: list[float], dense: list[float], tokens: int) -> str:
    """Median tokens per second with half the distance of the quartiles, and the median of the times relative to dense."""
    rates = [tokens / seconds for seconds in times]
    low, _, high = quantiles(rates, n=4)
    relative = median(one / other for one, other in zip(times, dense, strict=True))
    return f"{median(rates):.0f} ± {(high - low) / 2:.0f} ({relative:.2f}x)"


def table(found: dict[str, Any], said: dict[str, tuple[str, str]], length: int) -> list[str]:
    """Lines of markdown: a row per model."""
    threads = list(found["times"])
    heads = [f"{what}, {n} thread{'s' if n != '1' else ''}" for n in threads for what in ("prefill", "decode")]
    lines = ["| model | FFN | " + " | ".join(heads) + " | as transformers? |", "|" + "---|" * (len(heads) + 3)]
    for name, (shape, verdict) in said.items():
        cells = [
            cell(found["times"][n][name][what], found["times"][n][DENSE][what], length if what == "prefill" else 1)
            for n in threads
            for what in ("prefill", "decode")
        ]
        lines.append(f"| `{name}` | {shape} | {' | '.join(cells)} | {verdict} |")
    return lines


def about(found: dict[str, Any], arguments: argparse.Namespace, length: int) -> str:
    """What was measured, and how."""
    system, _, flags = found["system"].partition(":")
    having = ", ".join(flag.split("=")[0].strip() for flag in flags.split("|") if "= 1" in flag)
    return (
        f"SmolLM2-135M in llama.cpp ({found['version']}; {system.strip()}: {having}), {arguments.kind} files, keys and values in "
        f"fp32, no flash attention. Tokens per second, medians of {arguments.rounds} rounds in turns ± half the distance of the "
        f"quartiles; in brackets the time relative to dense (less is faster). Prefill reads {length} tokens, decode writes "
        f"{arguments.tokens} after them. With one thread it is the process' own time, with more the wall clock's."
    )


def measure(arguments: argparse.Namespace, work: Path) -> list[str]:
    """Convert, time and check; return the page."""
    python, dense = arguments.engine_python, dense_folder()
    folders = {DENSE: dense} | {
        name: converted(dense, name, work / name, arguments.calibration_tokens) for name in arguments.models.split(",")
    }
    files = {name: work / f"{name}-{arguments.kind}.gguf" for name in folders}
    for name, file in files.items():
        if not file.is_file():
            convert_to_gguf(folders[name], file, work, python, arguments.kind)
    # text of the embedded validation set, in the ids of the model
    from upcycle.architectures.stock import load_tokenizer

    prompt = load_tokenizer(dense)(read_text(next(iter(DEMO_TEXTS))))["input_ids"][: arguments.length]
    question = {
        "models": {name: str(file.absolute()) for name, file in files.items()},
        "prompt": prompt,
        "tokens": arguments.tokens,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }
    timing = str(Path(__file__).with_name("llama_timing.py"))
    found = run_worker(LlamaCpp(), timing, question, work, python, HINT, PYTHONPATH=str(WORKERS))
    said = {DENSE: ("1,536 neurons", "")}
    for name, folder in list(folders.items())[1:]:
        checked = upcycle.verify_with(folder, "llama.cpp", tokens=64, python=python)
        said[name] = (shape_of(folder), f"{checked.verdict}: {checked.explanation.split(', up to')[0]}")
    return [about(found, arguments, len(prompt)), "", *table(found, said, len(prompt))]


HINT = "pip install llama-cpp-python, and name its Python with --engine-python"


def check_engine(python: str) -> None:
    """Raise EnvironmentFault where the binding is not there, before minutes are spent."""
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('llama_cpp') is None)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, check=False)
    except OSError as error:
        raise EnvironmentFault(f"{python} cannot be run: {error.strerror}", hint=HINT) from None
    if done.returncode:
        raise EnvironmentFault(f"llama-cpp-python is not installed for {python}", hint=HINT)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: all)")
    parser.add_argument("--kind", default="f32", help="f32, f16, bf16 or q8_0: how all files are stored (default: f32)")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1],
        help="numbers of threads (default: 1); 2 and more need an idle machine",
    )
    parser.add_argument("--rounds", type=int, default=11, help="times each model is timed (default: 11)")
    parser.add_argument("--length", type=int, default=256, help="tokens of the prompt (default: 256)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens that are written (default: 16)")
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="(default: 4096)")
    parser.add_argument("--work", type=Path, help="a folder that keeps models and files for another run")
    parser.add_argument("--out", type=Path, help="a file for the page, such as docs/measured/llama_split.md")
    arguments = parser.parse_args()
    try:
        check_engine(arguments.engine_python)
        with tempfile.TemporaryDirectory() as temporary:
            work = arguments.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            lines = measure(arguments, work)
    except UpcycleError as error:
        print(f"error: {error.message}" + (f"\n\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
