"""``upcycle verify``: how equal a converted model is to its dense parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import VERDICT_STYLE, Bars, Cell, print_facts, print_json, verdict
from upcycle.errors import RefusalError, UsageError, VerificationError


@click.command("verify")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", help="the dense model, when it is no longer where recipe.yaml says")
@click.option("--text", metavar="FILE", help="UTF-8 text to measure on  [default: embedded validation texts]")
@click.option(
    "--tokens",
    type=click.IntRange(16),
    help="tokens to measure on  [default: 1024; with an engine: 128 that it writes]",
)
@click.option(
    "--with", "engine", type=click.Choice(["llama.cpp", "vllm"]), help="compare with an inference engine's greedy text"
)
@click.option("--engine-python", metavar="PATH", help="the Python that has the engine  [default: this one]")
@quiet_option
@common_options
def command(
    out: Path,
    source: str | None,
    text: str | None,
    tokens: int | None,
    engine: str | None,
    engine_python: str | None,
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Compare the converted model in OUT with its dense parent, in fp32 on real text.

    Checks every file against its recorded hash, loads the model with stock transformers, and says exact, approximate or
    broken (exit code 3). Models larger than memory are streamed layer by layer.

    With an engine, the dense model is not needed: what the engine writes is compared with what stock transformers writes from
    the same files, token by token. Exit code 3: they differ; 2: the engine cannot hold the model.
    """
    if engine is None:
        if engine_python:
            raise UsageError("--engine-python is for --with ENGINE", hint="add --with llama.cpp or --with vllm")
        _verify(out, source, text, tokens or 1024, quiet, as_json)
    else:
        if source:
            raise UsageError(f"--with {engine} needs no --source: it compares with transformers", hint="leave it out")
        _verify_with(out, engine, text, tokens, engine_python, quiet, as_json)


def _verify(out: Path, source: str | None, text: str | None, tokens: int, quiet: bool, as_json: bool) -> None:
    from upcycle.verification.verify import verify

    result = verify(out, source=source, text=text, tokens=tokens, progress=Bars(quiet))
    if as_json:
        print_json(result.as_dict())
    else:
        print_facts(verification_facts(result))
    if result.verdict == "broken":
        raise VerificationError(
            f"{out} is broken: {result.explanation}", hint="convert it again; report it if that does not help"
        )


def _verify_with(
    out: Path, engine: str, text: str | None, tokens: int | None, python: str | None, quiet: bool, as_json: bool
) -> None:
    from upcycle.verification.engines.verify_with import TOKENS, verify_with

    result = verify_with(out, engine, text=text, tokens=tokens or TOKENS, python=python, progress=Bars(quiet))
    if as_json:
        print_json(result.as_dict())
    else:
        print_facts(_serving_facts(result))
    if result.verdict == "not held":
        raise RefusalError(
            f"{out}: {result.explanation}",
            hint="upcycle convert --target writes it for another architecture (upcycle list targets)",
        )
    if result.verdict == "different":
        raise VerificationError(
            f"{engine} does not write what transformers writes: {result.explanation}",
            hint=f"serve {out} with transformers, or convert to another --target and ask again",
        )


def _serving_facts(result: Any) -> list[tuple[str, Cell]]:
    style = {"same": "green", "different": "red", "not held": "red"}[result.verdict]
    facts: list[tuple[str, Cell]] = [("verdict", verdict(result.verdict, style, result.explanation))]
    if result.tokens:
        within = "not finite" if result.gap_error is None else f"within {result.gap_error:.1e}"
        facts += [
            ("engine", f"{result.version} in {result.dtype}, beside transformers {result.transformers} in float32"),
            (
                "tokens",
                f"{result.equal_tokens} of {result.tokens} equal, {result.near_ties} near ties ({result.prompts} prompts)",
            ),
            ("logits", f"the two best are as far apart as in transformers: {within}"),
        ]
    if result.tokenizer:
        facts.append(("tokenizer", result.tokenizer))
    return facts


def verification_facts(result: Any) -> list[tuple[str, Cell]]:
    """The verdict and its numbers as lines."""
    from upcycle.verification.verdict import said, span

    before, after = ("before", "after") if result.compared_tensors else ("dense", "MoE")
    style = VERDICT_STYLE[result.verdict]
    limit = f" (promised below {result.tolerance:.0e})" if result.tolerance else ""
    facts: list[tuple[str, Cell]] = [
        ("verdict", verdict(result.verdict, style, result.explanation)),
        (
            "logit error",
            f"{said(result.relative_logit_error, '.1e')} relative{limit}, KL {said(result.kl, '.1e')} nats, "
            f"top-1 agreement {result.top1_agreement:.1%}",
        ),
        (
            "perplexity",
            f"{before} {said(result.perplexity_dense, '.3f')}, {after} {said(result.perplexity, '.3f')} "
            f"({result.tokens:,} tokens, {result.text})",
        ),
    ]
    if result.far_error is not None:
        facts.append(
            (
                "long text",
                f"{said(result.far_error, '.1e')} relative behind position {result.positions_needed:,}, where windows and scaled "
                "positions show",
            )
        )
    if result.compared_tensors:
        facts.append(("tensors", f"{result.compared_tensors:,}, each what it was made from, bit for bit"))
    if result.layer_errors:
        facts.append(("layers", f"relative error {span(result.layer_errors)}"))
    if result.all_experts_error is not None:
        facts.append(
            ("all experts on", f"equal to {result.all_experts_reference} within {result.all_experts_error:.1e}")
        )
    return facts
