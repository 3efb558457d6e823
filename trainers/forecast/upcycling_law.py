"""Two published rules for when training a MoE from scratch is better than upcycling, both extrapolated here.

N parameters of the dense model, D1 tokens that it was trained on, D2 tokens that the MoE is trained on.
"""

from __future__ import annotations

import math

# Liew et al., "Scaling Laws for Upcycling Mixture-of-Experts Language Models" (arXiv 2502.03009), table 2. All laws are
# fitted with the dense model's N, to MoEs of 8 experts; logarithms are natural.
IRREDUCIBLE = 0.165
SCRATCH = (32.0, 0.161, 7.05, 0.080)  # A, alpha, B, beta
UPCYCLED = (16.3, 0.043, 0.085, 7.98e-4, 8.53, 0.112)  # A, alpha1, alpha2, alpha3, B, beta


def loss_from_scratch(tokens: float, parameters: float) -> float:
    """The loss in nats of a MoE that is trained from scratch: ``A D2^-alpha + B N^-beta + E``."""
    a, alpha, b, beta = SCRATCH
    return float(a * tokens**-alpha + b * parameters**-beta + IRREDUCIBLE)


def loss_upcycled(dense_tokens: float, tokens: float, parameters: float) -> float:
    """The loss in nats of an upcycled MoE: ``A D1^-alpha1 D2^(-alpha2 + alpha3 ln D1) + B N^-beta + E``.

    The longer the dense model was trained, the less each further token lowers the loss of the MoE.
    """
    a, alpha1, alpha2, alpha3, b, beta = UPCYCLED
    slope = -alpha2 + alpha3 * math.log(dense_tokens)
    return float(a * dense_tokens**-alpha1 * tokens**slope + b * parameters**-beta + IRREDUCIBLE)


def crossing(dense_tokens: float, parameters: float) -> float | None:
    """The smallest D2 from which on training from scratch gives the lower loss; ``None``: there is none up to 1e15.

    Beyond that the two fits cross once more, far outside the range that they were fitted to.
    """

    def ahead(tokens: float) -> bool:
        return loss_from_scratch(tokens, parameters) < loss_upcycled(dense_tokens, tokens, parameters)

    first = next((power for power in range(6, 16) if ahead(10.0**power)), None)
    if first is None:
        return None
    low, high = 10.0 ** (first - 1), 10.0**first
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if ahead(middle) else (middle, high)
    return high


def advice(dense_tokens: float | None, dense_active: float, tokens: float, active: float) -> list[str]:
    """Warnings from the rules by which training from scratch would be better.

    Skywork-MoE (arXiv 2406.06563, section 4) compares costs, here tokens times active parameters: if training the MoE costs more
    than twice what the dense model did, training from scratch is better; if it costs far less, upcycling is. The scaling law
    compares the two losses at D2 tokens.

    Args:
        dense_tokens: D1; ``None``: not known, so that there are no warnings.
        dense_active: N.
        tokens: D2.
        active: parameters of the MoE that one token uses.
    """
    if not dense_tokens:
        return []
    found = []
    ratio = tokens * active / (dense_tokens * dense_active)
    if ratio >= 2:
        found.append(
            f"this training costs {ratio:.1f}x as much as the dense model's: from 2x on, Skywork-MoE (arXiv 2406.06563) found "
            "training from scratch better"
        )
    limit = crossing(dense_tokens, dense_active)
    behind = loss_from_scratch(tokens, dense_active) < loss_upcycled(dense_tokens, tokens, dense_active)
    if limit is not None and behind:
        found.append(
            f"this training has {tokens:.2g} tokens after a dense model's {dense_tokens:.2g}: beyond {limit:.2g}, a MoE from scratch "
            "has the lower loss by the scaling law of arXiv 2502.03009 (fitted to 8 experts; an extrapolation)"
        )
    return found
