"""Train a tiny LLaVA by the stages of three papers: MoE-LLaVA's MoE-Tuning, CuMo, and LLaVA-MoD, each by its shipped recipes.

The model is put together from real parts (``tests/benchmarks/support/tiny_llava.py``); data are conversations about handwritten digits
(``digit_chats.py``). The recipes keep what trains in each stage and by which losses; steps, rates and rows are made small. Every
stage begins with what the one before wrote, and conversions are verified to be exact. LLaVA-MoD's student has every second layer
of the language model, and its teacher is the model of MoE-Tuning's dense stages.

    python -P tests/benchmarks/wrapped/vision_language.py --out docs/measured/vision_language.md
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
import yaml
from digit_chats import ASKED, PATCH, SAID, SIZE, digit_chats
from digits_vit import digits
from tiny_llava import tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

import upcycle
import upcycle.models
from upcycle.recipe.shipped_recipes import shipped
from upcycle.trainers.recipe.training_recipe import read_train_recipe
from upcycle.trainers.run.loop import train
from upcycle.trainers.run.step_reports import read_log

LENGTH, ROWS, ASKED_IMAGES = 128, 8, 100
RATES = {"align": 3e-3, "tune": 1e-3, "moe": 5e-4, "pre-align": 3e-3, "pre-finetune": 1e-3, "visual-instruction": 5e-4, "mimic": 1e-3,
         "prefer": 1e-4}  # fmt: skip
STEPS = {
    "align": 40,
    "tune": 60,
    "moe": 40,
    "pre-align": 40,
    "pre-finetune": 60,
    "visual-instruction": 40,
    "mimic": 60,
    "prefer": 20,
}


class Row(NamedTuple):
    """A line of the table: a stage, what trained, losses at its first and last step, and what the model then says."""

    recipe: str
    stage: str
    trains: str
    steps: int
    first: dict[str, float]
    last: dict[str, float]
    held_out: float
    right: float | None


def with_processor(folder: Path, out: Path, layers: int = 1) -> Path:
    """The tiny LLaVA with the processor that its class has; of its text model, every layer or every second one."""
    from transformers import AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor, ViTImageProcessorPil

    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    token = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    kept = model.model.language_model.layers[::layers]
    model.model.language_model.layers = kept
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.config.image_token_id, model.config.text_config.num_hidden_layers = token, len(kept)
    model.save_pretrained(out)
    images = ViTImageProcessorPil(
        do_resize=False, size={"height": SIZE, "width": SIZE}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    keys = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(image_processor=images, tokenizer=tokenizer, **keys).save_pretrained(out)
    return out


@torch.no_grad()
def right_answers(folder: Path) -> float:
    """The share of held-out images whose digit is the most probable one behind ``It is``, by the stock class."""
    from PIL import Image

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    prompt = f"User: <image>\n{ASKED}\nAssistant: {SAID.partition(' {')[0]}"
    words = [processor.tokenizer(f" {digit}", add_special_tokens=False)["input_ids"][0] for digit in range(10)]
    classes = digits()[1][1][:ASKED_IMAGES]
    images = [Image.open(digit_chats() / "held_out" / f"{number}.png") for number in range(len(classes))]
    batch = processor(text=[prompt] * len(images), images=images, return_tensors="pt", add_special_tokens=False)
    found = model(**batch, logits_to_keep=1).logits[:, -1, words].argmax(-1)
    return float((found == classes).double().mean())


def run(name: str, model: Path, out: Path, steps: float, teacher: Path | None = None) -> tuple[Path, list[Row]]:
    """Train by a shipped recipe, made small; returns the exported model, and a row for each stage."""
    data, stages = digit_chats(), read_train_recipe(Path(name), base(model, out)).stages
    laid = base(model, out) | {
        "global_batch": ROWS,
        "micro_batch": ROWS,
        "length": LENGTH,
        "dtype": "float32",
        "zero": {},
    }
    for stage in stages:
        path = f"stages.{stage.name}"
        count = max(1, round(STEPS[stage.name] * steps))
        laid |= {
            f"{path}.steps": count,
            f"{path}.learning_rate": RATES[stage.name],
            f"{path}.schedule.warmup": count // 10,
        }
        if stage.name in ("align", "pre-align"):
            laid[f"{path}.data"] = said_of("captions")
        if stage.name == "prefer":
            pairs = {"text": str(data / "pairs.jsonl"), "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
            laid[f"{path}.data"] = {
                "domains": {"pairs": pairs},
                "validation": {"fraction": 0.05, "tokens": 4096},
                "chat_template": "turns",
            }
        if stage.distillation and teacher:
            laid[f"{path}.distillation.parent"] = str(teacher)
    recipe = read_train_recipe(Path(name), laid)
    train(recipe)
    log = read_log(out / "log.jsonl")
    exported = out / "model"
    rows = []
    for number, stage in enumerate(recipe.stages):
        of_stage = [line for line in log if line["kind"] == "step" and line["stage"] == stage.name]
        last = next(line for line in log if line["kind"] == "validation" and line["step"] == of_stage[-1]["step"])
        whole = number + 1 == len(recipe.stages)
        said = Row(
            name, stage.name, ", ".join(stage.train), len(of_stage), parts(of_stage[0]), parts(of_stage[-1]),
            next(value for key, value in last.items() if key.startswith("validation/")),
            right_answers(exported) if whole else None,
        )  # fmt: skip
        rows.append(said)
    return exported, rows


def base(model: Path, out: Path) -> dict[str, Any]:
    """The keys that every run is given."""
    return {"model": str(model), "output": str(out), "data": said_of("instructions"), "log.peak_tflops": 0.05}


def said_of(name: str) -> dict[str, Any]:
    """The data of a stage, validated on held-out images."""
    data = digit_chats()
    domain = {"text": str(data / f"{name}.jsonl"), "validation": [str(data / "held_out.jsonl")]}
    return {"domains": {name: domain}, "validation": {"tokens": 4096}, "chat_template": "turns"}


def parts(line: dict[str, Any]) -> dict[str, float]:
    """The losses of a step."""
    return {key.removeprefix("loss/"): value for key, value in line.items() if key.startswith("loss")}


def converted(recipe: str, dense: Path, out: Path) -> Path:
    """Convert by a shipped recipe; the result computes what the dense model does."""
    keys: dict[str, Any] = yaml.safe_load(shipped("convert")[recipe].read_text())
    upcycle.convert(str(dense), out, **keys)
    verdict = json.loads((out / "verification.json").read_text())["verdict"]
    if verdict != "exact":
        raise RuntimeError(f"{recipe}: the copies are {verdict}, not exact")
    return out


def page(rows: list[Row], right_at_first: float, seconds: float, steps: float) -> str:
    """The page for ``docs/measured``."""
    shorter = "" if steps == 1 else f" --steps {steps:g}"
    lines = [
        "# Stages for vision-language models, on a tiny LLaVA",
        "",
        f"`python -P tests/benchmarks/wrapped/vision_language.py{shorter}` trains a LLaVA of a vision transformer for handwritten",
        "digits, a random connector and the demo model by the shipped recipes of three papers, stage by stage, conversions between.",
        f"Steps, rates and rows are made small ({ROWS} rows of {LENGTH} tokens a step); what trains, and how, is the recipe's own.",
        "",
        "| recipe | stage | trains | steps | losses at its first step | at its last | held-out nats | right digits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, last = (", ".join(f"{key} {value:.3f}" for key, value in each.items()) for each in (row.first, row.last))
        right = "" if row.right is None else f"{row.right:.0%}"
        what = f"`{row.recipe}` | {row.stage} | {row.trains} | {row.steps}"
        lines.append(f"| {what} | {first} | {last} | {row.held_out:.3f} | {right} |")
    lines += [
        "",
        f"Before training, {right_at_first:.0%} of {ASKED_IMAGES} held-out images get the right digit; chance is 10%. Held-out nats",
        "are the mean loss on answers about held-out images (of `prefer`: on the better answers of held-out pairs). `loss` is that of",
        "the next token, whatever it weighs in a stage; the others are as they are added, with their coefficients.",
        "",
        "LLaVA-MoD's student has every second layer of the demo model; its teacher is the result of `moe_tuning_dense`. `verify`",
        "calls every conversion exact. This shows that the stages run and teach; it compares no papers, whose models and data are",
        f"thousands of times larger. All of it took {seconds:.0f} seconds of processor time.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run all stages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the page")
    parser.add_argument("--steps", type=float, default=1.0, help="a factor on the steps of every stage")
    wanted = parser.parse_args()
    begun = time.process_time()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        llava = with_processor(tiny_llava(), folder / "llava")
        student = with_processor(tiny_llava(), folder / "student", layers=2)
        at_first = right_answers(llava)
        teacher, some = run("moe_tuning_dense", llava, folder / "tuning-dense", wanted.steps)
        rows += some
        moe = converted("moe_tuning", teacher, folder / "tuning-moe")
        rows += run("moe_tuning", moe, folder / "tuning", wanted.steps)[1]
        dense, some = run("cumo_dense", llava, folder / "cumo-dense", wanted.steps)
        rows += some
        rows += run("cumo_visual", converted("cumo_visual", dense, folder / "cumo-moe"), folder / "cumo", wanted.steps)[
            1
        ]
        dense, some = run("llava_mod_dense", student, folder / "mod-dense", wanted.steps, teacher)
        rows += some
        moe = converted("moe_tuning", dense, folder / "mod-moe")
        rows += run("llava_mod_sparse", moe, folder / "mod", wanted.steps, teacher)[1]
    text = page(rows, at_first, time.process_time() - begun, wanted.steps)
    print(text)
    if wanted.out:
        wanted.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
