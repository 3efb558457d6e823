"""What ``generate`` and ``chat`` show, with colours and without, and how a talk goes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from upcycle.architectures.stock import load_tokenizer
from upcycle.cli.main import cli, main
from upcycle.errors import UsageError
from upcycle.files.locate import DEMO_FOLDER
from upcycle.inference.chat import Conversation
from upcycle.inference.generate import Token, Writer

Pico = Callable[[str], Path]
TEMPLATE = (
    "{% for message in messages %}{% if loop.index0 % 2 != (message.role == 'assistant')|int %}"
    "{{ raise_exception('turns!') }}{% endif %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def moe(pico_moe: Callable[..., Path]) -> str:
    return str(pico_moe("mixtral"))


@pytest.fixture
def templated(pico_moe: Callable[..., Path], tmp_path: Path) -> str:
    folder = Path(shutil.copytree(pico_moe("mixtral"), tmp_path / "chatty"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def run(*arguments: str, **settings: Any) -> Any:
    result = CliRunner().invoke(cli, arguments, **settings)
    assert result.exit_code == 0, result.output
    return result


def test_without_colours_the_expert_stands_behind_each_token(moe: str) -> None:
    shown = run("generate", moe, "--prompt", "def f():", "--tokens", "5").stdout
    told = json.loads(run("generate", moe, "--prompt", "def f():", "--tokens", "5", "--json").stdout)
    assert shown == "".join(f"{token['text']}<{token['experts'][0]}>" for token in told["tokens"]) + "\n"
    assert told["text"] == "".join(token["text"] for token in told["tokens"] if not token["prompt"])
    assert told["stopped"] == "length"
    alone = run("generate", moe, "--prompt", "def f():", "--tokens", "5", "--no-experts").stdout
    assert alone == "def f():" + told["text"] + "\n"


def test_with_colours_each_expert_has_its_own(moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = run("generate", moe, "--prompt", "def f():", "--tokens", "9", color=True).stdout
    told = json.loads(run("generate", moe, "--prompt", "def f():", "--tokens", "9", "--json").stdout)
    text, _, legend = shown.rpartition(f"layer {told['layer']}: ")
    styled = re.findall(r"\x1b\[(?:3;)?30;48;5;(\d+)m(.*?)\x1b\[0m", text, re.DOTALL)
    visible = [token for token in told["tokens"] if token["text"]]
    colours = {int(number): colour for colour, number in re.findall(r"48;5;(\d+)m (\d+) ", legend)}
    assert set(colours) == {token["experts"][0] for token in visible}
    assert len(set(colours.values())) == len(colours)
    assert "".join(part for _, part in styled) == "".join(token["text"] for token in visible).replace("\n", "")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "<" in run("generate", moe, "--prompt", "def f():", "--tokens", "2", color=True).stdout


def test_a_terminal_is_not_told_to_do_anything(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from upcycle.cli.shared.coloured_tokens import ExpertText

    for forced in "10":
        monkeypatch.setenv("FORCE_COLOR", forced)
        monkeypatch.setenv("TTY_COMPATIBLE", forced)
        ExpertText().show(Token(1, "a\x1b[2J\tb\n", [], [], False))
        assert capsys.readouterr().out == "a\ufffd[2J\tb\n"


def test_a_dense_model_is_plain_text(pico: Pico) -> None:
    shown = run("generate", str(pico("llama")), "--prompt", "def f():", "--tokens", "3").stdout
    assert shown.startswith("def f():")
    assert not re.search(r"<\d+>", shown)


def test_lines_are_piped_in_and_empty_ones_say_nothing(moe: str) -> None:
    result = run("chat", moe, "--tokens", "4", "--json", input="hello\n\n   \nagain\n")
    said = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["said"] for one in said] == ["hello", "again"]
    assert "has no chat template" in result.stderr
    assert run("chat", moe, input="").stdout == ""
    shown = run("chat", moe, "--tokens", "4", "--no-experts", input="hello\n").stdout
    assert shown == said[0]["answer"] + "\n"


def test_the_template_is_used_and_its_faults_are_explained(templated: str) -> None:
    result = run("chat", templated, "--tokens", "4", input="hello\nagain\n")
    assert "no chat template" not in result.stderr
    refused = CliRunner().invoke(cli, ["chat", templated, "--system", "Be kind.", "--tokens", "4"], input="hello\n")
    assert isinstance(refused.exception, UsageError)
    assert "turns!" in refused.exception.message


def test_what_the_model_is_given(templated: str, moe: str) -> None:
    tokenizer = load_tokenizer(Path(templated))
    talk = Conversation(tokenizer, 512)
    talk.say("hello", room=10)
    talk.answered("hi")
    ids, dropped = talk.say("again", room=10)
    assert dropped == 0
    assert tokenizer.decode(ids) == "[user] hello\n[assistant] hi\n[user] again\n[assistant] "
    plain = Conversation(load_tokenizer(Path(moe)), 512)
    plain.say("one", room=4)
    plain.answered(" two")
    assert tokenizer.decode(plain.say("three", room=4)[0]) == "one\n two\nthree"


def test_a_full_context_forgets_the_oldest_first(templated: str) -> None:
    tokenizer = load_tokenizer(Path(templated))
    whole = len(tokenizer("[user] word\n[assistant] word\n[user] word\n[assistant] ")["input_ids"])
    talk = Conversation(tokenizer, whole + 5)
    for expected in (0, 0, 2, 2):
        ids, dropped = talk.say("word", room=5)
        assert dropped == expected
        assert len(ids) + 5 <= whole + 5
        talk.answered("word")
    with pytest.raises(UsageError, match="the model reads"):
        talk.say("word " * 99, room=5)
    assert talk.say("word", room=5)[1] == 0, "the talk goes on"


def test_interrupting_an_answer_keeps_what_was_written(moe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []

    def write(self: Writer, ids: list[int], *_: Any) -> Iterator[Token]:
        given.append(ids)
        yield Token(1, "half", [], [], False)
        if len(given) == 1:
            raise KeyboardInterrupt
        yield Token(2, " whole", [], [], False)

    monkeypatch.setattr(Writer, "write", write)
    result = run("chat", moe, "--no-experts", input="hello\nagain\n")
    assert result.stdout == "half\nhalf whole\n"
    assert "stopped" in result.stderr
    assert load_tokenizer(DEMO_FOLDER / "model").decode(given[1]) == "hello\nhalf\nagain"


def test_a_text_that_is_interrupted_does_not_go_on(
    moe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*_: Any) -> Iterator[Token]:
        yield Token(1, "half", [], [], False)
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", write)
    with pytest.raises(SystemExit) as ended:
        main(["generate", moe, "--prompt", "word", "--no-experts"])
    assert ended.value.code == 130
    said = capsys.readouterr()
    assert said.out == "half"
    assert "interrupted" in said.err
    assert "continues" not in said.err


@pytest.mark.long
def test_a_talk_on_a_terminal(moe: str) -> None:
    """Ctrl-C stops an answer and not the talk, Ctrl-D ends it; the whole command, on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-P", "-m", "upcycle.cli.main", "chat", moe, "--tokens", "400"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = ""

    def until(wanted: str, count: int = 1) -> None:
        nonlocal seen
        while seen.count(wanted) < count:
            ready, _, _ = select.select([ours], [], [], 120)
            assert ready, seen
            seen += os.read(ours, 4096).decode(errors="replace")

    try:
        until("> ")
        os.write(ours, b"hello\n")
        until("48;5;", 3)  # an answer has begun
        process.send_signal(signal.SIGINT)
        until("stopped")
        until("> ", 2)
        os.write(ours, b"\n")
        until("> ", 3)
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)
    assert "no chat template" in seen
