"""Runs llama.cpp inside this process, through the Python binding llama-cpp-python (https://github.com/abetlen/llama-cpp-python)."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
from answering import Refused

VERSION = "llama-cpp-python " + llama_cpp.__version__
_F32 = 0  # ggml_type


class Binding:
    """A loaded model on the CPU, with keys and values in fp32 and exact attention.

    Args:
        model: the GGUF file.
        context: positions that it has room for; prompts are read at once up to this length.
        threads: that it computes with.

    Raises:
        Refused: llama.cpp cannot load the file.
    """

    def __init__(self, model: str, context: int, threads: int) -> None:
        try:
            self.model = llama_cpp.Llama(
                model,
                n_ctx=context,
                n_batch=context,
                n_ubatch=context,
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=0,
                type_k=_F32,
                type_v=_F32,
                flash_attn=False,
                verbose=False,
            )
        except ValueError as error:
            raise Refused(str(error).partition(": ")[0]) from None  # the rest names a temporary file

    def use_threads(self, threads: int) -> None:
        """Compute with so many threads from now on."""
        llama_cpp.llama_set_n_threads(self.model.ctx, threads, threads)

    def read(self, tokens: list[int], again: bool = False) -> Any:
        """Read tokens after those that were read before (``again``: from the beginning); return the logits ``[V]`` of the last."""
        if again:
            self.model.reset()
        self.model.eval(tokens)
        found = llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        return np.ctypeslib.as_array(found, shape=(self.model.n_vocab(),))

    def greedy(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Continue a prompt; return the tokens, and for each the two most probable ones and the distance of their logits."""
        written: list[int] = []
        rivals: list[tuple[int, int, float]] = []
        logits = self.read(prompt, again=True)
        while True:
            # NaN sorts last, and is then the largest.
            second, first = (int(token) for token in np.argsort(logits, kind="stable")[-2:])
            written.append(first)
            rivals.append((first, second, float(logits[first] - logits[second])))
            if len(written) == count:
                return {"tokens": written, "rivals": rivals}
            logits = self.read([first])

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        found: list[int] = self.model.tokenize(text.encode(), add_bos=False, special=False)
        return found
