"""Programs that behave as engines do at their interfaces, and write with transformers: ``STAND_IN`` says what goes wrong.

Tests import it as ``stand_ins``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_WRITER = """
import os, torch
from transformers import AutoConfig, AutoModelForCausalLM

class Writer:
    def __init__(self, folder, dtype):
        config = AutoConfig.from_pretrained(folder)
        if os.environ.get("STAND_IN") == "no window":
            config.sliding_window = None
        self.model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=getattr(torch, dtype))
        self.model.set_experts_implementation("eager")

    @torch.no_grad()
    def write(self, prompt, count):
        ids, places = list(prompt), []
        for _ in range(count):
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            if os.environ.get("STAND_IN") == "wrong":
                logits[7] += 50
            found = logits.log_softmax(-1).topk(3)
            places.append(list(zip(found.indices.tolist(), found.values.tolist())))
            ids.append(places[-1][0][0])
        return places
"""
_VLLM = """
import os, signal
from dataclasses import dataclass

__version__ = "0.0-stand-in"

@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    logprobs: int
    ignore_eos: bool
    detokenize: bool

@dataclass
class Logprob:
    logprob: float

@dataclass
class Completion:
    token_ids: list
    logprobs: list

@dataclass
class Output:
    outputs: list

class LLM:
    def __init__(self, model, dtype, max_model_len, enforce_eager, skip_tokenizer_init, distributed_executor_backend):
        print("what an engine prints", flush=True)
        wrong = os.environ.get("STAND_IN")
        if wrong == "refuse":
            raise ValueError("Model architectures ['X'] are not supported\\nmore")
        if wrong == "die":
            os.system("echo out of memory >&2")
            os.kill(os.getpid(), signal.SIGKILL)
        from writer import Writer

        self.writer = Writer(model, dtype)

    def generate(self, prompts, sampling_params, use_tqdm):
        assert sampling_params.temperature == 0 and sampling_params.logprobs == 2
        outputs = []
        for prompt in prompts:
            places = self.writer.write(prompt["prompt_token_ids"], sampling_params.max_tokens)
            logprobs = [{token: Logprob(value) for token, value in place[:2]} for place in places]
            outputs.append(Output([Completion([place[0][0] for place in places], logprobs)]))
        return outputs
"""
_PLATFORMS = """
class current_platform:
    is_cpu = staticmethod(lambda: True)
"""
_CONVERTER = """
import os, sys
model, outfile = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
assert sys.argv[sys.argv.index("--outtype") + 1] == "f32"
wrong = os.environ.get("STAND_IN")
if wrong == "architecture":
    print("ERROR:hf-to-gguf:Model MixtralForCausalLM is not supported", file=sys.stderr)
    sys.exit(1)
if wrong == "tokenizer":
    print("WARNING: The BPE pre-tokenizer was not recognized!", file=sys.stderr)
    raise NotImplementedError("update it")
if wrong == "package":
    import a_package_that_is_not_there
open(outfile, "w").write(model)
"""
_SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from transformers import AutoTokenizer

if "--version" in sys.argv:
    print("version: 1 (stand-in)")
    sys.exit()
flags = dict(zip(sys.argv[1::1], sys.argv[2::1]))
assert (flags["-ctk"], flags["-ctv"], flags["-fa"], flags["-ngl"]) == ("f32", "f32", "off", "0")
from writer import Writer
folder = open(flags["-m"]).read()
writer, tokenizer = Writer(folder, "float32"), AutoTokenizer.from_pretrained(folder)

class Handler(BaseHTTPRequestHandler):
    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def do_GET(self):
        self.answer({"status": "ok"})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.answer({"tokens": tokenizer(asked["content"], add_special_tokens=False)["input_ids"]})
        assert self.path == "/completion" and asked["temperature"] < 0 and asked["return_tokens"]
        places = writer.write(asked["prompt"], asked["n_predict"])
        said = [
            {"id": place[0][0], "top_logprobs": [{"id": token, "logprob": value} for token, value in place[:2]]}
            for i, place in enumerate(places)
            if i != 3  # as the server does where a token ends inside a character
        ]
        self.answer({"tokens": [place[0][0] for place in places], "completion_probabilities": said})

    def log_message(self, *args):
        pass

HTTPServer(("127.0.0.1", int(flags["--port"])), Handler).serve_forever()
"""
_BINDING = """
import ctypes, os, torch
from transformers import AutoTokenizer
from writer import Writer

__version__ = "0.0-stand-in"

class Llama:
    def __init__(self, file, **settings):
        assert (settings["type_k"], settings["type_v"], settings["flash_attn"], settings["n_gpu_layers"]) == (0, 0, False, 0)
        if os.environ.get("STAND_IN") == "refuse":
            raise ValueError("Failed to load model from file")
        folder = open(file).read()
        self.ctx, self.ids, self.writer = self, [], Writer(folder, "float32")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def reset(self):
        self.ids = []

    def eval(self, tokens):
        self.ids += tokens

    def n_vocab(self):
        return self.writer.model.config.vocab_size

    def tokenize(self, text, add_bos, special):
        assert not add_bos and not special
        return self.tokenizer(text.decode(), add_special_tokens=False)["input_ids"]

def llama_get_logits_ith(model, index):
    assert index == -1
    with torch.no_grad():
        logits = model.writer.model(torch.tensor([model.ids])).logits[0, -1].tolist()
    return (ctypes.c_float * len(logits))(*logits)
"""


def make_vllm(folder: Path) -> Path:
    """A package ``vllm`` in a folder for ``PYTHONPATH``."""
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text(_VLLM)
    (folder / "vllm" / "platforms.py").write_text(_PLATFORMS)
    (folder / "writer.py").write_text(_WRITER)
    return folder


def make_llama_cpp(folder: Path) -> Path:
    """A folder for ``LLAMA_CPP``: the converter, and ``llama-server``."""
    (folder / "build" / "bin").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(_CONVERTER)
    server = folder / "build" / "bin" / "llama-server"
    server.write_text(f"#!{sys.executable}\n{_SERVER}")
    server.chmod(0o755)
    (server.parent / "writer.py").write_text(_WRITER)
    assert os.access(server, os.X_OK)
    return folder


def make_llama_cpp_python(folder: Path) -> Path:
    """A package ``llama_cpp`` in a folder for ``PYTHONPATH``, which holds llama.cpp's converter, too."""
    (folder / "llama_cpp").mkdir(parents=True)
    (folder / "llama_cpp" / "__init__.py").write_text(_BINDING)
    (folder / "writer.py").write_text(_WRITER)
    (folder / "convert_hf_to_gguf.py").write_text(_CONVERTER)
    return folder
