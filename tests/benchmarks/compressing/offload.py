"""A MoE of four times the memory that its weights may use: experts in files with upcycle, against mapping the files alone.

    python tests/benchmarks/compressing/offload.py [--folder FOLDER] [--tokens 96]

The model is random, of the shape of a stock Granite MoE (8 layers, 20 experts of 12.6 MB, top 2, fp32: 2.1 GB), with skewed routing:
every embedding has a common part, on which the routers' rows lie apart as a Zipf law says (``--zipf``), and a part of its own that
decides the rest. Tokens are drawn at temperature 1 with one seed, so that texts do not repeat themselves; all ways must draw the
same ones.

Each way runs in a process of its own. **How the cap is made real:** whatever a way does not hold comes from the disk. ``upcycle``
holds what its budget says, and reads past the page cache. ``mmap`` is the file mapped into memory, with the experts computed from
the mapping, as it is left to the system; the system's choice of pages under a cap is replaced by the best that it could do: the
experts used longest ago, of all layers, leave the mapping (``madvise``) when the mapped ones would take more bytes than upcycle's
buffers. The time of that is not counted; that of page faults is, as the system serves them, with its read-ahead, whose surplus is
dropped behind every token.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
from smollm2 import cache_folder

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 20,
    "num_experts_per_tok": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
PROMPT = 64


def make(folder: Path, zipf: float) -> None:
    """Write the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("granitemoe", **SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    d, experts = config.hidden_size, config.num_local_experts
    common = torch.randn(d)
    common /= common.norm()
    with torch.no_grad():
        own = torch.randn(config.vocab_size, d)
        own -= (own @ common)[:, None] * common
        # After the norm a state has length sqrt(d), half of its square along the common direction.
        embedding = model.get_input_embeddings().weight
        embedding.copy_(own / own.norm(dim=1, keepdim=True) + common)
        model.get_output_embeddings().weight.copy_(torch.randn(config.vocab_size, d) * (3 / d**0.5))
        for layer in model.model.layers:
            moe = layer.block_sparse_moe
            prior = -zipf * torch.log(torch.arange(1, experts + 1).float())[torch.randperm(experts)]
            rows = torch.randn(experts, d)
            rows -= (rows @ common)[:, None] * common
            rows *= 2 / d**0.5  # logits vary by about sqrt(2) with the token
            moe.router.weight.copy_(rows + prior[:, None] * common / (d / 2) ** 0.5)
            # Attention and experts add to the stream about a quarter of what is there, as in trained models.
            for name, weight in layer.named_parameters():
                if weight.dim() > 1 and "router" not in name:
                    weight.copy_(torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
                    if "down_proj" in name or "o_proj" in name:
                        weight.mul_(0.02)
    model.save_pretrained(folder, max_shard_size="20GB")
    os.sync()


def prompt() -> list[int]:
    """Tokens that are there before any are written."""
    return torch.randint(0, SHAPE["vocab_size"], (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def write(model: Any, tokens: int, behind: Any = lambda: 0.0) -> dict[str, Any]:
    """Draw tokens; ``behind`` runs behind every pass and returns seconds that were not the model's."""
    draw = torch.Generator().manual_seed(2)
    started = perf_counter()
    output = model(torch.tensor([prompt()]), use_cache=True)
    first = perf_counter() - started - behind()
    written, seconds, computed = [], 0.0, processor_seconds()
    for _ in range(tokens):
        token = int(torch.multinomial(output.logits[0, -1].softmax(-1), 1, generator=draw))
        written.append(token)
        started = perf_counter()
        output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
        seconds += perf_counter() - started - behind()
    return {
        "tokens": written,
        "prompt_seconds": first,
        "tokens_per_second": tokens / seconds,
        "computed": (processor_seconds() - computed) / tokens,
    }


class Mapped:
    """Stands where a weight of experts was: an index gives an expert's part of the mapped file."""

    def __init__(self, name: str, layer: Any, weight: torch.Tensor, pages: Pages) -> None:
        self.shape, self.dtype, self._pages = weight.shape, weight.dtype, pages
        self._layer, self._matrices = layer, [next(m for m in e.matrices if m.name == name) for e in layer.experts]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> torch.Tensor:
        expert = self._layer.experts[int(index)]
        matrix = self._matrices[int(index)]
        self._pages.hold(expert)
        extent = next(one for one in expert.extents if one.at == matrix.at)
        raw = torch.frombuffer(self._pages.map, dtype=torch.float32, count=extent.count // 4, offset=extent.first)
        return raw.view(matrix.shape)


class Pages:
    """A mapped file, and which experts of it are in memory: those used last, up to ``most`` bytes."""

    def __init__(self, path: Path, most: int) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self.map = mmap.mmap(self._file, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
        self._most, self._held, self._used = most, OrderedDict(), 0
        self.hits = self.misses = 0
        self._beside = 0.0

    def hold(self, expert: Any) -> None:
        started = perf_counter()
        key = id(expert)
        if next(reversed(self._held), None) == key:
            return
        if key in self._held:
            self._held.move_to_end(key)
            self.hits += 1
        else:
            self.misses += 1
            while self._used + expert.nbytes > self._most:
                self._drop(self._held.popitem(last=False)[1])
            self._held[key] = expert
            self._used += expert.nbytes
        self._beside += perf_counter() - started

    def _drop(self, expert: Any) -> None:
        for extent in expert.extents:
            start = extent.first // mmap.PAGESIZE * mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, start, extent.first + extent.count - start)
            os.posix_fadvise(self._file, extent.first, extent.count, os.POSIX_FADV_DONTNEED)
        self._used -= expert.nbytes

    def behind(self) -> float:
        """Drop what was read ahead and is not mapped; return the seconds since the last call that were spent on the cap."""
        started = perf_counter()
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        beside, self._beside = self._beside + perf_counter() - started, 0.0
        return beside


def run(way: str, folder: Path, memory: int, tokens: int) -> dict[str, Any]:
    """Run one way in this process."""
    import psutil

    from upcycle.architectures.stock import build_config, empty_model, load_stock_model
    from upcycle.files.formats.tensor_files import read_config
    from upcycle.inference.offloading.offload import OffloadedModel
    from upcycle.models.experts import use_eager_experts
    from upcycle.trainers.routing.stock_routers import find_routers

    if way == "whole":
        return write(use_eager_experts(load_stock_model(folder)).eval(), tokens)
    find_routers(
        empty_model(build_config(read_config(folder), "it"), "it")
    )  # loads the code, whose memory is not counted
    before, on_disk = psutil.Process().memory_info().rss, psutil.Process().io_counters().read_bytes
    prefetch = way != "upcycle without guesses"
    with OffloadedModel(folder, memory, prefetch=prefetch, keep_pages=False) as offloaded:
        budget = offloaded.budget
        if way != "mmap":
            told = write(offloaded.model, tokens)
            return {**told, **offloaded.facts(), **grown(before, on_disk), "places": budget.places}
        most = budget.expert * (sum(budget.places) + budget.ahead)
        layers = offloaded._files.layers
        pages = Pages(layers[0].experts[0].extents[0].file.path, most)
        for layer in layers:
            layer.module._forward_pre_hooks.clear()
            layer.module._forward_hooks.clear()
            for name in layer.names:
                layer.module.__dict__[name] = Mapped(name, layer, layer.module.__dict__[name], pages)
        for state in offloaded.cache._layers:
            state.free.clear()
        pages.behind()
        told = write(offloaded.model, tokens, pages.behind)
        share = pages.hits / (pages.hits + pages.misses)
        return {**told, "hit_rate": share, **grown(before, on_disk)}


def grown(before: int, on_disk: int) -> dict[str, int]:
    """Return how much larger than ``before`` the resident set was at most, and what was read from the disk since ``on_disk``."""
    import psutil

    from upcycle.hardware.memory import peak_memory

    return {"resident_set": peak_memory() - before, "disk": psutil.Process().io_counters().read_bytes - on_disk}


def processor_seconds() -> float:
    """Return what all threads of this process have computed."""
    used = os.times()
    return used.user + used.system


def main() -> None:
    """Make the model, run every way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "offload-moe")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--zipf", type=float, default=1.5)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--way")
    given = parser.parse_args()
    if not (given.folder / "config.json").is_file():
        make(given.folder, given.zipf)
    total = sum(file.stat().st_size for file in given.folder.glob("*.safetensors"))
    memory = total // 4
    if given.way:
        print(json.dumps(run(given.way, given.folder, memory, given.tokens)))
        return
    print(f"{total / 1e9:.2f} GB of weights, {memory / 1e9:.2f} GB for them in memory, {given.tokens} tokens")
    ways = ("whole", "mmap", "upcycle without guesses", "upcycle")
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for time in range(given.times):  # in turn, as others may use the disk, too
        for way in ways if not time else ways[1:]:
            command = [sys.executable, "-P", __file__, "--way", way, "--folder", str(given.folder)]
            command += ["--tokens", str(given.tokens)]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[way].append(json.loads(told.splitlines()[-1]))
    expected = runs["whole"][0]["tokens"]
    base = sorted(one["tokens_per_second"] for one in runs["mmap"])[given.times // 2]
    for way in ways:
        found = sorted(runs[way], key=lambda one: one["tokens_per_second"])
        one = found[len(found) // 2]
        same = all(each["tokens"] == expected for each in found)
        line = f"{way:24s} {one['tokens_per_second']:6.2f} tokens/s ({one['tokens_per_second'] / base:4.2f}x mmap)"
        line += f"  {one['computed']:.3f} s of processors per token  prompt {one['prompt_seconds']:5.2f} s"
        line += "  same tokens" if same else "  OTHER TOKENS"
        if "hit_rate" in one:
            line += f"  hits {one['hit_rate']:.0%}"
        if "written" in one:
            counts = one["written"]
            all_of = sum(counts.values())
            line += "".join(f"  {key} {counts[key] / all_of:.0%}" for key in counts)
            line += f"  wrong guesses {one['wrong_guesses']}  places {one['places']}"
        if "resident_set" in one:
            line += f"  memory grew by {one['resident_set'] / 1e9:.2f} GB, {one['disk'] / 1e9:.1f} GB from the disk"
        print(line)


if __name__ == "__main__":
    main()
