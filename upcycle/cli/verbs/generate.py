"""``upcycle generate``: prints a model's continuation of a prompt, and which expert read each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import click

from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import note, print_json, working
from upcycle.errors import UsageError
from upcycle.formatting import size

_MOST_MEMORY = 0.9  # of what is free
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
@click.option(
    "--offload", is_flag=True, help="leave routed experts in MODEL's files, and keep those used last in memory"
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="with --offload: most memory for weights, e.g. 4GB  [default: nine tenths of what is free]",
)
@writing_options
@common_options
def command(
    model: str,
    prompt: str,
    image: str | None,
    offload: bool,
    memory: str | None,
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
    upcycle generate ./large-moe --prompt "Once upon a time" --offload --memory 4GB
    """
    from upcycle.cli.shared.coloured_tokens import ExpertText
    from upcycle.inference.generate import Writer

    most = _memory(offload, memory)
    with working(f"loading {model}"):
        writer = Writer(model, layer, experts=not no_experts, memory=most)
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
                "offload": _offload_facts(writer) if writer.offloaded else None,
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
    if writer.offloaded is not None:
        _say_offloaded(_offload_facts(writer))


def _memory(offload: bool, memory: str | None) -> str | int | None:
    """Return the cap on weights in memory, or None where everything is in memory."""
    if memory is not None and not offload:
        raise UsageError("--memory is a cap for --offload, which is not given", hint="--offload --memory 4GB")
    if not offload:
        return None
    if memory is not None:
        return memory
    from upcycle.hardware.memory import available_memory

    return int(_MOST_MEMORY * available_memory())


def _offload_facts(writer: Any) -> dict[str, Any]:
    rate = writer.written / writer.written_seconds if writer.written else None
    return {**writer.offloaded.facts(), "prompt_seconds": writer.prompt_seconds, "tokens_per_second": rate}


def _say_offloaded(facts: dict[str, Any]) -> None:
    """Note how fast the text was written, and where the experts were found."""
    rate = facts["tokens_per_second"]
    said = [f"prompt read in {facts['prompt_seconds']:.1f} s, {rate:.3g} tokens/s" if rate else "nothing written"]
    if total := sum(facts["written"].values()):
        hits, guessed, misses = (facts["written"][key] / total for key in ("hits", "guessed", "misses"))
        said.append(f"experts {hits:.0%} in memory, {guessed:.0%} fetched ahead, {misses:.0%} waited for")
    note("; ".join([*said, f"{size(facts['bytes_read'])} read"]))
    note(
        f"{size(facts['memory_bytes'])} for weights: {size(facts['resident_bytes'])} always, and "
        f"{facts['kept_per_layer']} or more experts of {size(facts['expert_bytes'])} in each layer"
    )
