"""What compressions of a trained MoE lose: on the kinds of text that were calibrated on, on one that was not, in writing.

The model is ``small_moe.py``'s, or any MoE (``--model``). It is observed once; every method then cuts it to 75% and 50%, without a
refit and with the closed-form refit of down projections; three of them also with experts and routers trained behind it. Calibrated on
documentation, code and science; measured on other documents of these kinds, and on news, a kind that nothing was calibrated on.
Same continuation: the share of tokens that are the same when both models go on from the same beginnings with greedy decoding, where
one other token makes all that follow others. Same next token: the share that is the same when the cut model is given what the uncut
one wrote.

The rival is REAP as published: its score, no refit. Passes where the best of upcycle's loses at most half as much as REAP in log
perplexity (calibrated kinds, and news) and in agreement.

It takes an hour and a half on two cores; with ``--rows FILE``, the same command goes on where it was stopped.

    python -P tests/benchmarks/compressing/compress_quality.py --out docs/measured/compress_small_moe.md
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))

import torch
from domains import DOMAINS, FOREIGN, texts
from measure import Row, report
from small_moe import TOKENS, small_moe
from torch.nn.functional import cross_entropy
from training_curves import command
from transformers import AutoModelForCausalLM, AutoTokenizer

import upcycle
from upcycle.architectures.stock import load_stock_model
from upcycle.calibration.compressing.observe_file import observe

WINDOW, MEASURED = 256, 8192
PROMPTS, PROMPT, WRITTEN = 48, 32, 32
KEPT = (0.75, 0.5)
OF_EXPERTS = (
    "random_experts",
    "frequency",
    "reap",
    "naee",
    "moe_i2",
    "eep",
    "hc_smoe",
    "m_smoe",
    "ream",
)  # --keep is a part of them
METHODS = (*OF_EXPERTS, "slim", "lower_top_k", "block_drop", "to_dense")
TRAINED = ("reap", "naee", "slim")  # also with --refit blocks
RIVAL = ("reap", "none")


@dataclass(frozen=True)
class Result:
    """One compression: log perplexities relative to the uncut model's, agreement, seconds, bytes."""

    method: str
    refit: str
    keep: float
    calibrated: float
    foreign: float
    agreement: float
    following: float
    seconds: float
    size: int


@dataclass(frozen=True)
class Observed:
    """A MoE that was observed on the calibration texts of ``domains.py``."""

    model: Path
    file: Path
    tokens: int

    @classmethod
    def now(cls, model: Path, folder: Path, tokens: int) -> Observed:
        """Observe it into a folder."""
        file = folder / "seen.safetensors"
        observe(str(model), file, ",".join(map(str, texts()[0])), tokens)
        return cls(model, file, tokens)

    def cut(self, out: Path, **keys: Any) -> Any:
        """Compress it; ``keys`` are those of the recipe."""
        calibration = {"text": [str(path) for path in texts()[0]], "tokens": self.tokens}
        unverified = {"enabled": False}
        told = {
            "overwrite": True,
            "observations": str(self.file),
            "calibration": calibration,
            "verification": unverified,
        }
        return upcycle.convert(str(self.model), out, **told, **keys)


def windows_of(path: Path, tokenizer: object, most: int = MEASURED) -> torch.Tensor:
    """Token ids ``[N, W]`` of the beginning of a text."""
    ids = tokenizer(path.read_text(encoding="utf-8")[: most * 8]).input_ids  # type: ignore[operator]
    count = min(most, len(ids)) // WINDOW
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


def perplexities(folder: Path, paths: Sequence[Path], most: int = MEASURED) -> dict[str, float]:
    """Perplexity of a model on each text, by the text's kind."""
    model = load_stock_model(folder).eval()  # which reads experts in few bits, too
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    for path in paths:
        losses = []
        for ids in windows_of(path, tokenizer, most).split(8):
            with torch.no_grad():
                logits = model(ids).logits[:, :-1].flatten(0, 1)
            losses.append(cross_entropy(logits, ids[:, 1:].flatten()).item())
        found[path.name.split(".")[0]] = math.exp(fmean(losses))
    return found


def written(
    folder: Path, paths: Sequence[Path], uncut: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a model writes, greedily, behind the beginnings of windows of each text, ``[N, T]``.

    With what the ``uncut`` model wrote, also what it would write as each next token of that, ``[N, T]``.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    starts = torch.cat([windows_of(path, tokenizer)[: PROMPTS // len(paths), :PROMPT] for path in paths])
    settings = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0}
    own = model.generate(starts, attention_mask=torch.ones_like(starts), **settings)[:, PROMPT:]
    if uncut is None:
        return own, None
    with torch.no_grad():
        logits = model(torch.cat([starts, uncut], 1)).logits[:, PROMPT - 1 : -1]
    return own, logits.argmax(-1)


def measured(
    folder: Path, dense: dict[str, float], said: torch.Tensor, paths: Sequence[Path], most: int = MEASURED
) -> tuple[float, float, float, float]:
    """Mean log perplexity over the calibrated kinds and that of news, relative to the uncut model's, and both agreements."""
    found = perplexities(folder, paths, most)
    calibrated = fmean(math.log(found[domain] / dense[domain]) for domain in DOMAINS)
    own, following = written(folder, paths, said)
    same, steps = ((tokens == said).double().mean().item() for tokens in (own, following))
    return calibrated, math.log(found[FOREIGN] / dense[FOREIGN]), same, steps


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    lines = [
        "| kept | method | refit | perplexity, calibrated kinds | news | same continuation | same next token | size | seconds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in sorted(results, key=lambda r: (-r.keep, r.calibrated)):
        lines.append(
            f"| {one.keep:.0%} | {one.method} | {one.refit} | {math.exp(one.calibrated):.3f}x | {math.exp(one.foreign):.3f}x "
            f"| {one.agreement:.1%} | {one.following:.1%} | {one.size / 1e6:.1f} MB | {one.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def verdicts(results: Sequence[Result]) -> list[Row]:
    """Ours beside REAP's."""
    rows = []
    for keep in KEPT:
        here = [one for one in results if one.keep == keep and one.method in OF_EXPERTS]
        rival = next(one for one in here if (one.method, one.refit) == RIVAL)
        best = min((one for one in here if one.refit != "none"), key=lambda r: r.calibrated)
        for what, ours, theirs in (
            ("calibrated kinds", best.calibrated, rival.calibrated),
            ("news", best.foreign, rival.foreign),
            ("continuations", 1 - best.agreement, 1 - rival.agreement),
            ("next tokens of what the uncut model wrote", 1 - best.following, 1 - rival.following),
        ):
            ratio = ours / theirs if theirs > 0 else math.inf
            name = f"{keep:.0%}, {what}: loss of {best.method} + refit, of REAP"
            rows.append(Row(name, f"{ours:.3f}", f"{theirs:.3f}", f"{ratio:.2f}x", "at most 0.50x", ratio <= 0.5))
    return rows


def rows_of(path: Path, asked: dict[str, object]) -> dict[tuple[str, str, float], Result]:
    """What was measured before; a new file begins with what was asked, and of something else no row is taken."""
    if not path.is_file():
        path.write_text(json.dumps(asked) + "\n", encoding="utf-8")
    first, *rows = path.read_text(encoding="utf-8").splitlines()
    if json.loads(first) != asked:
        sys.exit(f"{path} has rows of {first}, and this is {json.dumps(asked)}: name another file")
    return {(one.method, one.refit, one.keep): one for one in (Result(**json.loads(line)) for line in rows)}


def the_model(named: str | None, train_tokens: int) -> Path:
    """The MoE to cut."""
    if named == "smollm2-mix":
        from smollm2_mix import smollm2_mix

        return smollm2_mix()
    return Path(named) if named else small_moe(train_tokens)


def main() -> int:
    """Cut, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a MoE's folder, or smollm2-mix (smollm2_mix.py's); default: small_moe.py's")
    parser.add_argument("--train-tokens", type=int, default=TOKENS, help="of small_moe.py  [default: 8,000,000]")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--measured", type=int, default=MEASURED, help="tokens of each text  [default: 8,192]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--refits", nargs="+", default=["none", "down", "blocks"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=Path, help="rows are added to this file, and those in it are not measured again")
    options = parser.parse_args()
    model = the_model(options.model, options.train_tokens)
    _, evaluation = texts((*DOMAINS, FOREIGN))
    dense, said = perplexities(model, evaluation, options.measured), written(model, evaluation)[0]
    print("uncut:", ", ".join(f"{name} {value:.2f}" for name, value in dense.items()), flush=True)
    results = []
    rounded = {kind: round(value, 2) for kind, value in dense.items()}
    asked = {"model": str(model), "tokens": options.tokens, "measured": options.measured, "uncut": rounded}
    known = rows_of(options.rows, asked) if options.rows else {}
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        observed = Observed.now(model, Path(folder), options.tokens)
        print(f"observed once in {time.monotonic() - started:.0f} s", flush=True)
        for keep in KEPT:
            for method in options.methods:
                for refit in options.refits:
                    if refit == "blocks" and method not in TRAINED:
                        continue
                    if (one := known.get((method, refit, keep))) is not None:
                        results.append(one)
                        continue
                    out = Path(folder) / "out"
                    made = observed.cut(out, method=method, keep=keep, refit=refit)
                    numbers = measured(out, dense, said, evaluation, options.measured)
                    results.append(Result(method, refit, keep, *numbers, made.seconds, made.plan.bytes_output))
                    print(table(results[-1:]).splitlines()[-1], flush=True)
                    if options.rows:
                        with options.rows.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(asdict(results[-1])) + "\n")
    page = table(results)
    print(page)
    code = (
        report("what compressions lose", ("upcycle", "REAP"), verdicts(results)) if {"reap"} < {*options.methods} else 0
    )
    if options.out:
        ours = f"a MoE of 16 experts, 4 per token, trained on {options.train_tokens:,} tokens"
        about = f"Of {options.model or ours}: " + ", ".join(f"{name} {value:.2f}" for name, value in dense.items())
        made_by = command("compressing/compress_quality.py", sys.argv[1:])
        title = f"# What compressions of {options.model or 'a trained MoE'} lose"
        head = f"{title}\n\n{about}; perplexities of the uncut model. By `{made_by}`."
        options.out.write_text(f"{head}\n\n{page}", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
