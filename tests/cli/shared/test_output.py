"""What is printed: nothing that a terminal obeys, nothing that is markup, nothing that opens something; and where it goes."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from upcycle.cli.main import main
from upcycle.cli.shared import output
from upcycle.cli.shared.terminal_safe import one_line, paragraph, prose
from upcycle.errors import UpcycleError

Pico = Callable[[str], Path]
HOSTILE = "\x1b]52;c;ZXZpbA==\x07\x9b2J\u202eevil\u200b\u2028\ud800\x7f[/][red]:boom:\U000e0041"
# What of that a terminal would obey, and U+0080 to U+009F in UTF-8.
OBEYED = set("\x1b\x07\x9b\u202e\u200b\u2028\ud800\x7f\U000e0041")
ROOT = Path(__file__).parents[3]
SOURCES = ("upcycle", "splitters", "trainers", "kernels")
TOKEN = "hf_" + "aB3dE6gH9k" * 3


def obeyed(text: str) -> set[str]:
    return OBEYED & set(text)


def test_the_alphabet() -> None:
    assert one_line("plain [/] name, größer, 你好 🙂") == "plain [/] name, größer, 你好 🙂"
    assert one_line("a\x1b[2J\nb\t\r\u202e\u2028\ud800\x9b") == r"a\x1b[2J\nb\t\r\u202e\u2028\ud800\x9b"
    assert paragraph("a tensor\nhint: run this\x1b[A") == "a tensor\n  hint: run this\\x1b[A"
    assert prose("a\x1b[2J\tb\r\n\u202ec\u2029") == "a\ufffd[2J\tb\ufffd\n\ufffdc\ufffd"
    joined = "\u0646\u0645\u06cc\u200c\u062e\u0648 👩\u200d💻"
    assert prose(joined) == joined
    assert not obeyed(one_line(HOSTILE))
    assert not obeyed(paragraph(HOSTILE))


class Terminal(io.StringIO):
    """A stream that says it is one: rich colours it and draws bars."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def _in_a_phase(text: str) -> None:
    bars = output.ProgressBars(quiet=False)
    with bars.phase(text, 1):
        bars.advance()
        bars.note(text)


# How every function that prints is called with one text.
PRINTERS: dict[str, Callable[[str], Any]] = {
    "print_json": lambda text: output.print_json({text: [text]}),
    "print_json_error": lambda text: (
        output._said_in_json.clear(),
        output.print_json_error(UpcycleError(text, hint=text)),
    ),
    "print_json_line": lambda text: output.print_json_line([text]),
    "print_markdown": output.print_markdown,
    "print_model_text": lambda text: (output.print_model_text(text), output.print_model_text(text, "red")),
    "print_line": lambda text: (
        output.print_line(text, output.styled(text, "red")),
        output.print_line(text, wrap=False),
    ),
    "print_error": lambda text: output.print_error(UpcycleError(text, hint=text)),
    "print_traceback": lambda text: output.print_traceback(ValueError(text)),
    "print_table": lambda text: output.print_table(
        [text], [[text], [output.verdict(text, "red", text)]], title=f"\n{text}"
    ),
    "print_facts": lambda text: output.print_facts([(text, text), ("", output.styled(text, "red"))]),
    "warn": output.warn,
    "note": output.note,
    "print_message": output.print_message,
    "ProgressBars": _in_a_phase,
}
SILENT = {"prepare_streams", "stdout_width", "is_coloured", "flush_streams", "styled", "verdict", "working"}


def test_every_printer_is_tried() -> None:
    tree = ast.parse(Path(output.__file__).read_text(encoding="utf-8"))
    public = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert public == set(PRINTERS) | SILENT


def test_warnings_wrap_by_words_behind_their_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 columns, ``warning:`` takes nine: what follows must not be broken within a word."""
    for variable, value in (("TERM", "xterm"), ("NO_COLOR", "1"), ("COLUMNS", "40")):
        monkeypatch.setenv(variable, value)
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    output.warn("expect a drop in quality until the model is healed")
    output.print_error(UpcycleError("there is no such model in that folder", hint="name another one that is there"))
    lines = re.sub(r"\x1b\[\d*m", "", shown.getvalue()).splitlines()
    assert [line.rstrip() for line in lines] == [
        "warning: expect a drop in quality until",
        "the model is healed",
        "error: there is no such model in that",
        "folder",
        "",
        "hint: name another one that is there",
    ]


@pytest.mark.parametrize("name", PRINTERS)
def test_nothing_is_obeyed_and_nothing_is_markup(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CI", "TQDM_DISABLE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "dumb")  # no sequences of rich's own
    monkeypatch.setenv("COLUMNS", "500")
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    PRINTERS[name](HOSTILE)
    text = shown.getvalue()
    assert not obeyed(text), text
    if name != "ProgressBars":  # a dumb terminal is shown no bars, and its note is what is seen
        assert text.count("[/][red]:boom:") >= text.count("evil") >= 1, text


def test_a_bar_takes_its_title_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CI", "TQDM_DISABLE", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "500")
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with output.ProgressBars(quiet=False).phase("asking \x1b]0;evil\x07[/]", 1):
        pass
    assert r"asking \x1b]0;evil\x07[/]" in shown.getvalue()


@pytest.mark.parametrize("name", ["print_error", "print_traceback", "warn", "note", "print_message", "ProgressBars"])
def test_no_token_is_printed(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    PRINTERS[name](f"GET https://alice:hunter22@hub.example/x failed: {TOKEN}, correct-horse-battery")
    text = capsys.readouterr().err
    assert "hub.example/x failed" in text
    assert not any(secret in text for secret in (TOKEN, "hunter22", "correct-horse")), text


def test_json_stays_what_it_is_but_for_the_users_own_keys(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", 'quoted"token')
    monkeypatch.setenv("HF_ENDPOINT", "https://alice:hunter22@hub.example")
    output.print_json({"url": 'https://hunter22@x quoted"token', "text": f"{HOSTILE} {TOKEN}"})
    found = json.loads(capsys.readouterr().out)
    assert found == {"url": "https://***@x ***", "text": f"{HOSTILE} {TOKEN}"}


def test_debug_shows_where_and_not_whose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    home = tmp_path / "alice-smith"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "alice-smith")
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(home / "model" / "missing"), "--debug"])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text
    trace, _, message = text.partition("\nerror: ")
    assert "~/model/missing" in trace
    assert "alice-smith" not in trace
    assert "no such file or folder" in message


@pytest.mark.long
def test_nothing_else_prints() -> None:
    """One place prints, so that one place makes sure of what is printed."""
    # Workers answer the process that started them; the others are tools of developers, started by python -m.
    others = {
        "upcycle/cli/shared/output.py",
        "upcycle/cli/shared/left_column.py",  # a column of the bars that output.py draws
        "upcycle/cli/verbs/tools/init.py",  # asks, and its questions have nothing of files in them
        "upcycle/cli/commands_page.py",
        "upcycle/evaluation/speed_worker.py",
        "kernels/gpu/compile_gate/__main__.py",
        "kernels/gpu/timing/bench.py",
        "trainers/demo/demo_model.py",
    }
    found = []
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name in others or "/workers/" in name:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            prints = called.split(".")[-1] in (
                "print",
                "pprint",
                "echo",
                "secho",
                "Console",
                "confirm",
                "prompt",
                "print_exc",
            )
            rich = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich"
            stream = isinstance(node, ast.Attribute) and ast.unparse(node).startswith(
                ("sys.stdout.write", "sys.stderr.write", "sys.stdout.print", "sys.__std")
            )
            if prints or rich or stream:
                found.append(f"{name}: {ast.unparse(node)}")
    assert found == []


def test_no_verb_lets_a_library_print_for_it() -> None:
    """Messages of click's own (unknown options, bad values) come through the same place."""
    for arguments in (["plan", "--\x1b[2J"], ["convert", "demo", "x", "--experts", "\x1b]0;a\x07"], ["\x1b[2J"]):
        error = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(sys, "stderr", error)
            main(arguments)
        assert stopped.value.code == 2
        assert "\x1b" not in error.getvalue()
        assert error.getvalue().startswith("error: ")


LIST = "from upcycle.cli.main import main; main(['list', 'losses'])"


def started(shell: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell line in which ``$RUN`` prints a table."""
    line = shell.replace("$RUN", f'{sys.executable} -P -c "$CODE"')
    settings = os.environ | {"CODE": LIST, **environment}
    return subprocess.run(["bash", "-c", line], env=settings, capture_output=True, text=True, check=False)


@pytest.mark.long
@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("$RUN >&-", 0),
        ("$RUN 2>&-", 0),
        ("$RUN <&- >&- 2>&-", 0),
        ("$RUN | head -1; exit ${PIPESTATUS[0]}", 0),
        ("$RUN > /dev/full", 4),
    ],
)
def test_a_stdout_that_is_not_there(shell: str, code: int) -> None:
    done = started(shell)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if code:
        assert done.stderr == (
            "error: the result cannot be printed: No space left on device\n\n"
            "hint: files that the command wrote are complete; free space where stdout goes\n"
        )


def test_a_closed_stream_gives_its_number_to_no_file(tmp_path: Path) -> None:
    """What is opened next would be written into by whatever prints."""
    code = (
        "import os, upcycle.cli.shared.output as o\no.prepare_streams()\n"
        f"f = open({str(tmp_path / 'weights')!r}, 'w'); assert f.fileno() > 2; os.write(1, b'noise'); print('more', flush=True)"
    )
    done = started("$RUN >&-", CODE=code)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "weights").read_text() == ""


def test_characters_that_do_not_fit_are_replaced() -> None:
    code = "import upcycle.cli.shared.output as o; o.prepare_streams(); o.print_facts([('out', 'm\u00f6e')]); o.warn('\u4f60')"
    done = started("$RUN", CODE=code, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out  m?e\n", "warning: ?\n")


def test_the_verdict_is_the_exit_code_whoever_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that has gone must not turn a failure into a success."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        output.print_facts([("verdict", "broken")])
        output.print_json({})
        output.print_line("next")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:  # text that is written on and on has nobody to go on for
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(BrokenPipeError):
            output.print_model_text("once upon a time")
