"""Healing the demo model after it was split to 50% of its neurons: plain continual pre-training, with its dense parent, routers first.

All see the same rows of CPython's documentation and source in the same order, on the side of the split the demo model was
trained on, and are measured on the other. The gap is that of the split's loss to the dense model's, mean of both domains; the
table says after how many tokens how much of it is closed. With ``--plot`` the curves are drawn, too.

    python -P tests/benchmarks/healing.py --tokens 400000 --out docs/healing_demo.md --plot docs/healing_demo.svg
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import upcycle
from upcycle.runtime import load_stock
from upcycle.sources import locate
from upcycle.text import load_tokenizer
from upcycle.trainers.data import open_validation
from upcycle.trainers.demo_text import split
from upcycle.trainers.loop import train
from upcycle.trainers.recipe import TrainRecipe, parse_train_recipe
from upcycle.trainers.reports import read_log
from upcycle.trainers.step import next_token_losses

SHARES = (0.5, 0.8, 0.9)
BALANCE = {"switch_balance": {"coefficient": 0.01}}
DISTILLED = {"logits": 1.0, "ffn": 1.0, "next_token": 1.0}


@dataclass(frozen=True)
class Curve:
    """Validation loss, mean of the domains in nats, by tokens trained on."""

    name: str
    points: list[tuple[int, float]]

    def tokens_to(self, loss: float) -> float | None:
        """Tokens until the loss is first reached, between measurements linearly; ``None``: never."""
        for (before, above), (after, below) in zip(self.points, self.points[1:], strict=False):
            if below <= loss:
                return before + (after - before) * max(0.0, above - loss) / max(1e-12, above - below)
        return None


def stages(name: str, steps: int, rate: float) -> list[dict[str, Any]]:
    """The stages of a variant, all of the same length together."""
    schedule = {"kind": "cosine", "warmup": max(1, steps // 20), "floor": 0.1}
    everything = {"name": "all", "steps": steps, "learning_rate": rate, "schedule": schedule, "losses": BALANCE}
    if name == "CPT":
        return [everything]
    if name == "CPT + distillation":
        return [{**everything, "distillation": DISTILLED}]
    first = steps // 5
    router = {"name": "router", "train": ["router"], "steps": first, "learning_rate": 3 * rate, "losses": BALANCE}
    schedule = {**schedule, "warmup": max(1, (steps - first) // 20)}
    return [router, {**everything, "steps": steps - first, "schedule": schedule}]


def data(folder: Path) -> dict[str, Any]:
    """Both domains as files, the held-out documents apart."""
    training, validation = split()
    domains: dict[str, Any] = {}
    for domain in ("prose", "code"):
        paths = {}
        for side, documents in (("train", training), ("held-out", validation)):
            paths[side] = folder / f"{domain}-{side}.jsonl"
            lines = [json.dumps({"text": document.text}) for document in documents if document.domain == domain]
            paths[side].write_text("\n".join(lines) + "\n")
        domains[domain] = {"text": str(paths["train"]), "validation": str(paths["held-out"]), "weight": 0.5}
    return {"domains": domains, "validation": {"tokens": 8192}, "cache": str(folder / "cache")}


def measured(model: Path, recipe: TrainRecipe) -> float:
    """A model's validation loss, as training measures it."""
    loaded = load_stock(model)
    found = []
    for batches in open_validation(recipe.data, load_tokenizer(model), length=recipe.length).values():
        nats, count = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                logits = loaded(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
                mask = batch.mask[:, 1:]
                nats += float((next_token_losses(logits, batch.ids) * mask).sum())
                count += int(mask.sum())
        found.append(nats / count)
    return sum(found) / len(found)


def curve(name: str, run: Path, start: float) -> Curve:
    """What a run logged."""
    points = [(0, start)]
    for line in read_log(run / "log.jsonl"):
        if line["kind"] == "validation" and line["tokens"]:
            losses = [value for key, value in line.items() if key.startswith("validation/")]
            points.append((line["tokens"], sum(losses) / len(losses)))
    return Curve(name, points)


def table(dense: float, converted: float, curves: Sequence[Curve], seeds: Sequence[int]) -> str:
    """Markdown; one line per run."""
    gap = converted - dense
    head = (
        "| run | "
        + " | ".join(f"{share:.0%} closed after" for share in SHARES)
        + " | closed at the end | loss at the end |"
    )
    lines = [
        f"Dense {dense:.4f} nats per token, split {converted:.4f}: a gap of {gap:.4f}. Seeds {', '.join(map(str, seeds))}.",
        "",
        head,
        "|---|" + "---:|" * (len(SHARES) + 2),
    ]
    for each in curves:
        cells = []
        for share in SHARES:
            tokens = each.tokens_to(converted - share * gap)
            cells.append("never" if tokens is None else f"{tokens:,.0f} tokens")
        last = each.points[-1][1]
        cells += [f"{(converted - last) / gap:.0%}", f"{last:.4f}"]
        lines.append(f"| {each.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(path: Path, dense: float, curves: Sequence[Curve]) -> None:
    """Loss over tokens."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "upcycle"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for each in curves:
        axes.plot(*zip(*each.points, strict=True), label=each.name, linewidth=1.2)
    axes.axhline(dense, color="black", linewidth=0.8, linestyle=":", label="dense parent")
    axes.set(
        xlabel="tokens",
        ylabel="validation loss, nats per token",
        title="Healing the demo model, 50% of the neurons active",
    )
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pieces", type=int, default=24)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="healing-"))
    work.mkdir(parents=True, exist_ok=True)
    moe = work / "half"
    if not moe.exists():
        recipe = Path(__file__).resolve().parents[2] / "configs" / "convert" / "split_50.yaml"
        from upcycle.recipe import read_recipe

        content = {
            **read_recipe(recipe),
            "source": "demo",
            "pieces": options.pieces,
            "verification": {"enabled": False},
        }
        upcycle.convert(out=moe, **content)
    texts, curves = data(work), []
    length, batch = 256, 16
    steps = -(-options.tokens // (length * batch))
    dense = converted = 0.0
    for seed in options.seeds:
        for name in ("CPT", "CPT + distillation", "router first, CPT"):
            run = work / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            told = parse_train_recipe(
                {
                    "model": str(moe),
                    "output": str(run),
                    "data": texts,
                    "length": length,
                    "global_batch": batch,
                    "micro_batch": batch,
                    "seed": seed,
                    "stages": stages(name, steps, options.rate),
                    "saving": {"every": 20, "keep": 1, "export": False},
                    "log": {"every": 10, "validation": max(1, steps // 12)},
                },
                "healing",
            )
            if not converted:
                dense, converted = measured(locate("demo").path, told), measured(moe, told)
            if train(told, lambda line: print(line, flush=True)).stopped:
                return
            curves.append(curve(name if len(options.seeds) == 1 else f"{name}, seed {seed}", run, converted))
    text = table(dense, converted, curves, options.seeds)
    print(text)
    if options.out:
        command = f"python -P tests/benchmarks/healing.py --tokens {options.tokens} --seeds {' '.join(map(str, options.seeds))}"
        options.out.write_text(f"# Healing the demo model\n\n`{command}` prints:\n\n{text}")
    if options.plot:
        plot(options.plot, dense, curves)


if __name__ == "__main__":
    main()
