"""Observing and cutting a MoE of 13.8 GB: peak memory of the one, time of the other against copying as many bytes.

The model is random bfloat16 of OLMoE-1B-7B's shape: 16 layers of 64 experts, top-8, one shard per layer. ``upcycle observe`` reads
16,384 tokens of text. Its peak is the resident set of the whole process tree, interpreter and libraries included; the part that is
of mapped files is told apart (libraries: upcycle maps no weights). Then the model is cut from the file of observations, without a
refit.

How the times are made equal: copying reads the model's files in blocks of 16 MB, and writes them to new files. Both begin with the
model's pages dropped from the page cache and with nothing waiting to be written, and end when the disk has everything (fsync). They
run in turns. A cut also starts an interpreter, computes the SHA-256 of what it writes, and checks that every number is finite. The
goal is against copying the checkpoint; the time of copying only as many bytes as the cut writes stands beside it.

    python -P tests/benchmarks/compressing/large_moe.py --out docs/measured/large_moe.md
    python -P tests/benchmarks/compressing/large_moe.py --size 1 --tokens 2048

It takes 27 GB of disk, which are free again at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

from measure import UPCYCLE, Row, mega, report
from process_memory import Used, measured
from smollm2 import cache_folder

MOST_MEMORY, MOST_TIME = 2_500_000_000, 1.3
HIDDEN, WIDTH, EXPERTS, TOP_K, VOCABULARY, LAYERS = 2048, 1024, 64, 8, 50304, 16
CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
CUTS = (("reap", 0.75), ("reap", 0.5), ("naee", 0.75), ("ream", 0.75), ("hc_smoe", 0.5))
_BLOCK = 1 << 24


def main() -> int:
    """Measure, print, write; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, help="gigabytes, of a model of fewer layers  [default: 13.8]")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--cuts", nargs="+", default=[f"{method}:{keep}" for method, keep in CUTS], help="METHOD:KEEP")
    parser.add_argument("--rounds", type=int, default=1, help="runs of every cut and of its rival  [default: 1]")
    parser.add_argument("--work", type=Path, help="where the model is written  [default: the cache]")
    parser.add_argument("--out", type=Path, help="a page")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)  # what the children do
    parser.add_argument("--copy", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    layers = (
        LAYERS if options.size is None else max(1, round((options.size * 1e9 - 4 * VOCABULARY * HIDDEN) / per_layer()))
    )
    if options.make:
        make(options.make, layers)
        return 0
    if options.copy:
        copy(Path(options.copy[0]), Path(options.copy[1]), int(options.copy[2]))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder goes, whatever ends it
    work = options.work or cache_folder()
    needed = 2 * (layers * per_layer() + 4 * VOCABULARY * HIDDEN)
    if shutil.disk_usage(work).free < needed:
        sys.exit(f"{work} needs {needed / 1e9:.0f} GB free: --work FOLDER, or --size 1")
    with tempfile.TemporaryDirectory(dir=work, prefix="large-moe-") as folder:
        return run(Path(folder), layers, options)


def run(work: Path, layers: int, options: argparse.Namespace) -> int:
    """Make the model, observe it and cut it."""
    model, seen, out = work / "model", work / "seen.safetensors", work / "out"
    itself = [sys.executable, "-P", Path(__file__).resolve()]
    size = [] if options.size is None else ["--size", str(options.size)]
    measured([*itself, "--make", model, *size])
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(f"{stored / 1e9:.1f} GB, {layers} layers of {EXPERTS} experts", flush=True)
    drop(model)
    command = [UPCYCLE, "observe", model, seen, "--calibration", "demo", "--calibration-tokens", str(options.tokens)]
    observed = measured([*command, "--quiet"])
    print(f"observed in {observed.seconds:.0f} s, {mega(observed.peak)}", flush=True)
    what = f"peak memory of observing {options.tokens:,} tokens"
    parts = f"{mega(observed.own)} own, {mega(observed.files)} of files"
    busy = f"{observed.processors:.0f} s of processors"
    rows = [
        Row(what, mega(observed.peak), "", parts, f"below {mega(MOST_MEMORY)}", observed.peak < MOST_MEMORY),
        Row("its time", f"{observed.seconds:.0f} s", "", busy, ""),
        Row("the file of observations", mega(seen.stat().st_size), "", "", ""),
    ]
    for cut in options.cuts:
        method, _, keep = cut.partition(":")
        command = [UPCYCLE, "compress", model, out, "--method", method, "--keep", keep, "--observations", seen]
        ours: list[Used] = []
        theirs: list[Used] = []
        whole: list[Used] = []
        for _ in range(options.rounds):
            drop(model)
            ours.append(measured([*command, "--refit", "none", "--no-verify", "--quiet"]))
            written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            shutil.rmtree(out)
            for copies, count in ((whole, stored), (theirs, written)):
                drop(model)
                copies.append(measured([*itself, "--copy", model, out, str(count)]))
                shutil.rmtree(out)
        a, b, c = (median(one.seconds for one in side) for side in (ours, whole, theirs))
        cells = (f"{a:.1f} s", f"{b:.1f} s", f"{a / b:.2f}x")
        busy = median(one.processors for one in ours)
        name = f"{method}, {float(keep):.0%} kept: {written / 1e9:.1f} GB (copied in {c:.1f} s), {busy:.0f} s of processors"
        rows.append(Row(name, *cells, f"at most {MOST_TIME:.2f}x", a / b <= MOST_TIME))
        print(f"{name}: {', '.join(cells)}; {mega(max(one.peak for one in ours))}", flush=True)
    title = (
        f"{stored / 1e9:.1f} GB of random bfloat16 in {layers} layers of {EXPERTS} experts (OLMoE-1B-7B's), top-{TOP_K}"
    )
    code = report(title, ("upcycle", "copying it"), rows)
    if options.out:
        options.out.write_text(page(title, rows), encoding="utf-8")
    return code


def page(title: str, rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    lines = [f"# A large MoE\n\n{title}.\n", "| | upcycle | copying it | | goal | |", "|---|---:|---:|---:|---|---|"]
    verdict = {True: "met", False: "missed", None: ""}
    lines += [
        f"| {row.what} | {row.ours} | {row.theirs} | {row.ratio} | {row.target} | {verdict[row.passed]} |"
        for row in rows
    ]
    made_by = "`python -P tests/benchmarks/compressing/large_moe.py --out docs/measured/large_moe.md`"
    return "\n".join([*lines, "", f"By {made_by}; copying is of the whole checkpoint."]) + "\n"


def drop(folder: Path) -> None:
    """Let the system forget what it keeps of a folder's files in memory."""
    os.sync()  # pages that are not written yet cannot be dropped
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path, count: int) -> None:
    """Copy the first ``count`` bytes of a folder's weights block by block, file by file, and wait for the disk."""
    target.mkdir()
    block = bytearray(_BLOCK)
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file, (target / path.name).open("wb", buffering=0) as made:
            while count and (got := file.readinto(memoryview(block)[: min(count, _BLOCK)])):
                done = 0
                while done < got:
                    done += made.write(memoryview(block)[done:got])
                count -= got
    for path in target.iterdir():
        with path.open("rb") as made:
            os.fsync(made.fileno())


def per_layer() -> int:
    """Bytes of one layer."""
    return 2 * (EXPERTS * 3 * HIDDEN * WIDTH + EXPERTS * HIDDEN + 4 * HIDDEN**2 + 4 * HIDDEN)


def make(folder: Path, layers: int) -> None:
    """Write the model, one layer in memory at a time."""
    import torch
    from safetensors.torch import save_file

    import upcycle

    folder.mkdir()
    demo = Path(upcycle.__file__).parent / "demo" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / name)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}), encoding="utf-8")
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) * 0.02).bfloat16()

    ones, where = torch.ones(HIDDEN, dtype=torch.bfloat16), {}
    for shard in range(layers + 1):
        if shard < layers:
            prefix = f"model.layers.{shard}."
            tensors = {f"{prefix}self_attn.{part}_proj.weight": drawn(HIDDEN, HIDDEN) for part in "qkvo"}
            norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
            tensors |= {f"{prefix}{norm}.weight": ones.clone() for norm in norms}
            tensors[f"{prefix}mlp.gate.weight"] = drawn(EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                for part, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
                    tensors[f"{prefix}mlp.experts.{expert}.{part}_proj.weight"] = drawn(*shape)
        else:
            tensors = {f"{name}.weight": drawn(VOCABULARY, HIDDEN) for name in ("model.embed_tokens", "lm_head")}
            tensors["model.norm.weight"] = ones
        file = f"model-{shard + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
