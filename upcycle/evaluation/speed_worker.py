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
from upcycle.hardware.memory import is_out_of_memory, peak_memory
from upcycle.kernels.entry.choose_backend import NAME as KERNELS
from upcycle.kernels.entry.transformers_blocks import use_kernels
from upcycle.models.experts import has_experts, run_on_kernels, use_eager_experts, use_experts
from upcycle.models.load import load_model


class TimedModel:
    """Runs a model as transformers does by default, and times it.

    A MoE that :mod:`upcycle.kernels` knows can be timed on them, too, with the same weights in memory.

    Args:
        name: folder, hub id, ``.gguf`` file or ``demo``.
        prompt: token ids of the prompt.
        generate: tokens to decode after it.
        dtype: that of its weights and states.
    """

    def __init__(self, name: str, prompt: list[int], generate: int, dtype: torch.dtype = torch.float32) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(name, dtype=dtype, experts=None).to(self.device)
        self.prompt = torch.tensor([prompt], device=self.device)
        self.generate = generate
        self._peak_before_kernels: int | None = None
        try:
            self.run()
        except (RuntimeError, ValueError):
            # The default kernel refuses experts whose rows are not a multiple of 16 bytes wide.
            use_eager_experts(self.model)
            self.run()
        self._default = self.model.config._experts_implementation if has_experts(self.model) else None

    def about(self) -> dict[str, Any]:
        """Return what the numbers depend on: device, dtype, instructions, threads and implementation of experts."""
        return {
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "instructions": torch.backends.cpu.get_cpu_capability() if self.device == "cpu" else None,
            "threads": torch.get_num_threads(),
            "experts": self._default,
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

    def run_on_kernels(self) -> dict[str, Any]:
        """Return the seconds of prefill and of decoding on upcycle's kernels, and in ``experts`` what ran.

        Without ``prefill`` and ``decode`` where these do not know the model; in the first call, after a pass that is not timed.
        """
        first = self._peak_before_kernels is None
        if first:
            self._peak_before_kernels = self._peak()
        name = run_on_kernels(self.model)
        try:
            if name is None or not name.startswith(KERNELS):
                return {"experts": name}
            if first:
                self.run()
            return {**self.run(), "experts": name}
        finally:
            if self._default is not None:
                use_kernels(self.model, off=True)
                use_experts(self.model, self._default)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _peak(self) -> int:
        if self._peak_before_kernels is not None:
            return self._peak_before_kernels  # what runs as transformers does by default took
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
        model = TimedModel(request["name"], request["prompt"], request["generate"], getattr(torch, request["dtype"]))
        answer(model.about())
        for line in sys.stdin:
            answer(model.run_on_kernels() if parse_json(line, "the request").get("kernels") else model.run())
    except UpcycleError as error:
        answer({"error": type(error).__name__, "message": error.message, "hint": error.hint})
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        answer({"error": "EnvironmentFault", "message": f"{request['name']} does not fit in memory", "hint": None})


if __name__ == "__main__":
    main()
