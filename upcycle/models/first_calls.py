"""Makes the calls that torch must have made once, on one thread, before models run."""

from __future__ import annotations

from functools import cache

import torch


@cache
def settle_code_paths() -> None:
    """Let torch choose its code path for every function that models take from MKL; a second call does nothing.

    torch's CPU build takes cos, sin and other functions from MKL, which picks a code path when each is first called. If that
    first call comes from two threads at once, one of them can get a path that is accurate to 1e-4 only (seen once in 40 cold
    starts, on the rotary embedding). One element is computed by one thread: the choice is made before any real work.
    """
    for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.tanh, torch.erf, torch.sqrt, torch.rsqrt):
        function(torch.ones(1))
