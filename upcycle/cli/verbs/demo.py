"""``upcycle demo``: converts and verifies the embedded model in a minute, without a download."""

from __future__ import annotations

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
)
from upcycle.files.output.ownership import check_output
from upcycle.formatting import count

# (title, folder, recipe keys): copies, two splits that must be exact (the second with shared experts), and one that saves compute.
CONVERSIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("4 copies, top-2", "upcycled", {"method": "sparse_upcycling", "experts": 4, "top_k": 2}),
    ("8 slices, all on", "split-all", {"method": "random_split", "experts": 8, "top_k": 8}),
    ("4 shared + 8 slices, all on", "split-shared", {"method": "random_split", "experts": 8, "top_k": 8, "shared": 4}),
    ("4 shared + 4 of 8 slices", "split-sparse", {"method": "random_split", "experts": 8, "top_k": 4, "shared": 4}),
)
REPORT = "report.html"
PROMPT = "def read_file(path):\n    "


@click.command("demo", short_help="Convert the embedded model in four ways")
@click.argument("out", type=click.Path(path_type=Path), default=Path("upcycle-demo"))
@quiet_option
@common_options
def command(out: Path, quiet: bool, as_json: bool, debug: bool) -> None:
    """Convert the embedded demo model into OUT in four ways, verify each, and let the dense model and a MoE write some code.

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
            print_message(f"{title}: upcycle convert demo {out / folder} {_flags(keys)}")
        # Folders of an earlier demo are replaced; others were refused above.
        results.append(convert("demo", out / folder, overwrite=True, progress=ProgressBars(quiet=True), **keys))
    report = _report(out)
    texts = {name: _continuation(folder) for name, folder in (("dense", None), ("4 copies, top-2", out / "upcycled"))}
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
    same = len(set(texts.values())) == 1
    print_line()
    print_line(f"The dense model and the MoE of 4 copies write {'the same text' if same else 'different texts'}:")
    print_line()
    print_model_text(PROMPT + texts["dense"] + "\n\n")
    print_line(
        f"report on the last conversion: {report}"
        if report
        else "no report was written, as it needs an extra: pip install 'upcycle[report]'"
    )
    print_line()
    print_line(f"next: upcycle evaluate {out / 'split-sparse'} --reference demo")


def _report(out: Path) -> str | None:
    """Write the report on the sparse split and return its path; None where the extra that it needs is missing."""
    from upcycle.report.collect import Wanted
    from upcycle.report.write_report import can_draw, write_report

    if not can_draw():
        return None
    return str(write_report(out / CONVERSIONS[-1][1], out / REPORT, Wanted(tokens=1024)).html)


def _flags(keys: dict[str, Any]) -> str:
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in keys.items())


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
    return continuation(load_stock_model(path), load_tokenizer(path), PROMPT)
