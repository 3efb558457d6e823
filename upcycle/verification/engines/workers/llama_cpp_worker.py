"""Runs llama.cpp in a process of its own: the program llama-server or the Python binding xllamacpp, over HTTP, or llama-cpp-python.

Reads ``{"model", "context", "threads", "server", "prompts", "tokens", "texts"}``, and answers
``{"version", "written", "tokenized"}``, or ``missing`` or ``refused`` with the reason. HTTP interface:
https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md.
"""

from __future__ import annotations

import json
import math
import socket
import subprocess
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from typing import Any

from answering import Refused, serve

PATIENCE = 600  # seconds until the model must be loaded


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Continue every prompt greedily, and tokenize the texts."""
    if not asked["server"] and not find_spec("xllamacpp") and find_spec("llama_cpp"):
        from llama_cpp_python import VERSION, Binding

        binding = Binding(asked["model"], asked["context"], asked["threads"])
        return {
            "version": VERSION,
            "written": [binding.greedy(prompt, asked["tokens"]) for prompt in asked["prompts"]],
            "tokenized": [binding.tokenize(text) for text in asked["texts"]],
        }
    address, version, process = start_program(asked) if asked["server"] else start_binding(asked)
    try:
        return {
            "version": version,
            "written": [greedy_tokens(address, prompt, asked["tokens"]) for prompt in asked["prompts"]],
            "tokenized": [tokenize(address, text) for text in asked["texts"]],
        }
    finally:
        if asked["server"]:
            process.kill()


def start_binding(asked: dict[str, Any]) -> tuple[str, str, Any]:
    """Start the server inside this process, with keys and values in fp32 and exact attention; return address, version, server."""
    import xllamacpp
    from xllamacpp import CommonParams, Server, ggml_type, llama_flash_attn_type

    wanted = CommonParams()
    wanted.model.path = asked["model"]
    wanted.n_ctx = asked["context"]
    wanted.n_parallel = 1
    wanted.n_gpu_layers = 0
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = asked["threads"]
    wanted.cache_type_k = wanted.cache_type_v = ggml_type.GGML_TYPE_F32
    wanted.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    wanted.warmup = False
    try:
        server = Server(wanted)
    except RuntimeError as error:
        raise Refused(str(error)) from None
    return server.listening_address, "xllamacpp " + xllamacpp.__version__, server


def start_program(asked: dict[str, Any]) -> tuple[str, str, Any]:
    """Start the program llama-server in the same way; return address, version and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    flags = ["-m", asked["model"], "-c", asked["context"], "--host", "127.0.0.1", "--port", port, "-np", 1, "-ngl", 0]
    flags += ["-t", asked["threads"], "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-warmup"]
    process = subprocess.Popen([asked["server"], *map(str, flags)])
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            raise Refused(f"llama-server ended with code {process.returncode}")
        try:
            with urllib.request.urlopen(address + "/health", timeout=5):
                break
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    else:
        raise Refused(f"llama-server did not answer within {PATIENCE} s")
    said = subprocess.run([asked["server"], "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    lines = said.stdout.decode(errors="replace").strip().splitlines()
    return address, "llama-server " + (lines[0].replace("version: ", "") if lines else "of unknown version"), process


def greedy_tokens(address: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Return greedy tokens after a prompt of token ids, and for each the two most probable ones.

    The server gives no probabilities for a token that ends inside a character of several bytes; None stands for them.
    """
    wanted = {"prompt": prompt, "n_predict": tokens, "temperature": -1, "n_probs": 2, "return_tokens": True}
    said = post(address + "/completion", {**wanted, "cache_prompt": False})
    places = said.get("completion_probabilities", [])
    rivals: list[tuple[int, int, float] | None] = []
    for token in said["tokens"]:
        if places and places[0]["id"] == token:
            first, second = places.pop(0)["top_logprobs"][:2]
            logits = [math.nan if two["logprob"] is None else two["logprob"] for two in (first, second)]
            rivals.append((first["id"], second["id"], logits[0] - logits[1]))
        else:
            rivals.append(None)
    return {"tokens": said["tokens"], "rivals": rivals}


def tokenize(address: str, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens."""
    found: list[int] = post(address + "/tokenize", {"content": text, "add_special": False, "parse_special": False})[
        "tokens"
    ]
    return found


def post(url: str, content: dict[str, Any]) -> dict[str, Any]:
    """Send a request to the server, and return its answer."""
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        found: dict[str, Any] = json.load(response)
    return found


if __name__ == "__main__":
    serve(answer)
