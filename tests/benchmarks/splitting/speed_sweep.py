"""Times models of many shapes, dense and split, and fits what ``upcycle plan`` predicts times with.

Few-layer stock models with random weights: as many layers as no cache holds. All models of one size run in turns, in one dtype on one
thread, by this process' own clock: 256 tokens are read, and single tokens written. Sparse blocks run by transformers'
``grouped_mm`` and by ``upcycle.use_kernels``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
import transformers
from measure import Row as MeasuredRow
from measure import report

from upcycle.evaluation.shape_speed import OWN, PROMPT, STOCK, measure_shapes
from upcycle.kernels.cpu.products import fast_natively
from upcycle.planning.speed.fit import errors, left_out, refitted
from upcycle.planning.speed.table import TABLES
from upcycle.planning.speed.work import HOWS, TIMED_PARTS
from upcycle.version import __version__

STREAMED = 128 << 20  # bytes of the dense FFNs of a model, at least
MOST_LAYERS = 12
VOCABULARY, LARGE_VOCABULARY = 4096, 32768
Config = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A dense model's sizes; ``heads`` are the numbers of query heads and key heads, and the size of one."""

    name: str
    hidden: int
    ffn: int
    heads: tuple[int, int, int]

    @property
    def layers(self) -> int:
        """How many layers are timed."""
        return min(MOST_LAYERS, max(2, -(-STREAMED // (12 * self.hidden * self.ffn))))

    def config(self, layers: int, vocabulary: int) -> Config:
        """Its ``config.json``."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "head_dim": self.heads[2],
            "vocab_size": vocabulary,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        }


SIZES = [
    Size("demo", 192, 576, (6, 2, 32)),
    Size("SmolLM2-135M", 576, 1536, (9, 3, 64)),
    Size("Qwen2.5-0.5B", 896, 4864, (14, 2, 64)),
    Size("Qwen3-0.6B", 1024, 3072, (16, 8, 128)),
    Size("TinyLlama-1.1B", 2048, 5632, (32, 4, 64)),
    Size("Llama-2-7B", 4096, 11008, (32, 32, 128)),
]
# Of an FFN cut into so many pieces: how many of the routed ones run per token, and how many always run, as one shared expert.
SPLITS = [
    *((8, 2, 0), (8, 4, 0), (12, 1, 2), (12, 1, 5), (12, 2, 7)),
    *((24, 2, 10), (24, 12, 0), (48, 6, 12), (48, 24, 0)),
]
KEPT = (1.0, 0.75, 0.5, 0.25)  # of the neurons of a dense FFN


def shapes(size: Size) -> Iterator[tuple[Row, Config]]:
    """The models of a size: what the table says of each, and its ``config.json``."""
    full = {"layers": size.layers, "vocabulary": VOCABULARY}
    for layers, vocabulary in ((size.layers, LARGE_VOCABULARY), (size.layers // 2, VOCABULARY)):
        row = {"layers": layers, "vocabulary": vocabulary, "ffn": size.ffn}
        yield row, size.config(layers, vocabulary)
    for share in KEPT:
        width = round(share * size.ffn)
        yield {**full, "ffn": width}, {**size.config(size.layers, VOCABULARY), "intermediate_size": width}
    for pieces, top_k, shared in SPLITS:
        width = max(16, round(size.ffn / pieces / 16) * 16)  # not all of them fill the FFN: that is no matter here
        block = {"experts": pieces - shared, "width": width, "top_k": top_k, "shared": shared * width}
        yield {**full, **block}, sparse_config(size, block)


def sparse_config(size: Size, block: Row) -> Config:
    """The ``config.json`` of a model with such a block in every layer."""
    common = {**size.config(size.layers, VOCABULARY), "num_experts_per_tok": block["top_k"]}
    if not block["shared"]:
        own = {"model_type": "mixtral", "num_local_experts": block["experts"], "intermediate_size": block["width"]}
        return {**common, **own}
    return {
        **common,
        "model_type": "qwen2_moe",
        "num_experts": block["experts"],
        "moe_intermediate_size": block["width"],
        "shared_expert_intermediate_size": block["shared"],
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }


def timed(size: Size, rounds: int, dtype: torch.dtype) -> Row:
    """The table's entry for a size: milliseconds of reading the prompt and of writing a token."""
    models = list(shapes(size))
    found = measure_shapes(
        {str(number): config for number, (_, config) in enumerate(models)}, rounds=rounds, dtype=dtype
    )
    for number, (row, _) in enumerate(models):
        for how in (STOCK, OWN) if "experts" in row else (STOCK,):
            times = found[str(number), how]
            row["dense" if "ffn" in row else how] = [round(1e3 * times.prefill, 3), round(1e3 * times.decode, 4)]
    return {"hidden": size.hidden, "ffn": size.ffn, "heads": list(size.heads), "models": [row for row, _ in models]}


def text_of(table: Row) -> str:
    """The table as JSON, one model per line."""
    sizes = []
    for size in table["sizes"]:
        models = ",\n    ".join(json.dumps(model) for model in size["models"])
        head = json.dumps({key: value for key, value in size.items() if key != "models"})
        sizes.append(f'{head[:-1]}, "models": [\n    {models}\n  ]}}')
    rest = [f"{json.dumps(key)}: {json.dumps(table[key])}" for key in ("about", "milliseconds", "errors")]
    return "{" + ",\n".join([*rest, '"sizes": [\n  ' + ",\n  ".join(sizes) + "\n]"]) + "}\n"


def error_rows(table: Row) -> list[MeasuredRow]:
    """How far predictions of ratios to the dense parent are off, for models that the fit has not seen."""
    left = left_out(table)
    rows = []
    for part in TIMED_PARTS:
        for how in HOWS:
            some = errors([each for each in left if each.part == part and each.measured.how == how])
            rows.append(_row(f"{part}, {how}", some))
    return [*rows, _row("all", errors(left))]


def _row(what: str, off: dict[str, dict[str, float]]) -> MeasuredRow:
    cells = [f"{off[kind]['median']:.1%}, {off[kind]['worst']:.1%}" for kind in ("without_shape", "without_size")]
    return MeasuredRow(what, *cells, "", "")


def main() -> int:
    """Time sizes, fit all that are in the table, print the errors, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [size.name for size in SIZES]
    parser.add_argument("--sizes", nargs="*", choices=names, default=names, help="only these; the table keeps others")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed, after once that does not count")
    parser.add_argument("--dtype", choices=TABLES, default="float32", help="of weights and states")
    parser.add_argument("--table", type=Path, help="the table to write (default: the package's of that dtype)")
    arguments = parser.parse_args()
    arguments.table = arguments.table or TABLES[arguments.dtype]
    torch.set_num_threads(1)
    if arguments.dtype == "bfloat16" and not fast_natively(torch.bfloat16):
        sys.exit("this CPU computes bfloat16 in fp32: times of it say nothing about those that multiply it")
    tiles = arguments.dtype == "bfloat16" and torch.cpu._is_amx_tile_supported()
    about = {
        "device": "cpu",
        "instructions": torch.backends.cpu.get_cpu_capability() + " and AMX" * tiles,
        "threads": 1,
        "dtype": arguments.dtype,
        "prompt_tokens": PROMPT,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "upcycle": __version__,
    }
    table = json.loads(arguments.table.read_text()) if arguments.table.exists() else {"about": about, "sizes": []}
    if arguments.sizes and table["about"] != about:
        table = {"about": about, "sizes": []}  # times of another machine do not belong beside these
    for size in SIZES:
        if size.name in arguments.sizes:
            table["sizes"] = [old for old in table["sizes"] if old["name"] != size.name]
            table["sizes"].append({"name": size.name, **timed(size, arguments.rounds, getattr(torch, arguments.dtype))})
            print(f"{size.name}: timed", file=sys.stderr, flush=True)
            arguments.table.write_text(json.dumps(table))
    table.update(refitted(table))
    arguments.table.write_text(text_of(table))
    title = f"median and worst error of {len(left_out(table))} ratios to dense, predicted by a fit without the model"
    return report(title, ("this shape unseen", "this size unseen"), error_rows(table))


if __name__ == "__main__":
    sys.exit(main())
