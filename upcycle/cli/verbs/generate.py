"""``upcycle generate``: prints a model's continuation of a prompt, and which expert read each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import click

from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import note, print_json

F = TypeVar("F", bound=Callable[..., Any])


def writing_options(function: F) -> F:
    """Add the options that say how a model writes and which experts are shown."""
    for option in (
        click.option("--no-experts", is_flag=True, help="print the text without its experts"),
        click.option(
            "--layer", type=click.IntRange(0), help="layer whose experts are shown  [default: the middle MoE layer]"
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="seed for sampling"),
        click.option(
            "--temperature",
            type=click.FloatRange(0),
            default=0.0,
            show_default=True,
            help="sampling temperature; 0 always takes the likeliest token",
        ),
        click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="most tokens to write"),
    ):
        function = option(function)
    return function


def say_kernels(writer: Any) -> None:
    """Note what a MoE's experts run on."""
    if writer.kernels:
        note(f"experts run on: {writer.kernels}")


@click.command("generate", short_help="Continue a prompt and show the experts")
@click.argument("model")
@click.option("--prompt", required=True, metavar="TEXT", help="text that the model continues")
@click.option(
    "--image",
    type=click.Path(),
    help="picture that a model of parts reads with the prompt  [needs its processor's files]",
)
@writing_options
@common_options
def command(
    model: str,
    prompt: str,
    image: str | None,
    tokens: int,
    temperature: float,
    seed: int,
    layer: int | None,
    no_experts: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Continue a prompt with MODEL, and print each token in the colour of the expert that read it in one layer.

    MODEL is a folder, a hub id, a .gguf file or demo: a MoE of any target, or a dense model, whose tokens have no colour. If
    several experts read a token, the one with the largest routing weight is shown; --json prints all of them with their
    weights. Where colours cannot be shown, the expert's number follows each token: " the<3>".

    \b
    upcycle generate ./moe --prompt "def read_file(path):"
    upcycle generate ./moe --prompt "Once upon a time" --temperature 0.8 --seed 7 --layer 3
    upcycle generate ./llava-moe --prompt "What is this?" --image cat.png
    """
    from upcycle.cli.shared.coloured_tokens import ExpertText
    from upcycle.inference.generate import Writer

    writer = Writer(model, layer, experts=not no_experts)
    stream = writer.write(writer.encode(prompt, image), tokens, temperature, seed)
    if as_json:
        written = [asdict(token) for token in stream]
        text = "".join(token["text"] for token in written if not token["prompt"])
        print_json(
            {
                "model": model,
                "prompt": prompt,
                "text": text,
                "layer": writer.layer,
                "experts": writer.experts,
                "stopped": writer.stopped,
                "kernels": writer.kernels,
                "tokens": written,
            }
        )
        return
    say_kernels(writer)
    printer = ExpertText()
    for token in stream:
        printer.show(token)
    printer.end()
    if writer.layer is not None:
        printer.legend(writer.layer)
