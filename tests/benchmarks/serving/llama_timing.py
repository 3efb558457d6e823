"""Times GGUF files in llama.cpp, in turns; ``llama_split.py`` runs it with the Python that has llama-cpp-python.

Reads ``{"models": {NAME: FILE}, "prompt", "tokens", "threads", "rounds"}``, and answers
``{"version", "system", "times": {THREADS: {NAME: {"prefill": [...], "decode": [...]}}}}``: seconds for the whole prompt, and per token
that is written after it. With one thread it is the process' own time, which others on the machine do not count into; with more it is
the clock on the wall, as threads wait for each other by computing.
"""

from __future__ import annotations

import time
from typing import Any

from answering import serve


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Time every model with every number of threads."""
    import llama_cpp
    from llama_cpp_python import VERSION, Binding

    prompt, tokens = asked["prompt"], asked["tokens"]
    models = {name: Binding(file, len(prompt) + tokens + 1, 1) for name, file in asked["models"].items()}
    times: dict[int, dict[str, dict[str, list[float]]]] = {}
    for threads in asked["threads"]:
        clock = time.process_time if threads == 1 else time.perf_counter
        found = times.setdefault(threads, {name: {"prefill": [], "decode": []} for name in models})
        for turn in range(asked["rounds"] + 1):
            for name, model in models.items():
                model.use_threads(threads)
                began = clock()
                token = int(model.read(prompt, again=True).argmax())
                read = clock()
                for _ in range(tokens):
                    token = int(model.read([token]).argmax())
                if turn:  # the first is for warming up
                    found[name]["prefill"].append(read - began)
                    found[name]["decode"].append((clock() - read) / tokens)
    system = llama_cpp.llama_print_system_info().decode().strip(" |")
    return {"version": VERSION, "system": system, "times": times}


if __name__ == "__main__":
    serve(answer)
