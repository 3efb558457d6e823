"""Split a checkpoint of Llama-2-7B's shape into 8 experts: throughput, peak memory, and the plan's forecast of it.

The dense model is random bfloat16 in shards below 5 GB, 13.5 GB in all. upcycle is compared with a process that only
copies: it reads every weight file in blocks of 16 MB, writes them to new files and at the end waits for the disk (fsync)
to have them all, as upcycle does. The two take turns, nothing is dropped from the page cache, and outputs are deleted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

from measure import UPCYCLE, Cost, Row, alternate, mega, peak, rate_row, report, run, spread_row, time_row
from smollm2 import cache_folder

HIDDEN, WIDTH, HEADS, VOCABULARY = 4096, 11008, 32, 32000
LEAST_THROUGHPUT, MOST_MEMORY, FORECAST_ERROR = 0.6, 2_000_000_000, 0.25
_RECIPE = ["--method", "random_split", "--experts", "8", "--top-k", "4", "--tokenizer", "none"]
_SHARD_BYTES = 4_900_000_000
_BLOCK = 1 << 24


def main() -> int:
    """Measure, compare, print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the checkpoints, 27 GB (default: the cache)")
    parser.add_argument(
        "--layers", type=int, default=32, help="fewer make a smaller model, to try it out (default: 32)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="measured runs of each side (default: 3)")
    parser.add_argument(
        "--target", default="auto", help="such as upcycle_moe, the dense model's own class (default: auto)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the dense checkpoint")
    parser.add_argument("--plain-copy", type=Path, nargs=2, help=argparse.SUPPRESS)  # what the child does
    arguments = parser.parse_args()
    if arguments.plain_copy:
        plain_copy(*arguments.plain_copy)
        return 0
    work = (arguments.work or cache_folder() / "benchmarks").absolute()
    work.mkdir(parents=True, exist_ok=True)
    dense = work / f"dense-{arguments.layers}"
    recipe = [*_RECIPE, "--target", arguments.target]
    if not dense.exists():
        make_dense(dense, arguments.layers)

    def by_upcycle() -> Cost:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            return run([UPCYCLE, "convert", dense, Path(folder) / "out", *recipe, "--no-verify", "--quiet"])

    def by_copying() -> Cost:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            return run([sys.executable, Path(__file__).resolve(), "--plain-copy", dense, Path(folder) / "out"])

    try:
        planned = subprocess.run([UPCYCLE, "plan", dense, *recipe, "--json"], check=True, stdout=subprocess.PIPE)
        plan = json.loads(planned.stdout)
        copied = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
        costs = alternate(arguments.rounds, by_upcycle, by_copying)
    finally:
        if not arguments.keep:
            shutil.rmtree(dense)
    measured, forecast = peak(costs[0]), plan["peak_memory_bytes"]
    error = forecast / measured - 1
    rows = [
        rate_row("throughput", *costs, (plan["bytes_output"], copied), LEAST_THROUGHPUT),
        time_row("wall time", *costs),
        spread_row(*costs),
        Row(
            "peak memory",
            mega(measured),
            mega(peak(costs[1])),
            "",
            f"below {mega(MOST_MEMORY)}",
            measured < MOST_MEMORY,
        ),
        Row("peak memory planned", mega(forecast), "", f"{error:+.0%}", "within 25%", abs(error) <= FORECAST_ERROR),
    ]
    title = f"{copied / 1e9:.1f} GB dense Llama, {arguments.layers} layers, random split into 8 experts, "
    return report(title + f"medians of {arguments.rounds} runs each", ("upcycle", "plain copy"), rows)


def plain_copy(source: Path, target: Path) -> None:
    """Copy the weight files block by block, then fsync each; a fair floor, unlike a copy that stays inside the kernel."""
    target.mkdir()
    block = bytearray(_BLOCK)
    paths = sorted(source.glob("*.safetensors"))
    for path in paths:
        with path.open("rb", buffering=0) as file, (target / path.name).open("wb", buffering=0) as copy:
            while count := file.readinto(block):
                done = 0
                while done < count:
                    done += copy.write(memoryview(block)[done:count])
    for path in paths:
        with (target / path.name).open("rb") as copy:
            os.fsync(copy.fileno())


def make_dense(folder: Path, layers: int) -> None:
    """Write the checkpoint; all its tensors are cut from one random block, and every value lies in 0.008..0.03."""
    shapes = dict(_shapes(layers))
    needed = 2 * sum(2 * math.prod(shape) for shape in shapes.values()) + 10**9
    if shutil.disk_usage(folder.parent).free < needed:
        sys.exit(f"{folder.parent} needs {needed / 1e9:.0f} GB free")
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (unfinished / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    block = bytearray(random.Random(0).randbytes(_BLOCK))
    # The high byte of a bfloat16 is its sign and the upper exponent bits.
    block[1::2] = block[1::2].translate(bytes(0x3C | (byte & 0x80) for byte in range(256)))
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(map(math.prod, [*groups[-1].values(), shape])) > _SHARD_BYTES:
            groups.append({})
        groups[-1][name] = shape
    files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    for name, group in zip(files, groups, strict=True):
        _write_shard(unfinished / name, group, block)
    index = {"weight_map": {name: file for file, group in zip(files, groups, strict=True) for name in group}}
    (unfinished / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    unfinished.rename(folder)


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: bytearray) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while position:
            position -= file.write(memoryview(block)[: min(position, _BLOCK)])
        file.flush()
        os.fsync(file.fileno())


def _shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", (HIDDEN,)
        for part in "qkvo":
            yield f"{prefix}self_attn.{part}_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}mlp.gate_proj.weight", (WIDTH, HIDDEN)
        yield f"{prefix}mlp.up_proj.weight", (WIDTH, HIDDEN)
        yield f"{prefix}mlp.down_proj.weight", (HIDDEN, WIDTH)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


if __name__ == "__main__":
    sys.exit(main())
