"""CuMo's three parts and MoE-LLaVA's alternate layers on a tiny LLaVA of real parts (``tests/benchmarks/support/tiny_llava.py``).

The shipped recipe ``cumo`` makes 4 copies of every FFN in encoder, connector and text model, two per token (arXiv 2405.05949); then
the two parts without the text model, as CuMo's default is; alternate layers of the text model (arXiv 2401.15947), and of both towers.
Every result is loaded by stock transformers and compared with the dense model on digits with a line of text. Then every model takes
one step of AdamW on these, with CuMo's balance loss (0.1) and z-loss (0.01) of every part that has routers.

    python -P tests/benchmarks/wrapped/tiny_llava.py --out docs/measured/tiny_llava.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
from tiny_llava import captioned, tiny_llava
from transformers import AutoModelForImageTextToText

import upcycle.models  # noqa: F401 - registers upcycle_moe
from upcycle.models.own.moe_block import MoeBlock

IMAGES, RATE, BALANCE, Z, EXACT = 64, 1e-3, 0.1, 0.01, 1e-5
GREEDY = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
PARTS = {"vision_tower": "encoder", "multi_modal_projector": "connector", "language_model": "text model"}
SYSTEMS: dict[str, tuple[str, ...]] = {
    "CuMo: all three parts": ("cumo",),
    "CuMo: encoder and connector": ("cumo", "--part", "vision,connector"),
    "MoE-LLaVA: layers 0, 2, ... of the text model": ("moe_tuning", "--part", "language"),
    "layers 0, 2, ... of both towers, and the connector": ("moe_tuning", "--part", "all"),
}


class Result(NamedTuple):
    """What was measured of one model; relative errors are against the dense model."""

    target: str
    parameters: int
    error: float
    image_error: float
    half_error: float
    same_words: bool
    blocks: str
    losses: tuple[float, float]
    auxiliary: str


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model as any user would load it."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()


def part_of(name: str) -> str:
    """The part that a module is in, in words."""
    return next(said for path, said in PARTS.items() if path in name)


def routers(model: Any) -> dict[str, list[Any]]:
    """The routers of every part: those of upcycle's own class, or of a stock MoE."""
    found: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MoeBlock) or (hasattr(module, "experts") and hasattr(module, "gate")):
            router = module.router if isinstance(module, MoeBlock) else module.gate
            found.setdefault(part_of(name), []).append(router)
    return found


def step(model: Any, batch: dict[str, torch.Tensor]) -> tuple[tuple[float, float], str]:
    """Train every weight for one step; returns the next-token loss of the batch before and behind it, and the other losses."""
    logits: dict[str, list[torch.Tensor]] = {}
    for part, some in routers(model).items():
        for router in some:
            router.register_forward_hook(lambda _, __, out, part=part: logits.setdefault(part, []).append(out[0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    out = model.train()(**batch)
    loss, said = out.loss, []
    for part, layers in logits.items():
        balance = torch.stack([balance_of(one) for one in layers]).mean()
        z = torch.stack([one.logsumexp(-1).square().mean() for one in layers]).mean()
        loss = loss + BALANCE * balance + Z * z
        said.append(f"{part} {balance:.2f}, {z:.2f}")
    loss.backward()
    if idle := [name for name, weight in model.named_parameters() if "router" in name and not weight.grad.any()]:
        raise RuntimeError(f"no gradient reached {idle[0]}")
    optimizer.step()
    logits.clear()
    with torch.no_grad():
        after = model.eval()(**batch).loss
    return (out.loss.item(), after.item()), "; ".join(said)


def balance_of(logits: torch.Tensor) -> torch.Tensor:
    """``E sum_e f_e P_e`` of first choices, over all tokens; 1: balanced."""
    chances = logits.softmax(-1)
    first = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float().mean(0)
    return logits.shape[-1] * (first * chances.mean(0)).sum()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error, by norms."""
    return float((found.float() - expected).norm() / expected.norm())


@torch.no_grad()
def compared(folder: Path, dense: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Relative errors of logits on texts and on images, in fp32 and bf16, and whether the same words are written."""
    model, half = load(folder), load(folder, torch.bfloat16)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    text = inputs["input_ids"][:, -5:]
    shown = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    prompt = {name: value[:4, :20] if value.ndim == 2 else value[:4] for name, value in inputs.items()}
    expected = dense(**inputs).logits
    return {
        "error": difference(model(text).logits, dense(text).logits),
        "image_error": difference(model(**inputs).logits, expected),
        "half_error": difference(half(**shown).logits, expected),
        "same_words": torch.equal(model.generate(**prompt, **GREEDY), dense.generate(**prompt, **GREEDY)),
    }


def measured(folder: Path, dense: Any, batch: dict[str, torch.Tensor]) -> Result:
    """Compare one model with the dense one, and train it for a step."""
    model = load(folder)
    config = json.loads((folder / "config.json").read_text())
    target = str(config["model_type"] if config["model_type"] == "upcycle_moe" else config["text_config"]["model_type"])
    blocks = ", ".join(f"{len(found)} {part}" for part, found in routers(model).items())
    size = sum(weight.numel() for weight in model.parameters())
    losses, auxiliary = step(model, batch)
    return Result(target, size, **compared(folder, dense, batch), blocks=blocks, losses=losses, auxiliary=auxiliary)


def convert(out: Path, recipe: str, *options: str) -> dict[str, Any]:
    """Convert by the command; returns the verification."""
    command = [sys.executable, "-P", "-c", "from upcycle.cli.main import main; main()"]
    words = ["convert", recipe, str(out), "--source", str(tiny_llava()), "--quiet", *options]
    subprocess.run([*command, *words], check=True, capture_output=True)
    found: dict[str, Any] = json.loads((out / "verification.json").read_text())
    return found


def page(dense: Result, rows: dict[str, tuple[dict[str, Any], Result]]) -> str:
    """The page for ``docs/measured``."""
    worst = max(said["media_error"] for said, _ in rows.values())
    lines = [
        "# A tiny LLaVA, part by part",
        "",
        "`python tests/benchmarks/wrapped/tiny_llava.py` puts a LLaVA together from a vision transformer trained on scikit-learn's",
        "digits (6 layers), a random connector of two projections, and the demo model; both towers are real models, however small.",
        "The shipped recipes `cumo` and `moe_tuning` convert it by the command, stock transformers loads the results after",
        f"`import upcycle.models`, and they read {IMAGES} held-out digits with a line of text each.",
        "",
        "| | experts in | parameters (millions) | logits of texts | of images with texts | the same, bf16 | same words |",
        "|---|---|---|---|---|---|---|",
        f"| dense | | {dense.parameters / 1e6:.2f} | | | {dense.half_error:.1e} | |",
    ]
    for name, (_, row) in rows.items():
        cells = (
            f"{row.error:.1e}",
            f"{row.image_error:.1e}",
            f"{row.half_error:.1e}",
            "yes" if row.same_words else "no",
        )
        lines.append(f"| {name} | {row.blocks} | {row.parameters / 1e6:.2f} | {' | '.join(cells)} |")
    lines += [
        "",
        "Numbers are relative errors of logits against the dense model in fp32; words are eight greedy ones behind four images.",
        f"`verify` says of all that they are exact: it found at most {worst:.1e} on a random image.",
        "",
        "Then every model takes one step of AdamW (rate 0.001) on these images and texts, all weights at once. To the next-token loss",
        "come CuMo's balance of first choices (times 0.1; 1 is balance) and z-loss (times 0.01), each the mean over a part's routers.",
        "",
        "| | next-token loss before | behind the step | balance, z-loss |",
        "|---|---|---|---|",
        f"| dense | {dense.losses[0]:.4f} | {dense.losses[1]:.4f} | |",
    ]
    for name, (_, row) in rows.items():
        lines.append(f"| {name} | {row.losses[0]:.4f} | {row.losses[1]:.4f} | {row.auxiliary} |")
    lines += [
        "",
        "The step is taken by plain PyTorch, to show that gradients reach the routers of all parts. `upcycle train` runs the",
        "papers' stages on [conversations with images](../guides/vision_language.md). Nothing here is about the quality that CuMo or",
        "MoE-LLaVA reach with millions of images.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Convert, compare and train; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the page")
    wanted = parser.parse_args()
    torch.manual_seed(0)
    batch, dense = captioned(tiny_llava(), IMAGES), load(tiny_llava())
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        for name, options in SYSTEMS.items():
            said = convert(out := Path(place) / str(len(rows)), *options)
            rows[name] = said, measured(out, dense, batch)
    text = page(measured(tiny_llava(), dense, batch), rows)
    print(text)
    if wanted.out:
        wanted.out.write_text(text)
    fine = all(v["verdict"] == "exact" and r.image_error < EXACT and r.same_words for v, r in rows.values())
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
