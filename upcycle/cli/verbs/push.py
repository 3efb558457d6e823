"""``upcycle push``: publishes a converted model on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import card_options, common_options, quiet_option
from upcycle.cli.shared.output import ProgressBars, print_facts, print_json, print_line, print_table
from upcycle.formatting import size


@click.command("push", short_help="Publish a model on the Hugging Face hub")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="make a private repository")
@click.option(
    "--revision", metavar="BRANCH", help="commit to this branch, created if it does not exist  [default: main]"
)
@click.option("--create-pr", is_flag=True, help="open a pull request instead of committing")
@click.option("--collection", metavar="NAME", help="add the model to a collection, named by slug or title")
@click.option("--dry-run", is_flag=True, help="only show what would be uploaded")
@click.option("--force", is_flag=True, help="publish a model that is broken or was not verified; its card will say so")
@click.option("--overwrite", is_flag=True, help="replace other files in the repository; its history keeps them")
@click.option(
    "--allow",
    multiple=True,
    metavar="TEXT",
    help="publish this text (a folder, a name) although it is private to this machine (repeatable)",
)
@card_options
@quiet_option
@common_options
def command(out: Path, repo: str, quiet: bool, as_json: bool, debug: bool, **options: Any) -> None:
    """Publish the converted model in OUT as REPO (owner/name) on the Hugging Face hub, with a model card.

    First, every file is checked against its recorded hash and searched for keys and for names and folders of this machine. A
    single commit then makes all files appear. After a lost connection, run the same command again: files that have arrived are
    not sent twice. The token is taken from HF_TOKEN or hf auth login.

    \b
    upcycle push OUT you/name --dry-run
    upcycle push OUT you/name --private --collection "My experts"
    upcycle push OUT org/name --create-pr
    """
    from upcycle.publishing.push import push

    result = push(out, repo, progress=ProgressBars(quiet), **options)
    if as_json:
        print_json(result.as_dict())
        return
    rows = [[file.name, size(file.size) if file.status != "deleted" else "", file.status] for file in result.files]
    print_table(["file", "size", ""], rows, right=[1])
    print_line()
    print_facts(_facts(result))
    print_line(result.url, wrap=False)


def _facts(result: Any) -> list[tuple[str, str]]:
    total, sent = size(result.bytes_total), size(result.bytes_to_send)
    where = f"{result.repo} ({'private' if result.private else 'public'})"
    facts = [("size", f"{total} in {sum(file.status != 'deleted' for file in result.files)} files")]
    facts.append(("searched", f"no keys and no folders of this machine in {result.searched} files"))
    if result.dry_run:
        said = [("dry run", f"nothing was sent to {where}"), *facts, ("to send", sent)]
        return [*said, ("next", "the same command without --dry-run")]
    facts.append(("sent", sent if result.commit else "nothing: the repository has all files already"))
    if result.commit:
        facts.append(("commit", result.commit))
    if result.collection:
        facts.append(("collection", result.collection))
    return [("pull request" if result.pull_request else "published", where), *facts]
