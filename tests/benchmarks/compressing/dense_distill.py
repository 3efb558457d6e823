"""A trained MoE back to dense, then distilled from it: against dense models pruned from it plainly, at equal size and equal tokens.

The parent is ``small_moe.py``'s: 16 experts of 144 neurons, 4 per token. It is observed once; ``to_dense`` makes dense models of 576
neurons (as many as run for a token) and of 144 (what an average or a sum of experts has). Each is then trained with the parent as
teacher (its next-token distribution, the outputs of its FFNs, and the text: the losses of ``configs/train/distill_dense.yaml``) on the
same batches of the text that the parent was trained on. Perplexity on other documents of the same kinds, and on news, a kind that
nothing was trained on.

**The rivals.** The issue asks for "a dense model pruned from the same parent to the same size". A MoE has no dense parent to prune
that was trained as it was, so the rivals are what plain pruning makes of the MoE itself, without a refit: by magnitude (of every
expert equally many neurons, those of the largest weights: ``top_kg``), and by static pruning's score (the neurons that add most to the
output on text: ``neurons``). Beside them stands the demo model, out of which the MoE was grown and which is as large, distilled
likewise; and where ``small_moe.py --dense`` has made it, the demo model trained on all that the MoE was trained on.

    python -P tests/benchmarks/compressing/dense_distill.py --out docs/measured/to_dense.md

It takes 8 minutes of one processor for each of twelve models; ``--widths 576 --rivals`` makes three of them.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "training")]

from compress_quality import Observed, perplexities
from domains import DOMAINS, FOREIGN, parted, texts
from measure import Row, report
from small_moe import DEMO, TOKENS, small_moe
from smollm2 import cache_folder
from training_curves import cosine, run_recipe, write_domains

import upcycle

CALIBRATED = 16_384
LENGTH, BATCH = 256, 8
WIDE, NARROW = 576, 144
DISTILLATION = {"logits": 1.0, "ffn": 1.0, "next_token": 1.0}  # configs/train/distill_dense.yaml


@dataclass(frozen=True)
class Way:
    """How a dense model comes about; ``gather`` None: it is there already."""

    name: str
    width: int
    gather: str | None
    refit: str = "none"
    rival: bool = False


WAYS = (
    Way("ours: fitted neurons", WIDE, "fitted"),
    Way("fitted neurons, refitted", WIDE, "fitted", "down"),
    Way("pruned by static pruning's score", WIDE, "neurons", rival=True),
    Way("pruned by magnitude", WIDE, "top_kg", rival=True),
    Way("the neurons that add most, refitted", WIDE, "neurons", "down"),
    Way("fitted neurons, trained layer by layer", WIDE, "fitted", "blocks"),
    Way("top_kg, refitted", WIDE, "top_kg", "down"),
    Way("svd_kg, refitted", WIDE, "svd_kg", "down"),
    Way("demo model", WIDE, None),
    Way("ours: fitted neurons, refitted", NARROW, "fitted", "down"),
    Way("pruned by static pruning's score", NARROW, "neurons", rival=True),
    Way("the neurons that add most, refitted", NARROW, "neurons", "down"),
    Way("average of the experts, refitted", NARROW, "average", "down"),
    Way("sum of the experts, refitted", NARROW, "sum", "down"),
)


@dataclass(frozen=True)
class Result:
    """Perplexities of one model by kind, before and after training."""

    way: Way
    before: dict[str, float]
    after: dict[str, float]
    rate: float
    seconds: float


def seen_kinds(found: dict[str, float]) -> float:
    """The geometric mean of the perplexities on the kinds that were trained on."""
    return math.exp(fmean(math.log(found[kind]) for kind in DOMAINS))


def recipe(start: Path, parent: Path, tokens: int, work: Path, data: dict[str, Any], rate: float) -> dict[str, Any]:
    """The training run."""
    steps = -(-tokens // (LENGTH * BATCH))
    stage = cosine(steps, rate, 20, distillation={**DISTILLATION, "parent": str(parent)})
    # What counts is measured behind the run.
    often = {"validated": steps, "saved": steps, "export": True}
    return run_recipe(start, data, stage, (LENGTH, BATCH), **often, output=str(work))


def table(parent: dict[str, float], results: Sequence[Result]) -> str:
    """Markdown."""
    kinds = (*DOMAINS, FOREIGN)
    lines = [
        f"| FFN neurons | dense model | {', '.join(DOMAINS)}: before | after | {FOREIGN}: before | after | rate | seconds |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
        f"| 4 x {NARROW} of 16 x {NARROW} | the MoE itself | {seen_kinds(parent):.2f} | | {parent[FOREIGN]:.2f} | | | |",
    ]
    assert set(kinds) == set(parent)
    for one in sorted(results, key=lambda r: (-r.way.width, seen_kinds(r.after))):
        name = f"**{one.way.name}**" if one.way.rival else one.way.name
        lines.append(
            f"| {one.way.width} | {name} | {seen_kinds(one.before):.2f} | {seen_kinds(one.after):.2f} "
            f"| {one.before[FOREIGN]:.2f} | {one.after[FOREIGN]:.2f} | {one.rate:g} | {one.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def verdicts(results: Sequence[Result]) -> list[Row]:
    """Ours beside each rival of its width."""
    rows = []
    for width in sorted({one.way.width for one in results}, reverse=True):
        here = [one for one in results if one.way.width == width]
        ours = next((one for one in here if one.way.name.startswith("ours")), None)
        for rival in (one for one in here if one.way.rival and ours is not None):
            assert ours is not None
            for what, a, b in (
                (", ".join(DOMAINS), seen_kinds(ours.after), seen_kinds(rival.after)),
                (FOREIGN, ours.after[FOREIGN], rival.after[FOREIGN]),
            ):
                name = f"{width} neurons, {what}: ours, {rival.way.name}"
                rows.append(Row(name, f"{a:.2f}", f"{b:.2f}", f"{a / b:.3f}x", "below 1.000x", a < b))
    return rows


def main() -> int:
    """Make, train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a MoE's folder of the demo's shape; default: small_moe.py's")
    parser.add_argument("--train-tokens", type=int, default=TOKENS, help="of small_moe.py  [default: 8,000,000]")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of distillation  [default: 1,000,000]")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[3e-4, 1e-3],
        help="learning rates, tried for all  [default: 3e-4 1e-3]",
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[WIDE, NARROW])
    parser.add_argument("--rivals", action="store_true", help="ours and its rivals alone")
    parser.add_argument("--gather", nargs="+", help="only models that are made like this: fitted neurons top_kg ...")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    parent = options.model or small_moe(options.train_tokens)
    wanted = [way for way in WAYS if way.rival or way.name.startswith("ours") or not options.rivals]
    wanted = [way for way in wanted if options.gather is None or way.gather in options.gather]
    ways = [way for way in wanted if way.width in options.widths]
    trained_dense = cache_folder() / f"small-dense-{options.train_tokens}" / "model"
    if trained_dense.exists() and WIDE in options.widths and not options.rivals:
        ways.append(Way("demo model, trained as the MoE was", WIDE, None))
    _, evaluation = texts((*DOMAINS, FOREIGN))
    whole = perplexities(parent, evaluation)
    print("the MoE:", ", ".join(f"{kind} {value:.2f}" for kind, value in whole.items()), flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = write_domains(work / "text", {domain: parted(domain) for domain in DOMAINS})
        observed = Observed.now(parent, work, CALIBRATED)
        for way in ways:
            start, run = work / "start", work / "run"
            if way.gather is None:
                start = DEMO if way.name == "demo model" else trained_dense
            else:
                told = {"method": "to_dense", "width": way.width, "parameters": {"gather": way.gather}}
                observed.cut(start, **told, refit=way.refit)
            before = perplexities(start, evaluation)
            tried = []
            for rate in options.rates:
                started = time.monotonic()
                upcycle.train(recipe(start, parent, options.tokens, run, data, rate), lambda _: None)
                seconds = time.monotonic() - started
                tried.append(Result(way, before, perplexities(run / "model", evaluation), rate, seconds))
                shutil.rmtree(run)
                print(table(whole, tried[-1:]).splitlines()[-1], flush=True)
            results.append(min(tried, key=lambda one: seen_kinds(one.after)))
            if options.out:  # as far as it is
                options.out.write_text(page(table(whole, results), options, results), encoding="utf-8")
    print(table(whole, results))
    return report(f"to_dense and {options.tokens:,} tokens of distillation", ("ours", "rival"), verdicts(results))


def page(made: str, options: argparse.Namespace, results: Sequence[Result]) -> str:
    """The page of the documentation."""
    rows, tokens, rates = verdicts(results), options.tokens, ", ".join(f"{rate:g}" for rate in options.rates)
    at = (
        f"Each is trained at every rate of {rates}, and the best run counts."
        if "," in rates
        else f"All are trained at a rate of {rates}."
    )
    flags = "" if options.widths == [WIDE, NARROW] else f" --widths {' '.join(map(str, options.widths))}"
    flags += " --rivals" if options.rivals else ""
    flags += f" --gather {' '.join(options.gather)}" if options.gather else ""
    flags += "" if options.rates == [3e-4, 1e-3] else f" --rates {rates.replace(',', '')}"
    met = sum(row.passed is True for row in rows)
    return f"""# A MoE back to dense

Dense models made of a trained Mixture-of-Experts (`tests/benchmarks/compressing/small_moe.py`: 16 experts of {NARROW} neurons, 4 per
token) and then trained on {tokens:,} tokens with the MoE as teacher, all on the same batches, with the losses of
`configs/train/distill_dense.yaml`. {at} Perplexity on other
documents: the geometric mean of the kinds that were trained on, and {FOREIGN}, which was not. Calibrated on {CALIBRATED:,} tokens.

{made}
In bold: the rivals, which plain pruning makes of the same MoE, without a refit: by magnitude (`gather=top_kg`), or by static pruning's
score (`gather=neurons`). The MoE was never a dense model that could be pruned in its place. The demo model is the one that the MoE was
grown out of. {met} of {len(rows)} comparisons of ours with a rival are won after training.

    python -P tests/benchmarks/compressing/dense_distill.py --tokens {tokens}{flags} --out docs/measured/to_dense.md
"""


if __name__ == "__main__":
    sys.exit(main())
