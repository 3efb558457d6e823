"""When to stack a small model's layers, and how often: the law of Gstack (Du et al., arXiv 2405.15319, section 4).

N parameters of the large model without embeddings, n of the small one, C FLOPs of all training, d tokens that the small one is trained
on before its layers are stacked.
"""

from __future__ import annotations

import math

from upcycle.formatting import count

BEST = (2, 4)  # the growth factors between which the paper found the lowest losses; it recommends the second
_PER_TOKEN = 6  # FLOPs per parameter and token of training (Kaplan et al., arXiv 2001.08361)
_RANGE = (
    1e8,
    1e10,
)  # parameters of the large models that the law was fitted to and tried on: 410 million to 7 billion, about


def tokens_before_stacking(parameters: float, flops: float) -> float:
    """The law: ``log10(d) = 0.88 log10(N) + 163.27 / log10(C) - 5.74``.

    Args:
        parameters: N.
        flops: C.
    """
    return float(10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74))


def when_to_stack(large: float, small: float, flops: float) -> tuple[str, list[str]]:
    """What a plan says of a budget: after how many tokens to stack, and how many are left for the large model; and warnings.

    Args:
        large: N.
        small: n.
        flops: C.
    """
    before = tokens_before_stacking(large, flops)
    left = (flops / _PER_TOKEN - before * small) / large
    if left <= 0:
        share = _PER_TOKEN * before * small / flops
        said = f"the law of arXiv 2405.15319 gives no time to stack within {flops:.3g} FLOPs"
        return said, [
            f"budget {flops:.3g}: by the law the small model alone would take {share:.1f} times as much ({count(before)} tokens)"
        ]
    said = (
        f"by the law of arXiv 2405.15319, within {flops:.3g} FLOPs, stack after {count(before)} tokens of the small model, and train "
        f"the large one on {count(left)}"
    )
    if _RANGE[0] <= large <= _RANGE[1]:
        return said, []
    return said, [f"the law was fitted to models of 410 M to 7 B parameters; {count(large)} is an extrapolation"]
