"""Times one model in a process of its own, so that its peak memory is not mixed with another model's.

:mod:`upcycle.evaluation.speed` writes requests as lines of JSON to its standard input and reads answers from its standard output.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from upcycle.errors import UpcycleError
from upcycle.files.formats.parsing import parse_json
from upcycle.hardware.memory import peak_memory
from upcycle.models.experts import use_eager_experts
from upcycle.models.load import load_model


class TimedModel:
    """Runs a model as transformers does by default, in its stored dtype on a GPU or in fp32 on a CPU, and times it.

    Args:
        name: folder, hub id, ``.gguf`` file or ``demo``.
        prompt: token ids of the prompt.
        generate: tokens to decode after it.
    """

    def __init__(self, name: str, prompt: list[int], generate: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype: Any = "auto" if self.device == "cuda" else torch.float32
        self.model = load_model(name, dtype=dtype, experts=None).to(self.device)
        self.prompt = torch.tensor([prompt], device=self.device)
        self.generate = generate
        try:
            self.run()
        except (RuntimeError, ValueError):
            # The default kernel refuses experts whose rows are not a multiple of 16 bytes wide.
            use_eager_experts(self.model)
            self.run()

    def about(self) -> dict[str, Any]:
        """Return what the numbers depend on: device, dtype, instructions, threads and implementation of experts."""
        has_experts = any(name.endswith(".experts") for name, _ in self.model.named_modules())
        return {
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "instructions": torch.backends.cpu.get_cpu_capability() if self.device == "cpu" else None,
            "threads": torch.get_num_threads(),
            "experts": self.model.config._experts_implementation if has_experts else None,
        }

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Return the seconds of prefill and of decoding, and the peak memory in bytes so far."""
        start = self._now()
        output = self.model(self.prompt, use_cache=True, logits_to_keep=1)
        read = self._now()
        for _ in range(self.generate):
            chosen = output.logits[:, -1:].argmax(-1)
            output = self.model(chosen, past_key_values=output.past_key_values, use_cache=True)
        return {"prefill": read - start, "decode": self._now() - read, "peak": self._peak()}

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _peak(self) -> int:
        if self.device == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return peak_memory()


def main() -> None:
    """Answer requests until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # keeps what libraries print out of the answers

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    request = parse_json(sys.stdin.readline(), "the request")
    try:
        model = TimedModel(request["name"], request["prompt"], request["generate"])
        answer(model.about())
        for _ in sys.stdin:
            answer(model.run())
    except UpcycleError as error:
        answer({"error": type(error).__name__, "message": error.message, "hint": error.hint})
    except (torch.OutOfMemoryError, MemoryError):
        answer({"error": "EnvironmentFault", "message": f"{request['name']} does not fit in memory", "hint": None})


if __name__ == "__main__":
    main()
