"""``upcycle chat``: talk with a model, line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import note, print_json_line, warn
from upcycle.cli.verbs.generate import writing_options


@click.command("chat")
@click.argument("model")
@click.option("--system", metavar="TEXT", help="what the model is told first, where its template has a place for it")
@writing_options
@common_options
def command(
    model: str,
    system: str | None,
    tokens: int,
    temperature: float,
    seed: int,
    layer: int | None,
    no_experts: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Talk with MODEL: a line is said, the answer is streamed, every token in the colour of its expert.

    The tokenizer's chat template is used; without one the model goes on from the whole text. Ctrl-C stops an answer; Ctrl-D, or
    Ctrl-C where a line is asked for, ends the talk. Lines may be piped in. --json prints one object a line for each answer.

    \b
    upcycle chat ./moe
    echo "What is a list?" | upcycle chat ./moe --no-experts
    """
    from upcycle.cli.shared.coloured_tokens import ExpertText
    from upcycle.inference.chat import Conversation
    from upcycle.inference.generate import Writer

    writer = Writer(model, layer, experts=not no_experts)
    talk = Conversation(writer.tokenizer, writer.context, system)
    if not talk.templated:
        note("this tokenizer has no chat template: the model goes on from what has been said, as plain text")
        if system:
            warn("--system has no place without a chat template, and is left out")
    shown = ExpertText(writer.experts)
    for line in _lines():
        answer, interrupted = "", False
        ids, dropped = talk.say(line, room=tokens)
        if dropped:
            note(f"the context is full: the first {dropped} lines of the talk are forgotten")
        try:
            for token in writer.write(ids, tokens, temperature, seed):
                if token.prompt:
                    continue
                answer += token.text
                if not as_json:
                    shown.show(token)
        except KeyboardInterrupt:
            interrupted = True
        talk.answered(answer)
        if as_json:
            print_json_line({"said": line, "answer": answer, "stopped": writer.stopped})
        else:
            shown.end()
        if interrupted:
            note("stopped")
    if writer.layer is not None and not as_json:
        shown.legend(writer.layer)


def _lines() -> Iterator[str]:
    """What is typed or piped in; empty lines say nothing."""
    asked = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if asked else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration, KeyboardInterrupt):
            return
        if line.strip():
            yield line
