"""What the kernels remember within a process, in one list, and how to make them forget it.

None of it changes a number. It saves looking the same thing up for every token, or logging it twice. What lasts no longer than
a ``with`` block (:func:`upcycle.kernels.gpu.launch_log.recorded`) is not here, nor what other libraries are told for good: torch
knows two operators (:mod:`upcycle.kernels.entry.compiled_operator`), transformers two names (:func:`upcycle.register_kernels`).
"""

from __future__ import annotations

import sys

REMEMBERED = {
    "upcycle.kernels.cpu.native.compile:function": "compiled functions, or that there is no compiler",
    "upcycle.kernels.cpu.products:fast_natively": "which 16-bit dtypes this CPU multiplies",
    "upcycle.kernels.cpu.recycled_memory:RECYCLER": "memory of ended tensors, up to 512 MB",
    "upcycle.kernels.entry.choose_backend:_chosen": "which path a device and dtype take, logged when first asked",
    "upcycle.kernels.entry.choose_backend:_module": "the module of a path",
    "upcycle.kernels.entry.whole_block:_looked_at": "addresses of blocks' weights, while the blocks live",
    "upcycle.kernels.entry.transformers_blocks:_whole_class": "classes of blocks that run as a whole",
    "upcycle.kernels.entry.transformers_experts:_activations": "transformers' classes of our activations",
    "upcycle.kernels.entry.transformers_experts:_known": "layouts of modules whose weights were checked, while they live",
    "upcycle.kernels.entry.transformers_experts:_warn": "which modules were warned about",
    "upcycle.kernels.gpu.backend:_on_device": "widths of experts that were copied to a GPU",
    "upcycle.kernels.gpu.tile_table:load_table": "tables of tiles, by path",
}
"""Module and name of everything that outlives a call, and what it is."""


def forget() -> None:
    """Clear all of that, as if the process had just started; what is needed again is looked up, checked and logged again."""
    for place in REMEMBERED:
        module, name = place.split(":")
        if module in sys.modules:  # else it cannot remember anything; Triton's modules need not even be installed
            held = getattr(sys.modules[module], name)
            (held.cache_clear if hasattr(held, "cache_clear") else held.clear)()
