"""Every command in the README and in docs/ is run, in order, in one folder; those that cannot be are listed with the reason."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from chats import sums, write_chats
from click.testing import CliRunner
from encoder_cases import image_encoder, image_folder, text_encoder
from lora_folders import write_lora
from media_cases import pair_file, sound_folder, sound_model, two_towers
from picture_chats import chats as pictured_chats
from picture_chats import pictured_llava
from stand_ins import make_llama_cpp, make_vllm

from upcycle.cli.main import cli
from upcycle.text.reading.plain_text import DEMO_TEXTS, read_text

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "guides"
# In an order in which every page finds what it needs: models that one page makes are used on the next.
_FIRST = (
    "splitting",
    "mixing",
    "growing",
    "training",
    "evaluating",
    "serving",
    "generating",
    "reporting",
    "publishing",
    "copying",
)
_OTHERS = [
    path for path in sorted((ROOT / "docs").rglob("*.md")) if "develop" not in path.parts and path.stem not in _FIRST
]
PAGES = (ROOT / "README.md", *(GUIDES / f"{name}.md" for name in _FIRST), *_OTHERS)
# What is added to a command, so that it takes seconds with models of two layers: (a part of the command, flags).
SHORTER = (
    ("upcycle convert", "--overwrite"),
    ("upcycle convert", "--verify-tokens 64"),
    ("--calibration", "--calibration-tokens 1024"),
    ("split_50", "--calibration-tokens 1024"),
    ("upcycle compare", "--text check.txt --tokens 512 --out compare.json"),
    ("upcycle train", "--set length=64 --set global_batch=2 --set micro_batch=1 --set log.validation=0"),
    ("train heal", "--set stages.heal.steps=2 --set stages.heal.tokens=null --set stages.heal.schedule.warmup=0"),
    ("train instruct", "--set stages.0.steps=2 --set stages.0.tokens=null --set stages.0.schedule.warmup=0"),
    ("train instruct", "--set data.chat_template=turns"),  # the tokenizer here has no template
    ("train lora", "--set stages.0.steps=2 --set stages.0.tokens=null --set stages.0.schedule.warmup=0"),
    ("train lora", "--set data.chat_template=turns"),
    *(
        ("upcycle grow" if part == "training" else "grow btx", f"--set {part}.{key}={value}")
        for part in ("training", "tuning")
        for key, value in (
            *(("stages.steps", 2), ("stages.tokens", "null"), ("stages.schedule.warmup", 0), ("length", 64)),
            *(("global_batch", 2), ("micro_batch", 1), ("data.validation.tokens", 64)),
        )
    ),
    ("grow btm", "--set sample=64"),
    ("grow rounds.yaml", "--set sample=64"),
    ("train moe_tuning", "--set dtype=float32 --set zero.stage=0 --set data.chat_template=turns"),
    ("train moe_tuning --", "--set stages.moe.steps=2 --set stages.moe.schedule.warmup=0"),
    (
        "train moe_tuning_dense",
        "--set stages.align.steps=2 --set stages.align.schedule.warmup=0 --set stages.align.data.chat_template=turns "
        "--set stages.tune.steps=2 --set stages.tune.schedule.warmup=0",
    ),
    ("upcycle report", "--tokens 64"),
    ("--speed", "--text prose"),
    ("upcycle chat", "--tokens 3"),
    ("upcycle generate", "--tokens 3"),
    ("--layer 3", "--layer 1"),
    ("--with ", "--tokens 16"),
)
# What is asked of a model that is large enough to gain time, and of one whose every operation takes longer to start than to do.
GOALS = {"--faster 1.25": "--within 9", "--within 1.10": "--within 9"}
# A part of the line, and why it is not run here.
NOT_RUN = {
    "make demo": "make check does, in pieces: tests/cli/test_main.py runs upcycle demo",
    "make test": "this is a test",
    ". .venv/bin/activate": "the shell's",
    "--hostfile": "needs several machines",
    "--tasks arc_easy": "needs the hub's data sets",
    "qwen3-0.6b": "downloads that model: tests/recipe/test_model_recipes.py plans and prints its recipes",
    "deepspeed --num_gpus": "needs four ranks, as torchrun does",
    "torchrun": "needs four ranks: tests/trainers/run/test_launchers.py starts them",
    "upcycle push": "needs the hub: tests/cli/verbs/test_push.py and tests/publishing/test_push.py push to one on the loopback",
    "export --gguf": "needs llama-quantize: tests/publishing/test_gguf.py has a stand-in",
    "pytest -m gpu": "needs a GPU",
    "upcycle.kernels.gpu.timing.bench": "needs a GPU",
    "upcycle tune-kernels": "needs a GPU",
    "UPCYCLE_TILES=": "needs what tune-kernels wrote",
    **({} if find_spec("lm_eval") else {"--tasks": "needs the extra tasks"}),
}


def commands() -> list[str]:
    """Every line that a reader would type: of blocks of ``sh`` all, of ``console`` those behind a ``$``."""
    found = []
    for page in PAGES:
        for kind, block in re.findall(r"```(sh|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines = block.splitlines()
            found += [line.removeprefix("$ ") for line in lines if kind == "sh" or line.startswith("$ ")]
    return found


def reason(line: str) -> str | None:
    """Why a line is not run, if it is not."""
    return next((why for part, why in NOT_RUN.items() if part in line), None)


def test_every_line_is_run_or_has_a_reason() -> None:
    lines = commands()
    assert sum(reason(line) is None for line in lines) > 40
    for line in lines:
        assert reason(line) or line.startswith("upcycle "), line
    for part in NOT_RUN:
        assert any(part in line for line in lines), f"'{part}' is in no document"
    assert any("--faster 1.25" in line for line in lines)
    for part, _ in SHORTER:
        assert any(part in line for line in lines), f"'{part}' is in no document"


@pytest.fixture
def reader(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pico: Callable[[str], Path],
    branches: Callable[..., list[Path]],
) -> Iterator[Path]:
    """The folder of somebody who has what the documents speak of: models, texts, recipes, tasks and engines."""
    pictured_llava(tmp_path / "llava")
    for name in ("chats", "captions"):
        pictured_chats(tmp_path).rename(tmp_path / f"{name}.json")
    text_encoder("bert", tmp_path / "bert")
    image_encoder("vit", tmp_path / "vit", id2label={0: "class_0", 1: "class_1"})
    image_folder(tmp_path / "photos")
    for name in ("bart", "t5", "flan-t5"):
        text_encoder(name, tmp_path / name)
    two_towers("clip", tmp_path / "clip")
    sound_model("whisper", tmp_path / "whisper")
    sound_folder(tmp_path / "speech")
    pair_file(tmp_path / "pairs.jsonl")
    (tmp_path / "captions.txt").write_text("a photo\n" * 3 + "another photo\na third one\n", encoding="utf-8")
    for name in ("llama", "ancestor", "seed", "SmolLM2-135M-Instruct"):
        shutil.copytree(pico("llama"), tmp_path / name)
    for name, made in zip(("math", "maths", "code", "coder", "law"), branches(5, 0.05), strict=True):
        shutil.copytree(made, tmp_path / name)
    for seed, name in enumerate(("math-lora", "code-lora"), 1):
        write_lora(tmp_path / "llama", tmp_path / name, seed, target_modules=["q_proj", "down_proj"])
    texts = [read_text(name) for name in DEMO_TEXTS]
    for i, name in enumerate(("docs", "code", "news", "math", "law", "my", "check")):
        content = texts[i % len(texts)]
        (tmp_path / f"{name}.txt").write_text(content[2000 * i : 2000 * i + 30_000], encoding="utf-8")
    rows = [json.dumps({"text": content[k : k + 800]}) for content in texts for k in range(0, 24_000, 800)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for name in ("law", "code", "math", "news"):
        shutil.copy(tmp_path / "corpus.jsonl", tmp_path / f"{name}.jsonl")
    (written,) = re.findall(
        r"```yaml\n(source: \./seed\n.*?)```", (GUIDES / "mixing.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "rounds.yaml").write_text(written, encoding="utf-8")
    write_chats(tmp_path / "chat.jsonl", sums(200))
    (tmp_path / "recipe.yaml").write_text("method: sparse_upcycling\nexperts: 4\nrouter: random\n", encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    shutil.copytree(ROOT / "tests" / "tasks", tmp_path / "tasks")
    task = (tmp_path / "tasks" / "continuations.yaml").read_text(encoding="utf-8")
    (tmp_path / "tasks" / "my_task.yaml").write_text(task.replace("task: continuations", "task: my_task"))
    from transformers import MixtralConfig

    MixtralConfig(architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path / "mixtral")
    monkeypatch.setenv("LLAMA_CPP", str(make_llama_cpp(tmp_path / "llama.cpp")))
    python = tmp_path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{make_vllm(tmp_path / "site")}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("reader")
def test_the_commands_of_all_documents_run() -> None:
    for line in commands():
        if reason(line):
            continue
        asked = line
        for goal, easier in GOALS.items():
            asked = asked.replace(goal, easier)
        _, *arguments = (word.replace("~/", "") for word in shlex.split(asked, comments=True))
        for part, flags in SHORTER:
            if part in line:
                arguments += shlex.split(flags)
        if "--nproc" in line:  # ranks are started with the command's own arguments
            done = subprocess.run(
                [sys.executable, "-m", "upcycle.cli.main", *arguments], capture_output=True, check=False
            )
            assert done.returncode == 0, f"{line}\n{done.stderr.decode()}"
            continue
        result = CliRunner().invoke(cli, arguments, input="hello\n" if "chat" in line else None)
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
