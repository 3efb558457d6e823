"""``upcycle generate``: what a model writes, and which expert read every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import click

from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import print_json

F = TypeVar("F", bound=Callable[..., Any])


def writing_options(function: F) -> F:
    """How a model writes, and what is shown of its experts."""
    for option in (
        click.option("--no-experts", is_flag=True, help="the text alone"),
        click.option(
            "--layer", type=click.IntRange(0), help="whose experts are shown  [default: the middle MoE layer]"
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="seed of the draws"),
        click.option(
            "--temperature",
            type=click.FloatRange(0),
            default=0.0,
            show_default=True,
            help="0 takes the likeliest token every time",
        ),
        click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="tokens to write at most"),
    ):
        function = option(function)
    return function


@click.command("generate")
@click.argument("model")
@click.option("--prompt", required=True, metavar="TEXT", help="what to go on from")
@writing_options
@common_options
def command(
    model: str,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    layer: int | None,
    no_experts: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Let MODEL go on from a prompt, every token in the colour of the expert that read it in one layer.

    MODEL is a folder, a hub id, a .gguf file or demo: a MoE of any of the targets, or dense, which has no colours. Where there
    are no colours to show, the number of the expert stands behind each token: " the<3>". Of several chosen experts it is the
    heaviest; --json gives all, with their weights.

    \b
    upcycle generate ./moe --prompt "def read_file(path):"
    upcycle generate ./moe --prompt "Once upon a time" --temperature 0.8 --seed 7 --layer 3
    """
    from upcycle.cli.shared.coloured_tokens import ExpertText
    from upcycle.inference.generate import Writer

    writer = Writer(model, layer, experts=not no_experts)
    written = writer.write(writer.encode(prompt), tokens, temperature, seed)
    if as_json:
        found = [asdict(token) for token in written]
        text = "".join(token["text"] for token in found if not token["prompt"])
        print_json(
            {
                "model": model,
                "prompt": prompt,
                "text": text,
                "layer": writer.layer,
                "experts": writer.experts,
                "stopped": writer.stopped,
                "tokens": found,
            }
        )
        return
    shown = ExpertText(writer.experts)
    for token in written:
        shown.show(token)
    shown.end()
    if writer.layer is not None:
        shown.legend(writer.layer)
