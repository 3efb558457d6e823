"""A third fine-tune added to a MoE of two, against a MoE of all three made at once: perplexity on text of every kind.

The demo model is fine-tuned three times (``--tokens`` of each, as in ``mixing_quality.py``): on prose, on code, and on news mails. By
the command line, as a user would: ``branch_train_mix`` with ``domain_ridge`` makes a MoE of the first two, and one of all three;
``add_expert`` adds the third to the first. All are measured on other documents of every kind.

Passes when the added expert brings the MoE's geometric mean to at most ``--within`` times that of the MoE made at once. Prints a table
in Markdown and leaves it in ``docs/measured/added_expert.md`` (``--out`` for another file).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    *(str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)),
]

import mixing_quality as mixing
from domains import texts

import upcycle

KINDS = {"prose": "science", "code": "library", "news": "news"}
CALIBRATION_TOKENS = 16384  # of the old kinds, and as many of the new one
EVALUATION_TOKENS = 8192  # of each kind


def added(work: Path, moe: Path, third: Path, old: list[Path], name: str) -> Path:
    """What ``upcycle convert --method add_expert`` makes of a MoE and a fine-tune."""
    arguments = [
        "--method",
        "add_expert",
        "--sources",
        str(third),
        "--set",
        f"sources.0.text={third.with_suffix('.txt')}",
    ]
    calibration = ["--calibration", ",".join(map(str, old)), "--calibration-tokens", str(CALIBRATION_TOKENS)]
    return mixing.converted(work / name, moe, *arguments, *calibration)


def results(work: Path, tokens: int) -> dict[str, mixing.Result]:
    """Every model's, by a short name, in the order of the table."""
    training, evaluation = texts(list(KINDS.values()))
    recipe = mixing.fine_tuning_recipe(tokens)
    models: dict[str, Path] = {}
    for kind, path in zip(KINDS, training, strict=True):
        models[kind], sample = work / kind, work / f"{kind}.txt"
        if not sample.exists():  # written last
            print(f"fine-tuning on {kind}", file=sys.stderr)
            text = path.read_text(encoding="utf-8")
            mixing.fine_tuned(text, recipe, models[kind])
            sample.write_text(text[: mixing.SAMPLE_CHARACTERS], encoding="utf-8")
    found: dict[str, mixing.Result] = {}

    def measure(name: str, label: str, model: str | Path) -> None:
        by_text = upcycle.evaluate(
            model, text=list(map(str, evaluation)), window=512, stride=511, tokens=EVALUATION_TOKENS
        ).texts
        found[name] = mixing.Result(label, dict(zip(KINDS, (text.perplexity for text in by_text), strict=True)))
        print(f"{name}: {found[name].perplexity}", file=sys.stderr)

    for kind, model in models.items():
        measure(kind, f"fine-tuned on {kind}", model)
    *first, third = models.values()
    for top_k in (1, 2):
        for each, count in ((dict(list(models.items())[:2]), "two"), (models, "three")):
            folder = work / f"{count}-{top_k}"
            folder.mkdir(exist_ok=True)
            moe = mixing.mixed(folder, each, "domain_ridge", top_k)
            measure(f"{count}-{top_k}", f"MoE of {count}, top-{top_k}", moe)
            if count == "two":
                moe = added(work, moe, third, [path.with_suffix(".txt") for path in first], f"added-{top_k}")
                measure(f"added-{top_k}", f"the same, with the third added, top-{top_k}", moe)
    return found


def table(found: dict[str, mixing.Result]) -> str:
    """Markdown."""
    lines = [f"| model | {' | '.join(KINDS)} | geometric mean |", "|---" * (len(KINDS) + 2) + "|"]
    for result in found.values():
        cells = [f"{result.perplexity[kind]:.2f}" for kind in KINDS]
        lines.append(f"| {result.label} | {' | '.join(cells)} | {result.mean:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Train, mix, add, measure, print; 1 when the added expert does not bring enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="fine-tuning tokens per kind (default: 100,000)")
    parser.add_argument("--within", type=float, default=1.1, help="of the mean of the MoE made at once (default: 1.1)")
    out = mixing.ROOT / "docs" / "measured" / "added_expert.md"
    parser.add_argument("--out", type=Path, default=out, help="where the table goes")
    parser.add_argument("--work", type=Path, help="folder that keeps the models (default: they are not kept)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        found = results(work, arguments.tokens)
    text = table(found)
    print(text)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    code = 0
    for top_k in (1, 2):
        ratio = found[f"added-{top_k}"].mean / found[f"three-{top_k}"].mean
        passed = ratio <= arguments.within
        code |= not passed
        print(f"top-{top_k}: added / made at once = {ratio:.3f}: {'PASS' if passed else 'FAIL'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
