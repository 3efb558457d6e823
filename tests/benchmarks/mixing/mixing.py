"""Several sources into one Mixtral by a recipe of mergekit-moe, by upcycle and by mergekit-moe: the same bits, time, memory.

The sources are SmolLM2-135M and copies of it in which every tensor has normal noise of 1% of its standard deviation, other
noise in each. Both tools read the same YAML (``upcycle convert recipe.yaml OUT``, ``mergekit-moe recipe.yaml OUT``), each in a
process of its own, in turn, and write bfloat16. upcycle does not verify here, since mergekit has no such step.

Cost: eight sources and a random gate. That upcycle's peak memory does not depend on their number is asked of two and eight;
what it takes to average all but the experts (``rest=average``; mergekit takes the base's) is shown.

Equality: two sources with prompts. Whatever the gate mode, all tensors but the routers must have the same bits. Router rows
mean the same where ``cheap_embed`` is given one prompt per expert and a tokenizer without a token that begins a text, which
mergekit counts and upcycle does not: there they must agree within one step of bfloat16. Elsewhere (``hidden``: mergekit
reads the stream at a layer's input, upcycle what the router will read) their cosine is shown, and nothing asked of it.

A third recipe has a shared expert and ``residual_scale``, which mergekit writes as Qwen2-MoE. There the shared expert's down
projection must be twice mergekit's, bit for bit, because its gate is a sigmoid of zero here: always on, at full weight.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

from measure import UPCYCLE, Cost, Row, alternate, memory_row, peak, report, run, spread_row, time_row
from mergekit_moe import TITLE, difference_rows, program, routers, smollm2_folder
from smollm2 import cache_folder

MANY, FEW, TOP_K = 8, 2, 2
MOST_TIME, MOST_MEMORY, MOST_GROWTH = 0.6, 0.5, 1.2
NOISE = 0.01
SHARED_SCALE = 0.1
PROMPTS = (["The parliament votes on the new law in spring."], ["def add(a, b):\n    return a + b"])
NEGATIVE = (["import numpy as np"], ["A poem about the sea"])
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


def main() -> int:
    """Measure, compare, print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for mergekit and 7 GB of models (default: the cache)")
    parser.add_argument("--rounds", type=int, default=3, help="measured runs of each side (default: 3)")
    parser.add_argument("--no-cost", action="store_true")
    parser.add_argument("--no-equality", action="store_true")
    parser.add_argument("--noisy-copies", type=Path, nargs="+", help=argparse.SUPPRESS)  # what a child does
    arguments = parser.parse_args()
    if arguments.noisy_copies:
        noisy_copies(*arguments.noisy_copies)
        return 0
    work = (arguments.work or cache_folder() / "benchmarks").absolute()
    work.mkdir(parents=True, exist_ok=True)
    mergekit, dense = program(work / "mergekit-environment"), smollm2_folder()
    code = 0
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        models = [dense, *(folder / f"source-{i}" for i in range(1, FEW if arguments.no_cost else MANY))]
        subprocess.run([sys.executable, "-P", __file__, "--noisy-copies", *models], check=True)
        if not arguments.no_cost:
            code |= cost(models, mergekit, folder, arguments.rounds)
        if not arguments.no_equality:
            code |= equality(models[:FEW], mergekit, folder)
    return code


def cost(models: list[Path], mergekit: Path, work: Path, rounds: int) -> int:
    """All sources by both tools, then what upcycle does alone; prints three tables."""
    many = write_recipe(work / "many.yaml", models, "random")
    few = write_recipe(work / "few.yaml", models[:FEW], "random")
    averaged = ("--method", "branch_train_mix", "--router", "random", "--sources", ",".join(map(str, models)))

    def by_upcycle(name: str, *arguments: str | Path) -> Cost:
        shutil.rmtree(work / name, ignore_errors=True)
        return run([UPCYCLE, "convert", *arguments, work / name, "--no-verify", "--quiet"], _OFFLINE)

    def by_mergekit() -> Cost:
        shutil.rmtree(work / "theirs", ignore_errors=True)
        return run([mergekit, many, work / "theirs"], _OFFLINE)

    by_upcycle("ours", many), by_mergekit()  # a first run compiles bytecode and fills the page cache
    costs = alternate(rounds, lambda: by_upcycle("ours", many), by_mergekit)
    average = [by_upcycle("other", *averaged) for _ in range(rounds)]
    less = [by_upcycle("other", few) for _ in range(rounds)]
    rows = [
        time_row("wall time", *costs, MOST_TIME),
        memory_row("peak memory", *costs, MOST_MEMORY),
        spread_row(*costs),
        *difference_rows(work / "ours", work / "theirs"),  # reads torch: after all that is measured
    ]
    for name in ("ours", "theirs", "other"):
        shutil.rmtree(work / name)
    title = f"{len(models)} sources of SmolLM2-135M's size -> Mixtral, bfloat16, medians of {rounds} runs each"
    code = report(title, ("upcycle", TITLE), rows)
    growth = peak(costs[0]) / peak(less)
    rows = [memory_row("peak memory", costs[0], less, MOST_GROWTH), time_row("wall time", costs[0], less)]
    code |= report(f"upcycle, by the number of sources ({growth - 1:+.0%})", (f"{MANY}", f"{FEW}"), rows)
    rows = [memory_row("peak memory", average, costs[0]), time_row("wall time", average, costs[0])]
    return code | report(f"upcycle, {MANY} sources, by what is not an expert", ("average", "base"), rows)


def equality(models: list[Path], mergekit: Path, work: Path) -> int:
    """Two sources by both tools for every gate mode; prints one table."""
    headless = [without_first_token(model, work / f"{model.name}-headless") for model in models]
    cases: list[tuple[str, str, list[Path], bool]] = [
        ("random", "random", models, False),
        ("cheap_embed, one prompt", "cheap_embed", headless, False),
        ("cheap_embed, negative prompts", "cheap_embed", models, True),
        ("hidden, negative prompts", "hidden", models, True),
        ("hidden_avg, negative prompts", "hidden_avg", models, True),
    ]
    rows: list[Row] = []
    for label, mode, sources, negative in cases:
        recipe, ours, theirs = write_recipe(work / "two.yaml", sources, mode, negative), work / "ours", work / "theirs"
        run([UPCYCLE, "convert", recipe, ours, "--no-verify", "--quiet"], _OFFLINE)
        run([mergekit, recipe, theirs], _OFFLINE)
        rows += difference_rows(ours, theirs, f"{label}: ")
        if mode != "random":
            rows.append(_router_row(f"{label}: ", routers(ours), routers(theirs), sources is headless))
        shutil.rmtree(ours)
        shutil.rmtree(theirs)
    rows += shared_rows(models, mergekit, work)
    return report(f"{len(models)} sources of SmolLM2-135M's size, by gate mode", ("upcycle", TITLE), rows)


def shared_rows(models: list[Path], mergekit: Path, work: Path) -> list[Row]:
    """The sources as experts, one of them scaled, and again as the shared expert: what both tools write of it."""
    import torch
    from safetensors.torch import load_file

    experts = [{"source_model": str(model)} for model in models]
    experts[0]["residual_scale"] = SHARED_SCALE  # type: ignore[assignment]
    shared = [{"source_model": str(models[-1]), "residual_scale": SHARED_SCALE}]
    content = {"base_model": str(models[0]), "gate_mode": "random", "dtype": "bfloat16", "experts": experts}
    recipe, ours, theirs = work / "shared.yaml", work / "ours", work / "theirs"
    recipe.write_text(json.dumps({**content, "shared_experts": shared, "architecture": "qwen"}), encoding="utf-8")
    run([UPCYCLE, "convert", recipe, ours, "--no-verify", "--quiet"], _OFFLINE)
    run([mergekit, recipe, theirs], _OFFLINE)
    a, b = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    # The routers are random, the shared one's gate is zero here, and mergekit writes zeros as attention's missing biases.
    names = [name for name in a if not name.endswith("gate.weight")]
    differing = []
    for name in names:
        factor = 2 if name.endswith("shared_expert.down_proj.weight") else 1
        if name not in b or not torch.equal(a[name], b[name] * factor):
            differing.append(name)
            print(f"differs: {name}", file=sys.stderr)
    left = [name for name in b if name not in a and b[name].any()]
    shutil.rmtree(ours)
    shutil.rmtree(theirs)
    label = "shared expert, residual_scale: "
    return [
        Row(f"{label}tensors that differ", "", "", f"{len(differing)} of {len(names)}", "none", not differing),
        Row(f"{label}other than zero in mergekit's alone", "", "", f"{len(left)}", "none", not left),
    ]


def _router_row(label: str, ours: Any, theirs: Any, same: bool) -> Row:
    """How alike the routers ``[L, E, d]`` are: in bfloat16 steps where both mean the same, else their rows' cosines."""
    import torch

    if same:
        apart = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
        far = int((apart > 1).sum())
        what = f"{label}router weights more than one step apart"
        return Row(what, "", "", f"{far} of {apart.numel()}", "none", not far)
    cosine = torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=-1)
    return Row(f"{label}cosine of router rows", "", "", f"{cosine.min():.2f} to {cosine.max():.2f}", "")


def write_recipe(path: Path, models: list[Path], mode: str, negative: bool = False) -> Path:
    """mergekit-moe's recipe: the first model as the base, and every one as an expert; JSON is YAML."""
    experts = [{"source_model": str(model)} for model in models]
    if len(models) == FEW:
        experts = [{**expert, "positive_prompts": told} for expert, told in zip(experts, PROMPTS, strict=True)]
    if negative:
        experts = [{**expert, "negative_prompts": told} for expert, told in zip(experts, NEGATIVE, strict=True)]
    content = {"gate_mode": mode, "dtype": "bfloat16", "experts_per_token": TOP_K, "experts": experts}
    path.write_text(json.dumps({"base_model": str(models[0]), **content}), encoding="utf-8")
    return path


def noisy_copies(source: Path, *copies: Path) -> None:
    """Write copies of a dense folder, every tensor of which has noise of ``NOISE`` of its standard deviation, seeded."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    for seed, copy in enumerate(copies, 1):
        rng = torch.Generator().manual_seed(seed)
        noisy = {
            name: (dense.float() + torch.randn(dense.shape, generator=rng) * dense.float().std() * NOISE).to(
                dense.dtype
            )
            for name, dense in tensors.items()
        }
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(noisy, copy / "model.safetensors", metadata={"format": "pt"})


def without_first_token(model: Path, copy: Path) -> Path:
    """The same model, whose tokenizer has no token that begins a text."""
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).symlink_to(path)
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["bos_token"]
    (copy / "tokenizer_config.json").unlink()
    (copy / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return copy


if __name__ == "__main__":
    sys.exit(main())
