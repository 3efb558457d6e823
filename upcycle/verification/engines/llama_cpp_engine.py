"""Runs models with llama.cpp: its converter makes a GGUF file in fp32, and its server runs that on the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from upcycle.errors import EnvironmentFault
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.user_paths import user_path
from upcycle.hardware.child_processes import engine_environment, run_script
from upcycle.verification.engines.engine import Answer, NotHeld, Request, last_lines, read_written, run_worker

LLAMA_CPP_VARIABLE = "LLAMA_CPP"
_CONVERTER = "convert_hf_to_gguf.py"
_DIVIDES = "llama.cpp divides by the logit of the shared expert's switch, which is 0 in this model"
LLAMA_CPP_HINT = (
    f"git clone https://github.com/ggml-org/llama.cpp, set {LLAMA_CPP_VARIABLE} to that folder (its {_CONVERTER} is needed), and "
    "pip install xllamacpp sentencepiece (or llama-cpp-python in its place), or have llama-server on the PATH"
)


class LlamaCpp:
    """Runs the architectures that llama.cpp's converter knows; weights stay in fp32, so that rounding explains little."""

    name: ClassVar[str] = "llama.cpp"
    title: ClassVar[str] = "llama.cpp"

    def ask(self, model: Path, config: dict[str, Any], request: Request, work: Path, python: str) -> Answer:
        """See :class:`~upcycle.verification.engines.engine.Engine`."""
        file = work / "model.gguf"
        convert_to_gguf(model, file, work, python)
        question = {
            "model": str(file),
            "context": max(request.context + 1, 256),
            "threads": torch.get_num_threads(),  # more than there are free cores would wait for each other
            "server": found_program("llama-server"),
            "prompts": request.prompts,
            "tokens": request.tokens,
            "texts": request.texts,
        }
        found = run_worker(self, "llama_cpp_worker.py", question, work, python, LLAMA_CPP_HINT)
        return Answer(f"llama.cpp ({found['version']})", "float32", read_written(found), found["tokenized"])

    def known_difference(self, model: Path, config: dict[str, Any]) -> str | None:
        """Return why llama.cpp differs: its graphs ignore ``norm_topk_prob``, and compute Qwen2-MoE's sigmoid as ``silu(x) / x``.
        Phi-3.5-MoE has the graph of Phi-3 there.

        https://github.com/ggml-org/llama.cpp/blob/master/src/models/qwen2moe.cpp and phi3.cpp
        """
        kind, normalized = config.get("model_type"), config.get("norm_topk_prob")
        if kind == "qwen2_moe":
            why = [_DIVIDES] if _has_zero_switch(model) else []
            if normalized and config.get("num_experts_per_tok") != config.get("num_experts"):
                why.append("llama.cpp does not make the weights of the chosen experts sum to 1 (norm_topk_prob)")
            return ", and ".join(why) or None
        if kind in ("qwen3_moe", "mellum") and normalized is False:
            return "llama.cpp makes the weights of the chosen experts sum to 1, whatever norm_topk_prob says"
        if kind == "phimoe":
            return (
                "llama.cpp computes RMSNorms and silu for phimoe, and makes the weights of the chosen experts sum to 1"
            )
        return None


def _has_zero_switch(model: Path) -> bool:
    folder = SafetensorsFolder(model)
    return any(not folder.read(name).any() for name in folder.specs if name.endswith(".shared_expert_gate.weight"))


def convert_to_gguf(model: Path, file: Path, work: Path, python: str, kind: str = "f32") -> None:
    """Write a GGUF file of a stock transformers folder with llama.cpp's converter.

    Args:
        model: the folder.
        file: the file to write.
        work: a folder for temporary files.
        python: the Python that has what the converter needs.
        kind: the converter's ``--outtype``: f32, f16, bf16 or q8_0.

    Raises:
        EnvironmentFault: the converter or a package that it needs is missing, or the disk has no room.
        NotHeld: the converter does not know the architecture, the tokenizer or a tensor.
    """
    converter = found_program(_CONVERTER)
    if converter is None:
        raise EnvironmentFault(f"llama.cpp's {_CONVERTER} was not found", hint=LLAMA_CPP_HINT)
    needed = 4 * sum(spec.elements for spec in SafetensorsFolder(model).specs.values())
    if needed > 0.95 * shutil.disk_usage(work).free:
        raise EnvironmentFault(
            f"a GGUF file of {needed / 1e9:.1f} GB does not fit in {work.parent}", hint="set TMPDIR to a larger disk"
        )
    log = work / "converter.log"
    with log.open("wb") as output:
        command = [
            *run_script(Path(converter), python),
            str(model.absolute()),
            "--outtype",
            kind,
            "--outfile",
            str(file),
        ]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=engine_environment(), check=False
        )
    if done.returncode == 0 and file.is_file():
        return
    end = last_lines(log)
    last = end.splitlines()[-1].removeprefix("ERROR:hf-to-gguf:") if end else f"code {done.returncode}"
    if "ModuleNotFoundError" in last:
        package = last.split("'")[1] if "'" in last else "what it imports"
        raise EnvironmentFault(f"llama.cpp's converter needs {package}", hint=f"pip install {package} for {python}")
    if "pre-tokenizer was not recognized" in end:
        last = "it does not know this tokenizer"
    raise NotHeld(f"llama.cpp's converter cannot convert it: {last.replace(str(model.absolute()) + os.sep, '')}")


def found_program(program: str) -> str | None:
    """Return the path of a program or script of llama.cpp, from its folder, the PATH, or the folder of llama-server; or None."""
    for folder in _folders():
        if (folder / program).is_file():
            return str(folder / program)
    return shutil.which(program)


def _folders() -> Iterator[Path]:
    if named := os.environ.get(LLAMA_CPP_VARIABLE):
        root = user_path(named).absolute()
        yield from (root, root / "bin", root / "build" / "bin")
    if server := shutil.which("llama-server"):
        yield from Path(server).resolve().parents[:3]
