"""Runs models with vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from upcycle.registry import OWN_TARGETS
from upcycle.verification.engines.engine import Answer, Request, read_written, run_worker


class Vllm:
    """Runs the stock folder as it is, in the checkpoint's 16-bit dtype on a GPU and in fp32 on a CPU."""

    name: ClassVar[str] = "vllm"
    title: ClassVar[str] = "vLLM"

    def ask(self, model: Path, config: dict[str, Any], request: Request, work: Path, python: str) -> Answer:
        """See :class:`~upcycle.verification.engines.engine.Engine`."""
        stored = config.get("dtype") or config.get("torch_dtype")
        question = {
            "model": str(model.absolute()),
            "dtype": stored if stored in ("bfloat16", "float16") else "bfloat16",
            "context": request.context,
            "prompts": request.prompts,
            "tokens": request.tokens,
        }
        hint = "pip install vllm in an environment of its own, then --engine-python PATH/bin/python"
        if config.get("model_type") in OWN_TARGETS:
            question["plug_in"] = "upcycle"
            hint += "; beside it, pip install --no-deps upcycle"
        # The worker is a process of its own already; one more inside vLLM would only hide its errors.
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        found = run_worker(self, "vllm_worker.py", question, work, python, hint, **own)
        return Answer(f"vLLM {found['version']}", found["dtype"], read_written(found), None)

    def known_difference(self, model: Path, config: dict[str, Any]) -> str | None:
        """Return why vLLM differs: it fixes three settings of Phi-3.5-MoE.

        https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/models/phimoe.py
        """
        if config.get("model_type") != "phimoe":
            return None
        why = []
        if config.get("hidden_act") != "silu":
            why.append(f"computes silu where hidden_act is {config.get('hidden_act')}")
        if config.get("sliding_window"):
            why.append("has no sliding window for phimoe")
        if config.get("router_jitter_noise") != 0.01:
            why.append("fixes router_jitter_noise at 0.01")
        return f"vLLM {', and '.join(why)}" if why else None
