"""OpenMoE's questions (arXiv 2402.01739) to a small Mixture-of-Experts that was really trained (``small_moe.py``).

Does a token's id decide its experts? Do late tokens of a window lose more choices under a capacity? How early are choices settled?
The first two are asked before training and behind it, the third of the checkpoints of a short run, beside that run's last model.

    python -P tests/benchmarks/training/routing_habits.py --tokens 1000000 --out docs/measured/routing_habits.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "compressing")]

from domains import DOMAINS, texts
from small_moe import LOSSES, recipe, small_moe

import upcycle
from upcycle.evaluation.routing_habits import RoutingHabits

WINDOW = 256


def asked(model: Path, tokens: int, *earlier: Path) -> RoutingHabits:
    """The answers of a model on text of the kinds that it was trained on, from documents that it was not."""
    _, evaluation = texts(DOMAINS)
    found = upcycle.evaluate(
        model, text=list(map(str, evaluation)), routing=True, window=WINDOW, tokens=tokens, earlier=earlier
    )
    assert found.routing is not None
    return found.routing


def habits(title: str, found: RoutingHabits) -> list[str]:
    """Rows of the first table."""
    return [
        f"| {title} | {each.layer} | {each.by_token or 0:.1%} | {each.by_majority or 0:.1%} | {each.information or 0:.3f} | "
        + " | ".join(f"{share:.2%}" for share in each.dropped_by_part)
        + " |"
        for each in found.layers
    ]


def main() -> None:
    """Train what is not there, ask, print; with ``--out`` the page is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="that the small MoE was trained on")
    parser.add_argument("--text", type=int, default=4096, help="tokens of each kind of text")
    parser.add_argument("--steps", type=int, default=24, help="of the short run, with six checkpoints")
    parser.add_argument("--work", type=Path, help="keep the short run here, and continue it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="habits-"))
    work.mkdir(parents=True, exist_ok=True)
    model = small_moe(options.tokens)
    start = model.with_name("start")
    before, after = asked(start, options.text), asked(model, options.text)
    content = recipe(start, options.steps * 2048, work, LOSSES)
    content |= {
        "saving": {"every": max(1, options.steps // 6), "keep": 99},
        "log": {"validation": 0, "peak_tflops": 0.05},
    }
    run = upcycle.train(content, print)
    early = asked(Path(str(run.model)), options.text, start, work / "run")
    columns = (
        "| | layer | by token | by majority | information | " + " | ".join(f"fifth {n}" for n in range(1, 6)) + " |"
    )
    layers = [f"layer {each.layer}" for each in early.layers]
    seen = f"{after.seen_tokens:,} of {after.tokens // 2:,}"
    lines = [
        "# What routers follow",
        f"A mixture of 16 experts, 4 per token, grown out of the demo model and trained on {options.tokens:,} tokens, asked on "
        f"{after.tokens:,} tokens of held-out documents in windows of {WINDOW}. *By token*: of the tokens in the second half whose id "
        f"was in the first ({seen}), the share whose first expert is the one that this id had most often there; *by majority*: the "
        "share that the most frequent expert gets. *Information*: I(id; expert) / H(expert). Fifths of the windows, first to last: "
        f"choices that find no room at a capacity of {after.capacity_factor:g}; the model itself drops nothing.",
        "\n".join(
            [columns, "|---" * 2 + "|---:" * 8 + "|", *habits("untrained routers", before), *habits("trained", after)]
        ),
        f"Of a run of {options.steps} steps of 2,048 tokens from the untrained routers, the share of first experts that its last "
        "model, stored in bfloat16, chooses, too:",
        "\n".join(
            [
                "| | all | " + " | ".join(layers) + " |",
                "|---" + "|---:" * (len(layers) + 1) + "|",
                *(
                    f"| {'start' if each.step is None else f'step {each.step}'} | {each.same:.1%} | "
                    + " | ".join(f"{share:.1%}" for share in each.layers)
                    + " |"
                    for each in early.earlier
                ),
            ]
        ),
        "By `python -P tests/benchmarks/training/routing_habits.py "
        f"--tokens {options.tokens} --text {options.text} --steps {options.steps} --out docs/measured/routing_habits.md`.",
    ]
    page = "\n\n".join(lines) + "\n"
    print(page)
    if options.out:
        options.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
