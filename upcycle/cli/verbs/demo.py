"""``upcycle demo``: converts and verifies the embedded model in a minute, without a download."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import (
    VERDICT_STYLE,
    Cell,
    ProgressBars,
    print_json,
    print_line,
    print_message,
    print_model_text,
    print_table,
    styled,
    working,
)
from upcycle.files.output.ownership import check_output
from upcycle.formatting import count

# What upcycle compare recommends where half of the FFN neurons run (docs/measured/compare_demo.md, with which a test compares it);
# calibrated on as many tokens as there, so that the demo stays short.
RECOMMENDED: dict[str, Any] = {
    "method": "coactivation_kmeans",
    "active": 0.5,
    "pieces": 12,
    "layers": "except-first:1",
    "shared_unheld": "route",
    "router": "ridge",
    "refit": "blocks",
    "scale": "sum",
    "calibration": "demo",
}
# (title, folder, recipe keys): copies, two splits that must be exact (the second with shared experts), and one that saves time.
CONVERSIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("4 copies, top-2", "upcycled", {"method": "sparse_upcycling", "experts": 4, "top_k": 2}),
    ("8 slices, all on", "split-all", {"method": "random_split", "experts": 8, "top_k": 8}),
    ("4 shared + 8 slices, all on", "split-shared", {"method": "random_split", "experts": 8, "top_k": 8, "shared": 4}),
    ("half of the neurons, fitted", "split-half", {**RECOMMENDED, "calibration": {"text": "demo", "tokens": 6144}}),
)
REPORT = "report.html"
PROMPT = "If the file does not exist,"
REPETITION_PENALTY = 1.3  # without it, a model of this size writes one line again and again


@click.command("demo", short_help="Convert the embedded model in four ways")
@click.argument("out", type=click.Path(path_type=Path), default=Path("upcycle-demo"))
@quiet_option
@common_options
def command(out: Path, quiet: bool, as_json: bool, debug: bool) -> None:
    """Convert the embedded demo model into OUT in four ways, verify each, and let the dense model and two MoEs write a few lines.

    The demo model is a Llama of 3.4 million parameters trained on Python's own documentation and library.
    """
    from upcycle.conversion.convert import convert
    from upcycle.report.write_report import check_report

    if out.is_dir():
        check_report(out / REPORT)
        for _, folder, _ in CONVERSIONS:
            check_output(out / folder, overwrite=True)
    results = []
    for title, folder, keys in CONVERSIONS:
        if not quiet:
            print_message(f"{title}: upcycle convert demo {out / folder} {flags(keys)}")
        # Folders of an earlier demo are replaced; others were refused above.
        with nullcontext() if quiet else working(title):
            results.append(convert("demo", out / folder, overwrite=True, progress=ProgressBars(quiet=True), **keys))
    report = _report(out)
    texts = {title: _continuation(folder) for title, folder in {"dense": None, **_shown(out)}.items()}
    if as_json:
        conversions = [result.as_dict() for result in results]
        print_json({"conversions": conversions, "prompt": PROMPT, "continuations": texts, "report": report})
        return
    print_table(
        ["conversion", "target", "parameters", "active", "FLOPs", "logits differ by", "perplexity", "verdict"],
        [_row(title, result) for (title, _, _), result in zip(CONVERSIONS, results, strict=True)],
        right=range(2, 7),
    )
    first, checked = results[0].plan, results[0].verification
    assert checked is not None
    print_line()
    print_line(
        f"dense: {count(first.parameters_dense)} parameters, perplexity {checked.perplexity_dense:.2f}; "
        "FLOPs are relative to dense"
    )
    print_line(f"{CONVERSIONS[-1][0]}: {_faster(results[-1].plan)}")
    dense, (copies, split) = texts["dense"], _shown(out)
    same = "the same text" if texts[copies] == dense else "different texts"
    for title, written in (
        (f"The dense model and the MoE of 4 copies write {same}", dense),
        ("The split writes", texts[split]),
    ):
        print_line()
        print_line(f"{title}:")
        print_line()
        print_model_text(PROMPT + written.rstrip() + "\n")
    print_line()
    print_line(
        f"report on the last conversion: {report}"
        if report
        else "no report was written, as it needs an extra: pip install 'upcycle[report]'"
    )
    print_line()
    print_line(f"next: upcycle evaluate {out / 'split-half'} --reference demo")


def _shown(out: Path) -> dict[str, Path]:
    """Return the folders of the conversions whose text is shown, by their titles: the copies, and the last split."""
    return {title: out / folder for title, folder, _ in (CONVERSIONS[0], CONVERSIONS[-1])}


def _faster(plan: Any) -> str:
    """Return in words how much faster a split is predicted to be."""
    if not (relative := (plan.time or {}).get("relative")):
        return "its time is not predicted"
    own = relative["upcycle"]
    faster = f"reads in {own['prefill']:.2f}x of the dense model's time and writes in {own['decode']:.2f}x"
    return f"{faster} (predicted for upcycle's kernels; upcycle compare measures)"


def _report(out: Path) -> str | None:
    """Write the report on the last split and return its path; None where the extra that it needs is missing."""
    from upcycle.report.collect import Wanted
    from upcycle.report.write_report import can_draw, write_report

    if not can_draw():
        return None
    return str(write_report(out / CONVERSIONS[-1][1], out / REPORT, Wanted(tokens=1024)).html)


def flags(keys: dict[str, Any]) -> str:
    """Return recipe keys as options of ``upcycle convert``."""
    told = dict(keys)
    if isinstance(inner := keys.get("calibration"), dict):
        told |= {"calibration": inner["text"], "calibration_tokens": inner["tokens"]}
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in told.items())


def _row(title: str, result: Any) -> list[Cell]:
    plan, checked = result.plan, result.verification
    return [
        title,
        plan.target,
        count(plan.parameters_total),
        count(plan.parameters_active),
        f"{plan.flops_per_token / plan.flops_per_token_dense:.2f}x",
        f"{checked.relative_logit_error:.1e}",
        f"{checked.perplexity:.2f}",
        styled(checked.verdict, VERDICT_STYLE[checked.verdict]),
    ]


def _continuation(folder: Path | None) -> str:
    """Return what stock transformers continues the prompt with, greedily; None stands for the dense model."""
    from upcycle.architectures.stock import load_stock_model, load_tokenizer
    from upcycle.files.locate import locate
    from upcycle.text.windows import continuation

    path = folder or locate("demo").path
    return continuation(load_stock_model(path), load_tokenizer(path), PROMPT, repetition_penalty=REPETITION_PENALTY)
