"""``upcycle report``: writes one page with what a reader needs to judge a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import ProgressBars, print_facts, print_json
from upcycle.errors import UsageError
from upcycle.formatting import size


@click.command("report", short_help="Write an HTML page about a model")
@click.argument("models", metavar="OUT...", nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="the HTML file  [default: report.html in OUT, or of several models here]",
)
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
    models: tuple[str, ...],
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
    """Write an HTML page about the model in OUT, or about several side by side, and a JSON file with its numbers.

    OUT is a folder that upcycle convert or upcycle train wrote, finished or not, or any other model; the page shows whatever
    can be found out about it. Models are run in memory, in fp32.

    \b
    upcycle report ./moe
    upcycle report ./moe --text docs.txt --text code.txt --prompt "def main():"
    upcycle report ./moe --compare compare.json --training ./run
    upcycle report ./vit-moe --images ./photos
    upcycle report ./llama ./half ./healed ./pruned --out models.html
    """
    from upcycle.report.collect import PROMPTS, Wanted
    from upcycle.report.write_report import write_report, write_side_by_side

    wanted = Wanted(text, tokens, prompt or PROMPTS, source, compare, training, run=not no_run, images=images)
    if len(models) > 1:
        if source or compare or training or images:
            raise UsageError(
                "--source, --compare, --training and --images are of one model", hint="a report each, or leave them out"
            )
        report = write_side_by_side(models, out or "report.html", wanted, ProgressBars(quiet))
    else:
        report = write_report(models[0], out, wanted, ProgressBars(quiet))
    if as_json:
        print_json(report.data)
        return
    if len(models) > 1:
        told = [(data["out"], data["summary"]) for data in report.data["models"]]
        facts = [(name, f"{said['verdict']}. May I use it? {said['answers'][0]['text']}") for name, said in told]
        print_facts([*facts, _written(report)])
        return
    summary = report.data["summary"]
    absent = [f"{name}: {part['missing']}" for name, part in report.data.items() if _is_missing(part)]
    facts = [("verdict", summary["verdict"])]
    facts += [
        ({"good": "ok", "caution": "caution", "bad": "problem"}[part["level"]], part["text"])
        for part in summary["findings"]
    ]
    facts += [("left out", text) for text in absent]
    command = summary["answers"][-1]["command"]  # names the model as the page does, without folders of this machine
    if command:
        typed = (models[0] if word == report.data["out"] else word for word in command.split())
        facts.append(("next", " ".join(typed)))
    print_facts([*facts, _written(report)])


def _written(report: Any) -> tuple[str, str]:
    return "report", f"{report.html} ({size(report.html.stat().st_size)}), numbers in {report.json}"


def _is_missing(part: object) -> bool:
    return isinstance(part, dict) and "missing" in part
