"""Walks through upcycle as somebody would who knows no more than what the screen says: every command was named by an output before it.

python -P tests/support/journeys.py docs/measured/journeys.md
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Mapping, Sequence
from fcntl import ioctl
from pathlib import Path
from time import monotonic

ROWS, COLUMNS = 40, 100
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
    """

    def __init__(self, title: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.seen, self.transcript = folder, "", [f"## {title}"]
        self._environment = {**os.environ, **environment, "TERM": "xterm", "COLUMNS": str(COLUMNS)}
        self._environment.pop("CI", None)
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
        main, other = pty.openpty()
        ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        words = [sys.executable, "-P", "-m", "upcycle", *command.split()[1:]]
        process = subprocess.Popen(
            words, cwd=self.folder, env=self._environment, stdin=other, stdout=other, stderr=other, close_fds=True
        )
        os.close(other)
        printed, waiting = b"", list(answers)
        while True:
            ready, _, _ = select.select([main], [], [], 0.2)
            if ready:
                try:
                    block = os.read(main, 65536)
                except OSError:  # Linux says so when the other end is closed
                    break
                printed += block
                asked = printed.rstrip(b" ").endswith(b":")
                if waiting and asked and re.search(rb"\d/\d [^\n]*$", printed):
                    os.write(main, (waiting.pop(0) + "\n").encode())
            elif process.poll() is not None:
                break
        os.close(main)
        text = _CONTROL.sub("", printed.decode("utf-8", "replace"))
        text = "\n".join(line.rstrip() for line in text.split("\n") if not re.search(r"━|Loading weights", line)).strip(
            "\n"
        )
        assert process.wait() == 0, f"{command} ended with {process.returncode}:\n{text}"
        assert not waiting, f"{command} did not ask for {waiting}"
        self.seen += f"\n{text}\n"
        self.transcript += ["```console", f"$ {command}", text, "```"]
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
model is the demo, training is cut to a few steps (`--set`), and the hub is one on this machine. A test makes them, too; this page is
by `python -P tests/support/journeys.py docs/measured/journeys.md`."""


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


def walk(title: str, folder: Path, hub_url: str, token: str) -> Journey:
    """Make one journey to its end."""
    prepared(folder, title)
    journey = Journey(title, folder, {"HF_ENDPOINT": hub_url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"})
    JOURNEYS[title](journey)
    return journey


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from hub_server import TOKEN, HubServer

    pages = [ABOUT]
    for title in JOURNEYS:
        with tempfile.TemporaryDirectory() as folder, HubServer().running() as hub:
            journey = walk(title, Path(folder), hub.url, TOKEN)
            lines = "\n\n".join(["\n".join(journey.transcript[:1]), "\n".join(journey.transcript[1:])])
            pages.append(lines.replace(hub.url, "https://hub.example").replace(folder, "."))
    Path(sys.argv[1]).write_text("\n\n".join(pages) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
