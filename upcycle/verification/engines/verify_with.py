"""Verifies that an inference engine generates what stock transformers generates (``upcycle verify OUT --with ENGINE``)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from upcycle.architectures.module_paths import text_config
from upcycle.architectures.stock import build_config, load_tokenizer, view
from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files import records
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.output.scratch import scratch
from upcycle.files.user_paths import user_path
from upcycle.models.load import load_model
from upcycle.notebook import IN_NOTEBOOKS, HtmlShown
from upcycle.progress import Progress
from upcycle.text.reach import MOST_WORK, Reach, reach_of
from upcycle.text.reading.plain_text import DEMO_TEXTS, read_text
from upcycle.text.windows import encode, windows_of
from upcycle.verification.engines.engine import Answer, Engine, NotHeld, Request
from upcycle.verification.engines.llama_cpp_engine import LlamaCpp
from upcycle.verification.engines.rounding import Place, places, tolerance_of
from upcycle.verification.engines.vllm_engine import Vllm

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (LlamaCpp(), Vllm())}
PROMPT, WRITTEN, TOKENS = 16, 32, 128
# Text on which tokenizers often disagree: digits, spaces, accents, other scripts, emoji.
_TRAPS = "In 2024, 1234567 people  don't\n\n\tréservé   naïve — 你好,世界 🙂 x==y\r\n"


@dataclass(frozen=True)
class ServingCheck(HtmlShown):
    """Holds the comparison of an engine with transformers. ``as_dict`` has the documented JSON keys.

    The verdict is ``same`` if every token, and every gap between the two best logits, equals that of transformers except for
    differences that rounding explains; ``different`` if not; ``not held`` if the engine cannot load the model, and then all numbers
    are zero.

    ``first_difference`` is the first token that differs, whether or not it is a near tie. ``gap_error`` is the largest difference of
    a gap (None: the engine computes NaN), and ``gap_allowed`` what rounding explains there. ``positions`` is the length of the
    longest text; only after ``positions_needed`` (0: never) do attention windows and scaled positions matter.
    """

    engine: str
    version: str
    transformers: str
    verdict: Literal["same", "different", "not held"]
    explanation: str
    dtype: str
    prompts: int
    tokens: int
    equal_tokens: int
    near_ties: int
    first_difference: dict[str, Any] | None
    gap_error: float | None
    gap_allowed: float
    tokenizer: Literal["transformers'", "same", "different"] | None
    positions: int = 0
    positions_needed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)


def verify_with(
    out: str | Path,
    engine: str,
    *,
    text: str | None = None,
    tokens: int = TOKENS,
    python: str | None = None,
    progress: Progress = IN_NOTEBOOKS,
) -> ServingCheck:
    """Compare an engine's greedy text with that of stock transformers in fp32, and save the result in ``evaluation.json``.

    Args:
        out: a folder that :func:`upcycle.convert` or :func:`upcycle.export` wrote.
        engine: ``llama.cpp`` or ``vllm``.
        text: UTF-8 file from which prompts are taken; default: the embedded validation texts.
        tokens: tokens that the engine generates, 32 after each prompt.
        python: the Python in which the engine is installed; default: this one.
        progress: receives the progress.

    Raises:
        CheckpointError: a file is missing or has changed since it was written.
        EnvironmentFault: the engine is not installed, its process died, or the model does not fit into memory.
        UsageError: there is no engine of that name.
    """
    if engine not in ENGINES:
        raise UsageError(f"unknown engine '{engine}'", hint=f"one of: {', '.join(ENGINES)}")
    folder, chosen = user_path(out), ENGINES[engine]
    record, config = records.read_record(folder), read_json(folder / "config.json")
    with progress.phase("checking files", 1):
        records.check_files(folder, record)
        progress.advance()
    tokenizer = _tokenizer(folder)
    reach = reach_of(build_config(config, str(folder)))
    request = _question(tokenizer, config, text, tokens, _long_prompt(folder, reach, config, tokens))
    with progress.phase(f"running {chosen.title}, then transformers", 2), scratch("serving") as work:
        try:
            # Engines, too, see a view of the folder without settings that name code or files elsewhere.
            with view(folder, weights=True, tokenizer=True) as safe_view:
                answer = chosen.ask(safe_view, config, request, work, python or sys.executable)
        except NotHeld as refusal:
            return _kept(folder, _not_held(chosen, refusal.message), progress)
        progress.advance()
        found = _compare(folder, config, request, answer, tokenizer, chosen, reach)
        progress.advance()
    return _kept(folder, found, progress)


def _tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder) if (folder / "tokenizer_config.json").is_file() else None


def _long_prompt(folder: Path, reach: Reach, config: dict[str, Any], tokens: int) -> int:
    """Return the length of a prompt after which attention windows matter; 0: there are none, or it would take too long."""
    parameters = sum(spec.elements for spec in SafetensorsFolder(folder).specs.values())
    if not reach.border or reach.work(parameters) > MOST_WORK:
        return 0
    room = int(config.get("max_position_embeddings") or reach.length) - min(tokens, WRITTEN)
    return max(0, min(reach.length, room))


def _question(tokenizer: Any, config: dict[str, Any], text: str | None, tokens: int, long: int) -> Request:
    """Return the request: prompts of 16 tokens, the first of ``long`` tokens if that is more, and texts to tokenize."""
    count, length = max(1, tokens // WRITTEN), min(tokens, WRITTEN)
    if tokenizer is None:
        rng = torch.Generator().manual_seed(0)
        prompts = torch.randint(config["vocab_size"], (count, PROMPT), generator=rng)
        whole = torch.randint(config["vocab_size"], (max(long, 1),), generator=rng)
        return Request(_with_long(prompts, whole, long), length, [])
    contents = [read_text(name) for name in ([text] if text else DEMO_TEXTS)]
    encoded = [encode(tokenizer, content) for content in contents]
    prompts = windows_of(encoded, count * PROMPT, PROMPT)
    return Request(_with_long(prompts, torch.cat(encoded), long), length, [_TRAPS, *(one[:2000] for one in contents)])


def _with_long(prompts: torch.Tensor, ids: torch.Tensor, long: int) -> list[list[int]]:
    """Return the short prompts ``[N, 16]``, the first replaced by ``long`` tokens of ``ids``, which are repeated if need be."""
    found: list[list[int]] = prompts.tolist()
    if long > PROMPT:
        found[0] = Reach(0, long).text(ids)[0].tolist()
    return found


def _compare(
    folder: Path, config: dict[str, Any], request: Request, answer: Answer, tokenizer: Any, engine: Engine, reach: Reach
) -> ServingCheck:
    model = load_model(str(folder))
    rounded = None if answer.dtype == "float32" else load_model(str(folder), dtype=getattr(torch, answer.dtype))
    tolerance = tolerance_of(rounded, model, request.prompts, answer.written)
    found = list(places(model, request.prompts, answer.written, tolerance))
    if not found:
        raise EnvironmentFault(f"{engine.title} generated nothing", hint="choose another --text")
    others = [place for place in found if place.found != place.expected]
    wrong = next((place for place in others if place.margin > place.allowed), None)
    off = max(found, key=lambda place: place.gap_error / place.allowed)
    tokenized = _tokenized_alike(tokenizer, request.texts, answer.tokenized)
    verdict, why = "same", f"{len(found) - len(others)} of {len(found)} greedy tokens are transformers'"
    if math.isinf(off.gap_error):
        verdict, why = "different", f"{engine.title} computes NaN"
    elif wrong:
        verdict, why = "different", _explained(wrong, tokenizer)
    elif off.gap_error > off.allowed:
        verdict = "different"
        why += (
            f", but its two best logits are {off.gap_error:.1e} nearer or farther (rounding explains {off.allowed:.1e})"
        )
    elif others:
        why += f", and {len(others)} are as probable as far as rounding tells"
    if verdict == "same" and tokenized == "different":
        verdict, why = "different", "it tokenizes text in another way than the model's tokenizer"
    if verdict == "different" and (reason := engine.known_difference(folder, config)):
        why += f": {reason}"
    positions = max(len(one) + len(text.tokens) for one, text in zip(request.prompts, answer.written, strict=True))
    why += f", up to position {positions:,} of {text_config(model.config).max_position_embeddings:,}"
    if positions <= reach.border:
        why += f"; sliding windows or scaled positions begin at {reach.border:,}, which was not compared"
    return ServingCheck(
        engine=engine.name,
        version=answer.version,
        transformers=records.versions()["transformers"],
        verdict=verdict,  # type: ignore[arg-type]
        explanation=why,
        dtype=answer.dtype,
        prompts=len(request.prompts),
        tokens=len(found),
        equal_tokens=len(found) - len(others),
        near_ties=sum(place.margin <= place.allowed for place in others),
        first_difference=asdict(others[0]) if others else None,
        gap_error=None if math.isinf(off.gap_error) else off.gap_error,
        gap_allowed=off.allowed,
        tokenizer=tokenized,
        positions=positions,
        positions_needed=reach.border,
    )


def _explained(place: Place, tokenizer: Any) -> str:
    def named(token: int) -> str:
        return repr(tokenizer.decode([token])) if tokenizer else f"token {token}"

    return (
        f"after prompt {place.prompt + 1}, token {place.position + 1} is {named(place.found)}, where transformers writes "
        f"{named(place.expected)}, whose logit is {place.margin:.2g} larger (rounding explains {place.allowed:.1e})"
    )


def _tokenized_alike(
    tokenizer: Any, texts: Sequence[str], found: list[list[int]] | None
) -> Literal["transformers'", "same", "different"] | None:
    if tokenizer is None:
        return None
    if found is None:
        return "transformers'"
    return "same" if [encode(tokenizer, text).tolist() for text in texts] == found else "different"


def _not_held(engine: Engine, why: str) -> ServingCheck:
    version = records.versions()["transformers"]
    return ServingCheck(engine.name, "", version, "not held", why, "", 0, 0, 0, 0, None, 0.0, 0.0, None)


def _kept(folder: Path, found: ServingCheck, progress: Progress) -> ServingCheck:
    """Save the result beside those of other engines about the same files, and return it."""
    before = (records.read_evaluation(folder) or {}).get("serving", {})
    try:
        records.write_evaluation(folder, {"serving": {**before, found.engine: found.as_dict()}})
    except OSError as error:
        progress.note(f"{records.EVALUATION_FILE} cannot be written, and the card will not know: {error.strerror}")
    return found
