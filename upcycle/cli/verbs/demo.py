"""``upcycle demo``: the main job on the embedded model, in a minute, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import VERDICT_STYLE, Bars, Cell, print_json, print_table, say, show, styled, write
from upcycle.files.output.ownership import check_output
from upcycle.formatting import count

# title, folder, recipe keys: a copy, a split that must be exact, with shared experts, and one that saves compute.
CONVERSIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("4 copies, top-2", "upcycled", {"method": "sparse_upcycling", "experts": 4, "top_k": 2}),
    ("8 slices, all on", "split-all", {"method": "random_split", "experts": 8, "top_k": 8}),
    ("4 shared + 8 slices, all on", "split-shared", {"method": "random_split", "experts": 8, "top_k": 8, "shared": 4}),
    ("4 shared + 4 of 8 slices", "split-sparse", {"method": "random_split", "experts": 8, "top_k": 4, "shared": 4}),
)
REPORT = "report.html"
PROMPT = "def read_file(path):\n    "


@click.command("demo")
@click.argument("out", type=click.Path(path_type=Path), default=Path("upcycle-demo"))
@quiet_option
@common_options
def command(out: Path, quiet: bool, as_json: bool, debug: bool) -> None:
    """Convert the embedded demo model four ways into OUT, verify each, and let dense and MoE write a line of code.

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
            say(f"{title}: upcycle convert demo {out / folder} {_flags(keys)}")
        # What an earlier demo left is replaced; anything else is refused.
        results.append(convert("demo", out / folder, overwrite=True, progress=Bars(quiet=True), **keys))
    report = _report(out)
    texts = {name: _continuation(folder) for name, folder in (("dense", None), ("4 copies, top-2", out / "upcycled"))}
    if as_json:
        conversions = [result.as_dict() for result in results]
        print_json({"conversions": conversions, "prompt": PROMPT, "continuations": texts, "report": report})
        return
    print_table(
        ["conversion", "target", "parameters", "active", "FLOPs", "logit error", "perplexity", "verdict"],
        [_row(title, result) for (title, _, _), result in zip(CONVERSIONS, results, strict=True)],
        right=range(2, 7),
    )
    first, checked = results[0].plan, results[0].verification
    assert checked is not None
    show()
    show(
        f"dense: {count(first.parameters_dense)} parameters, perplexity {checked.perplexity_dense:.2f}; "
        "FLOPs are relative to dense"
    )
    same = len(set(texts.values())) == 1
    show()
    show(f"The dense model and its copy of 4 experts write {'the same' if same else 'different text'}:")
    show()
    write(PROMPT + texts["dense"] + "\n\n")
    show(
        f"report on the last of them: {report}"
        if report
        else "no report without the extra: pip install 'upcycle[report]'"
    )
    show()
    show(f"next: upcycle evaluate {out / 'split-sparse'} --reference demo")


def _report(out: Path) -> str | None:
    """Write the page about the sparse split; None where the extra is missing."""
    from upcycle.report.data.collect import Wanted
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
    """Greedy text from stock transformers."""
    from upcycle.architectures.stock import load_model, load_tokenizer
    from upcycle.files.locate import locate
    from upcycle.text.windows import continuation

    path = folder or locate("demo").path
    return continuation(load_model(path), load_tokenizer(path), PROMPT)
