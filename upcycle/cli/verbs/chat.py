"""``upcycle chat``: a conversation with a model, one line at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import note, print_json_line, warn, working
from upcycle.cli.verbs.generate import say_kernels, writing_options


@click.command("chat", short_help="Chat with a model")
@click.argument("model")
@click.option("--system", metavar="TEXT", help="system prompt, if the model's chat template has one")
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
    """Chat with MODEL: type a line and read the answer as it is written, each token in the colour of its expert.

    The tokenizer's chat template is used; without one, the model continues the whole conversation as plain text. When the
    context is full, the oldest messages are forgotten. Ctrl-C stops an answer; Ctrl-D, or Ctrl-C at the input line, ends the
    conversation. Lines may also be piped in. --json prints one JSON object per answer, each on a line of its own.

    \b
    upcycle chat ./moe
    echo "What is a list?" | upcycle chat ./moe --no-experts
    """
    from upcycle.cli.shared.coloured_tokens import ExpertText
    from upcycle.inference.chat import Conversation
    from upcycle.inference.generate import Writer

    with working(f"loading {model}"):
        writer = Writer(model, layer, experts=not no_experts)
    say_kernels(writer)
    conversation = Conversation(writer.tokenizer, writer.context, system)
    if not conversation.templated:
        note("this tokenizer has no chat template: the model continues the conversation as plain text")
        if system:
            warn("--system is ignored: it needs a chat template")
    printer = ExpertText()
    for line in _lines():
        answer, interrupted = "", False
        ids, dropped = conversation.say(line, room=tokens)
        if dropped:
            note(f"the context is full: the model no longer sees the {dropped} oldest messages")
        try:
            for token in writer.write(ids, tokens, temperature, seed):
                if token.prompt:
                    continue
                answer += token.text
                if not as_json:
                    printer.show(token)
        except KeyboardInterrupt:
            interrupted = True
        conversation.answered(answer)
        if as_json:
            print_json_line({"said": line, "answer": answer, "stopped": writer.stopped})
        else:
            printer.end()
        if interrupted:
            note("stopped")
    if writer.layer is not None and not as_json:
        printer.legend(writer.layer)


def _lines() -> Iterator[str]:
    """Yield the lines that are typed or piped in, without empty ones."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if interactive else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration, KeyboardInterrupt):
            return
        if line.strip():
            yield line
