"""``upcycle report``: writes one page with what a reader needs to judge a model."""

from __future__ import annotations

from pathlib import Path

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import ProgressBars, print_facts, print_json
from upcycle.formatting import size


@click.command("report", short_help="Write an HTML page about a model")
@click.argument("out_folder", metavar="OUT")
@click.option("--out", type=click.Path(path_type=Path), help="the HTML file  [default: report.html in OUT]")
@click.option("--source", metavar="DENSE", help="the dense model, if it is no longer where recipe.yaml says")
@click.option(
    "--text",
    multiple=True,
    metavar="FILE",
    help="UTF-8 text file, or the embedded prose or code (repeatable)  [default: prose and code]",
)
@click.option(
    "--tokens", type=click.IntRange(2), default=2048, show_default=True, help="most tokens to read of each text"
)
@click.option("--prompt", multiple=True, metavar="TEXT", help="text that both models continue (repeatable)")
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="a table that upcycle compare --out FILE.json wrote",
)
@click.option(
    "--training",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="the folder of a training run, if OUT is not in it",
)
@click.option(
    "--images",
    metavar="FOLDER",
    help="for encoders of images: .png and .jpg files, of which is shown which patches go to which expert",
)
@click.option("--no-run", is_flag=True, help="only read files and run no model: no perplexity, routing or experts")
@quiet_option
@common_options
def command(
    out_folder: str,
    out: Path | None,
    source: str | None,
    text: tuple[str, ...],
    tokens: int,
    prompt: tuple[str, ...],
    compare: Path | None,
    training: Path | None,
    images: str | None,
    no_run: bool,
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Write an HTML page about the model in OUT, and a JSON file with its numbers.

    OUT is a folder that upcycle convert or upcycle train wrote, finished or not, or any other model; the page shows whatever
    can be found out about it. Models are run in memory, in fp32.

    \b
    upcycle report ./moe
    upcycle report ./moe --text docs.txt --text code.txt --prompt "def main():"
    upcycle report ./moe --compare compare.json --training ./run
    upcycle report ./vit-moe --images ./photos
    """
    from upcycle.report.data.collect import PROMPTS, Wanted
    from upcycle.report.write_report import write_report

    wanted = Wanted(text, tokens, prompt or PROMPTS, source, compare, training, run=not no_run, images=images)
    report = write_report(out_folder, out, wanted, ProgressBars(quiet))
    if as_json:
        print_json(report.data)
        return
    summary = report.data["summary"]
    absent = [f"{name}: {part['missing']}" for name, part in report.data.items() if _is_missing(part)]
    facts = [("verdict", summary["verdict"])]
    facts += [
        ({"good": "ok", "caution": "caution", "bad": "problem"}[part["level"]], part["text"])
        for part in summary["findings"]
    ]
    facts += [("left out", text) for text in absent]
    facts.append(("report", f"{report.html} ({size(report.html.stat().st_size)}), numbers in {report.json}"))
    print_facts(facts)


def _is_missing(part: object) -> bool:
    return isinstance(part, dict) and "missing" in part
