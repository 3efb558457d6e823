"""``upcycle verify``: measures how equal a converted model is to the dense model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import VERDICT_STYLE, Cell, ProgressBars, print_facts, print_json, verdict
from upcycle.errors import RefusalError, UsageError, VerificationError


@click.command("verify", short_help="Compare a converted model with its source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", help="the dense model, if it is no longer where recipe.yaml says")
@click.option(
    "--text",
    metavar="FILE",
    help="UTF-8 text file to measure on, or folder of images  [default: embedded validation texts]",
)
@click.option(
    "--tokens",
    type=click.IntRange(16),
    help="tokens to measure on; with an engine, tokens to generate  [default: 1024; with an engine: 128]",
)
@click.option(
    "--with",
    "engine",
    type=click.Choice(["llama.cpp", "vllm"]),
    help="check that this inference engine generates the same text as transformers",
)
@click.option(
    "--engine-python", metavar="PATH", help="the Python in which the engine is installed  [default: this one]"
)
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
    """Compare the converted model in OUT with the dense model that it was made from, in fp32 on real text.

    Every file is checked against its recorded hash, the model is loaded with stock transformers, and the verdict is exact,
    approximate or broken (exit code 3). Models larger than memory are streamed layer by layer.

    With --with, the dense model is not needed: the text that the engine generates is compared, token by token, with the text
    that stock transformers generates from the same files. Exit code 3: they differ; 2: the engine cannot run the model.
    """
    if engine is None:
        if engine_python:
            raise UsageError("--engine-python needs --with ENGINE", hint="add --with llama.cpp or --with vllm")
        _verify(out, source, text, tokens or 1024, quiet, as_json)
    else:
        if source:
            raise UsageError(
                f"--with {engine} takes no --source: the engine is compared with transformers, not with the dense model",
                hint="leave --source out",
            )
        _verify_with(out, engine, text, tokens, engine_python, quiet, as_json)


def _verify(out: Path, source: str | None, text: str | None, tokens: int, quiet: bool, as_json: bool) -> None:
    from upcycle.conversion.verify import verify

    result = verify(out, source=source, text=text, tokens=tokens, progress=ProgressBars(quiet))
    if as_json:
        print_json(result.as_dict())
    else:
        following = [("next", f"upcycle push {out} YOU/NAME --dry-run")] if result.verdict != "broken" else []
        print_facts([*verification_facts(result), *following])
    if result.verdict == "broken":
        raise VerificationError(
            f"{out} is broken: {result.explanation}", hint="convert it again; if that does not help, please report it"
        )


def _verify_with(
    out: Path, engine: str, text: str | None, tokens: int | None, python: str | None, quiet: bool, as_json: bool
) -> None:
    from upcycle.verification.engines.verify_with import TOKENS, verify_with

    result = verify_with(out, engine, text=text, tokens=tokens or TOKENS, python=python, progress=ProgressBars(quiet))
    if as_json:
        print_json(result.as_dict())
    else:
        print_facts(_serving_facts(result))
    if result.verdict == "not held":
        raise RefusalError(
            f"{out}: {result.explanation}",
            hint="convert to another architecture with upcycle convert --target (upcycle list targets)",
        )
    if result.verdict == "different":
        raise VerificationError(
            f"{engine} does not write what transformers writes: {result.explanation}",
            hint=f"serve {out} with transformers, or convert to another --target and verify that with {engine}",
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
            ("logits", f"the gap between the two best equals that in transformers: {within}"),
        ]
    if result.tokenizer:
        facts.append(("tokenizer", result.tokenizer))
    return facts


def running_share(shares: list[float]) -> str:
    """Return how much of the dense FFNs ran: the mean, and the smallest and largest of the layers."""
    mean = sum(shares) / len(shares)
    return f"{mean:.1%} of the dense FFN's neurons per token ({min(shares):.0%} to {max(shares):.0%} by layer)"


def verification_facts(result: Any) -> list[tuple[str, Cell]]:
    """Return the verdict and its numbers as names and texts, one pair per printed line.

    None of them says "error": what is searched for that word in a log should be faults alone.
    """
    from upcycle.verification.verdict import STATES, overfitted, said, span, unseen_ratio

    before, after = ("before", "after") if result.compared_tensors else ("dense", "now")
    style = VERDICT_STYLE[result.verdict]
    limit = f" (promised below {result.tolerance:.0e})" if result.tolerance else ""
    facts: list[tuple[str, Cell]] = [("verdict", verdict(result.verdict, style, result.explanation))]
    difference = f"differ by {said(result.relative_logit_error, '.1e')}, relative{limit}"
    if result.compared == STATES:
        unit = next((unit for unit in ("images", "sounds") if result.text.endswith(unit)), "tokens")
        alike = "" if result.cosine is None else f", mean cosine {said(result.cosine, '.4f')}"
        facts.append((STATES, f"{difference}{alike} ({result.tokens:,} {unit}, {result.text})"))
    else:
        facts += [
            (
                "logits",
                f"{difference}, KL {said(result.kl, '.1e')} nats, top-1 agreement {result.top1_agreement:.1%}",
            ),
            (
                "perplexity",
                f"{before} {said(result.perplexity_dense, '.3f')}, {after} {said(result.perplexity, '.3f')} "
                f"({result.tokens:,} tokens, {result.text})",
            ),
        ]
    check = result.as_dict()
    if result.compared == STATES and (other := check["unseen"]):
        facts.append(
            (
                "other text",
                f"differ by {said(other['relative_error'], '.1e')}, mean cosine {said(other['cosine'], '.4f')} "
                f"({other['tokens']:,} tokens of everyday English, which was not calibrated on)",
            )
        )
    if (ratio := unseen_ratio(check)) is not None:
        other = check["unseen"]
        facts.append(
            (
                "other text",
                f"dense {said(other['perplexity_dense'], '.3f')}, now {said(other['perplexity'], '.3f')}, {ratio:.2f}x "
                f"({other['tokens']:,} tokens of everyday English, which was not calibrated on)",
            )
        )
        if overfitted(check):
            facts.append(
                (
                    "",
                    "much worse than on what it was calibrated on: calibrate on all that it will read, or add self to --calibration",
                )
            )
    if result.far_error is not None:
        facts.append(
            (
                "long text",
                f"differs by {said(result.far_error, '.1e')}, relative, after position {result.positions_needed:,}, where "
                "attention windows and scaled positions matter",
            )
        )
    if result.media:
        image = (
            result.media if result.media_error is None else f"{result.media}: logits differ by {result.media_error:.1e}"
        )
        facts.append(("other parts", image))
    if result.compared_tensors:
        facts.append(("tensors", f"{result.compared_tensors:,}, each equal bit for bit to what it was made from"))
    if shares := result.neurons_run:
        facts.append(("running", running_share(shares)))
    if result.layer_errors:
        facts.append(("layers", f"differ by {span(result.layer_errors)}, relative"))
    if result.all_experts_error is not None:
        facts.append(
            ("all experts on", f"equal to {result.all_experts_reference} within {result.all_experts_error:.1e}")
        )
    return facts
