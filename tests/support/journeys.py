"""Walks through upcycle as somebody would who knows no more than what the screen says: every command was named by an output before it.

python -P tests/support/journeys.py docs/measured/journeys.md [--fresh]

With ``--fresh``, each begins with a new virtual environment, into which this clone is installed; in any case the home folder is empty.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic

sys.path.insert(0, str(Path(__file__).resolve().parent))

from terminal import in_terminal

ROOT = Path(__file__).resolve().parents[2]
_COMMAND = re.compile(r"upcycle [a-z][^\n]*")
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\r")


class Unnamed(AssertionError):  # noqa: N818 - it reads as what is wrong
    """No output so far has named the command."""


class Journey:
    """A terminal in a folder, what was typed, and what was seen.

    Attributes:
        folder: where the commands run.
        seen: everything that was printed so far, without control characters.
        transcript: the same with prompts, as Markdown.
        began: when, of the monotonic clock.
    """

    def __init__(self, title: str, folder: Path, environment: Mapping[str, str], python: str = sys.executable) -> None:
        self.folder, self.seen, self.transcript = folder, "", [f"## {title}"]
        self._environment, self._python = environment, python
        self.began = monotonic()

    def first(self, command: str, answers: Sequence[str] = ()) -> str:
        """Run a command that somebody knows from nothing: ``upcycle`` alone."""
        return self._run(command, answers)

    def named(self, pattern: str, answers: Sequence[str] = (), **filled: str) -> str:
        """Run the last command on the screen that matches, with placeholders filled in, such as ``TEXT="docs.txt"``.

        Raises:
            Unnamed: there is none.
        """
        # A long command is folded by the terminal, but stands in one piece in what was printed.
        found = [line for line in _COMMAND.findall(self.seen) if re.search(pattern, line)]
        if not found:
            raise Unnamed(f"nothing on the screen says {pattern!r}")
        command = re.split(r"\s{2,}|\s*[│|]", found[-1])[0].rstrip(" .,;:")
        for name, value in filled.items():
            command = re.sub(rf"(?<![A-Za-z]){re.escape(name.replace('__', '/'))}(?![A-Za-z])", value, command)
        return self._run(command, answers)

    def again(self, without: str) -> str:
        """Run the last command again, without an option, as its output says."""
        if "the same command without" not in self.seen:
            raise Unnamed("nothing on the screen says to run the command again")
        return self._run(self._last.replace(f" {without}", ""), ())

    def _run(self, command: str, answers: Sequence[str]) -> str:
        """Run a command in a pseudo-terminal, and type the answers, one for each question."""
        self._last = command
        printed = in_terminal(command, self.folder, self._environment, answers, python=self._python)
        text = _CONTROL.sub("", printed.text)
        text = "\n".join(line.rstrip() for line in text.split("\n") if not re.search(r"━|Loading weights", line)).strip(
            "\n"
        )
        assert printed.status == 0, f"{command} ended with {printed.status}:\n{text}"
        self.seen += f"\n{text}\n"
        self.transcript += ["```text", f"$ {command}", text, "```"]
        return text


TEXT = "docs.jsonl"


def _publish(journey: Journey, run: str, repo: str) -> None:
    """What follows a training run: numbers, a page, a verdict, and the hub."""
    for verb in ("evaluate", "report", "verify"):
        journey.named(rf"^upcycle {verb} \S*{run}")
    journey.named(r"^upcycle push .*--dry-run", YOU__NAME=repo)
    journey.again("--dry-run")


def faster_model(journey: Journey) -> None:
    """From a dense model to a faster one, healed, looked at and published."""
    journey.first("upcycle")
    journey.named(r"^upcycle init\b", answers=["demo", "speed", TEXT, "y", "transformers"])
    journey.named(r"^upcycle convert ", OUT="half")
    journey.named(r"^upcycle evaluate half ")
    journey.named(r"^upcycle report half$")
    journey.named(r"^upcycle train heal_distill --model half ", RUN="healing", TEXT=f"{TEXT} {FEW}")
    _publish(journey, "healing", "alice/half")


def bigger_model(journey: Journey) -> None:
    """From a dense model to one with more experts, trained further and published."""
    journey.first("upcycle")
    journey.named(r"^upcycle init\b", answers=["demo", "capacity", TEXT, "y", "transformers"])
    journey.named(r"^upcycle convert ", OUT="moe")
    journey.named(r"^upcycle train upcycle_cpt --model OUT ", OUT="moe", RUN="run", **{TEXT: f"{TEXT} {FEW_STEPS}"})
    _publish(journey, "run", "alice/moe")


def three_fine_tunes(journey: Journey) -> None:
    """From three fine-tunes to one model of their experts, published."""
    journey.first("upcycle")
    journey.named(r"^upcycle convert SOURCE ", **{"SOURCE OUT --experts 8 --top-k 2": "--help"})
    sources = "./prose,./code,./docs"
    journey.named(r"^upcycle convert OUT --method branch_train_mix", OUT="mixed", **{"./math,./code,./law": sources})
    journey.named(r"^upcycle evaluate mixed ")
    journey.named(r"^upcycle report mixed$")
    journey.named(r"^upcycle push SOURCE|^upcycle push OUT YOU/NAME", OUT="mixed", YOU__NAME="alice/mixed")


FEW = "--set stages.0.tokens=2048 --set stages.0.schedule.warmup=1 --set length=128 --set global_batch=4 --set micro_batch=4"
FEW_STEPS = "--set stages.0.tokens=8192 --set stages.0.preset.warmup=1 --set global_batch=4 --set dtype=float32"
JOURNEYS = {
    "A faster model": faster_model,
    "A bigger model from mine": bigger_model,
    "My three fine-tunes in one": three_fine_tunes,
}
ABOUT = """# Three journeys

What somebody types who knows `upcycle` alone, and what the terminal answers: every command was named by an output before it. The
model is the demo, training is cut to a few steps (`--set`), and the hub is one on this machine. A test makes them, too. This page is
by `python -P tests/support/journeys.py docs/measured/journeys.md{how}`.

| journey | commands | minutes |
|---|---:|---:|
{table}

{start}"""
INSTALLED = """Each began with an empty home folder and a new virtual environment, into which `pip install '.[train,report]'` installed
a clone ({minutes:.1f} minutes, which are counted), on two cores."""
HERE = "Each began in an empty folder with an empty home folder; upcycle was installed before."


def installed(folder: Path) -> str:
    """Return the Python of a new virtual environment in ``folder`` that has upcycle, as its README says to install it."""
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    for what in ("torch", f"{ROOT}[train,report]"):
        pip = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", what]
        subprocess.run(pip, check=True, stdout=sys.stderr)
    return str(python)


def rows(path: Path, text: str) -> None:
    """Write a text as rows of a file, as corpora are."""
    parts = [text[place : place + 2_000] for place in range(0, len(text), 2_000)]
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts), encoding="utf-8")


def prepared(folder: Path, title: str) -> None:
    """Write what a user of this journey has: a text, and for the third the fine-tunes."""
    import upcycle
    from upcycle.text.reading.plain_text import read_text

    rows(folder / TEXT, read_text("prose")[:80_000])
    if title != "My three fine-tunes in one":
        return
    for number, (name, text) in enumerate((("prose", "prose"), ("code", "code"), ("docs", "prose"))):
        data = folder / f"{name}.jsonl"
        rows(data, read_text(text)[number * 20_000 : (number + 1) * 20_000])
        stages = [{"steps": 2, "learning_rate": 3e-4}]
        keys = {"model": "demo", "output": str(folder / f"{name}-run"), "data": str(data), "length": 64}
        upcycle.train({**keys, "global_batch": 2, "micro_batch": 2, "stages": stages})
        upcycle.export(folder / f"{name}-run", folder / name)


def walk(title: str, folder: Path, hub_url: str, token: str, python: str = sys.executable) -> Journey:
    """Make one journey to its end, from an empty home folder."""
    prepared(folder, title)
    with tempfile.TemporaryDirectory(prefix="home-") as home:
        hub = {"HF_ENDPOINT": hub_url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HOME": home, "HF_HOME": home}
        journey = Journey(title, folder, hub, python)
        JOURNEYS[title](journey)
    return journey


def main() -> None:
    """Make all of them, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--fresh", action="store_true", help="install upcycle into a new environment first")
    options = parser.parse_args()
    from hub_server import TOKEN, HubServer

    parts, table, installing = [], [], 0.0
    for title in JOURNEYS:
        with tempfile.TemporaryDirectory() as place, HubServer().running() as hub:
            began, folder = monotonic(), Path(place) / "work"
            folder.mkdir()
            python = installed(Path(place) / "venv") if options.fresh else sys.executable
            installing = max(installing, monotonic() - began)
            journey = walk(title, folder, hub.url, TOKEN, python)
            minutes, commands = (monotonic() - began) / 60, sum(line.startswith("$ ") for line in journey.transcript)
            table.append(f"| {title} | {commands} | {minutes:.1f} |")
            lines = "\n\n".join(["\n".join(journey.transcript[:1]), "\n".join(journey.transcript[1:])])
            parts.append(lines.replace(hub.url, "https://hub.example").replace(str(folder), "."))
            print(table[-1], file=sys.stderr, flush=True)
    start = INSTALLED.format(minutes=installing / 60) if options.fresh else HERE
    about = ABOUT.format(how=" --fresh" if options.fresh else "", table="\n".join(table), start=start)
    options.page.write_text("\n\n".join([about, *parts]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
