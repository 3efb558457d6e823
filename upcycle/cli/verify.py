"""``upcycle verify``: how equal a converted model is to its dense parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upcycle.cli.options import common_options, quiet_option
from upcycle.cli.output import VERDICT_STYLE, Bars, print_facts, print_json
from upcycle.errors import VerificationError


@click.command("verify")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", help="the dense model, when it is no longer where recipe.yaml says")
@click.option("--text", metavar="FILE", help="UTF-8 text to measure on  [default: embedded validation texts]")
@click.option("--tokens", type=click.IntRange(16), default=1024, show_default=True, help="tokens to measure on")
@quiet_option
@common_options
def command(
    out: Path, source: str | None, text: str | None, tokens: int, quiet: bool, as_json: bool, debug: bool
) -> None:
    """Compare the converted model in OUT with its dense parent, in fp32 on real text.

    Checks every file against its recorded hash, loads the model with stock transformers, and says exact, approximate or
    broken (exit code 3). Models larger than memory are streamed layer by layer.
    """
    from upcycle.verification import verify

    result = verify(out, source=source, text=text, tokens=tokens, progress=Bars(quiet))
    if as_json:
        print_json(result.as_dict())
    else:
        print_facts(verification_facts(result))
    if result.verdict == "broken":
        raise VerificationError(
            f"{out} is broken: {result.explanation}", hint="convert it again; report it if that does not help"
        )


def verification_facts(result: Any) -> list[tuple[str, str]]:
    """The verdict and its numbers as lines."""
    before, after = ("before", "after") if result.compared_tensors else ("dense", "MoE")
    style = VERDICT_STYLE[result.verdict]
    limit = f" (promised below {result.tolerance:.0e})" if result.tolerance else ""
    facts = [
        ("verdict", f"[{style}]{result.verdict}[/]: {result.explanation}"),
        (
            "logit error",
            f"{result.relative_logit_error:.1e} relative{limit}, KL {result.kl:.1e} nats, top-1 agreement {result.top1_agreement:.1%}",
        ),
        (
            "perplexity",
            f"{before} {result.perplexity_dense:.3f}, {after} {result.perplexity:.3f} ({result.tokens:,} tokens, {result.text})",
        ),
    ]
    if result.compared_tensors:
        facts.append(("tensors", f"{result.compared_tensors:,}, each what it was made from, bit for bit"))
    if result.layer_errors:
        facts.append(("layers", f"relative error {min(result.layer_errors):.1e} to {max(result.layer_errors):.1e}"))
    if result.all_experts_error is not None:
        facts.append(
            ("all experts on", f"equal to {result.all_experts_reference} within {result.all_experts_error:.1e}")
        )
    return facts
