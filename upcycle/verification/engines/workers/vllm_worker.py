"""Runs vLLM in a process of its own.

Reads ``{"model", "dtype", "context", "prompts", "tokens", "plug_in"}``; answers ``{"version", "dtype", "written"}``, or ``missing`` or
``refused`` with the reason. Python API: https://docs.vllm.ai/en/latest/api/vllm/.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from answering import Refused, serve


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Continue every prompt greedily."""
    import vllm

    plug_in = asked.get("plug_in")
    if plug_in and plug_in not in entry_points(group="vllm.general_plugins").names:
        raise ModuleNotFoundError(f"vLLM's plug-in '{plug_in}' is not beside it, which this model needs")
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    # On a CPU vLLM computes in fp32. On a GPU its kernels for experts would round fp32 to TF32, which is no better than 16 bits.
    dtype = "float32" if current_platform.is_cpu() else asked["dtype"]
    try:
        engine = LLM(
            model=asked["model"],
            dtype=dtype,
            max_model_len=asked["context"] + 1,
            enforce_eager=True,
            skip_tokenizer_init=True,
            distributed_executor_backend="uni",
        )
    except Exception as error:
        raise Refused(first_line(error)) from None
    wanted = SamplingParams(temperature=0, max_tokens=asked["tokens"], logprobs=2, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], wanted, use_tqdm=False)
    return {
        "version": vllm.__version__,
        "dtype": dtype,
        "written": [written(output.outputs[0]) for output in outputs],
    }


def written(completion: Any) -> dict[str, Any]:
    """Return the tokens of a completion, and for each the two most probable ones."""
    rivals = []
    for place in completion.logprobs:
        (a, first), (b, second) = sorted(place.items(), key=lambda item: -item[1].logprob)[:2]
        rivals.append((a, b, first.logprob - second.logprob))
    return {"tokens": list(completion.token_ids), "rivals": rivals}


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


if __name__ == "__main__":
    serve(answer)
