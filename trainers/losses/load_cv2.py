"""Load loss: the experts' expected numbers of tokens should vary little. T tokens, E experts, K top-k."""

from __future__ import annotations

import torch

from upcycle.trainers.distributed.reduction import counted
from upcycle.trainers.losses.base import Loss
from upcycle.trainers.losses.importance_cv2 import CV2Parameters, squared_variation
from upcycle.trainers.routing.router_records import RouterRecord
from upcycle.trainers.routing.routing_rule import widened


class LoadCV2(Loss):
    """``Var / Mean^2`` over experts of ``sum_t P(x_t, i)`` (Shazeer et al. 2017, appendix A).

    ``P = Phi((z_i - kth_excluding(H, k, i)) / std_i)`` is the chance that expert i would be chosen if its noise alone were drawn
    again. z are the clean logits, H the noisy ones, and the threshold is the k-th largest of the other experts' H. LLaMA-MoE's
    code compares the noise with the threshold instead, which is not copied here. Without noise the loads are counts, which have
    no gradient.
    """

    name = "load_cv2"
    title = "Load, squared coefficient of variation (Shazeer, LLaMA-MoE)"
    paper = "https://arxiv.org/abs/1701.06538"
    Parameters = CV2Parameters
    parameters: CV2Parameters

    def sums(self, record: RouterRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """``[E]``: each expert's load."""
        return counted(_chances(record), mask)

    def value(self, sums: torch.Tensor, record: RouterRecord) -> torch.Tensor:
        """One layer's loss, a scalar, from its sums over all tokens."""
        return squared_variation(sums, self.parameters.unbiased)


def _chances(record: RouterRecord) -> torch.Tensor:
    """``[T, E]``: the chance that each token chooses each expert."""
    clean, k = widened(record.logits), record.experts.shape[1]
    if record.noise is None or k == clean.shape[1]:
        return record.chosen
    noisy = clean + record.noise.added
    *_, last_in, first_out = noisy.topk(k + 1, dim=1).values.split(1, dim=1)
    threshold = torch.where(noisy > first_out, first_out, last_in)
    chances: torch.Tensor = torch.special.ndtr((clean - threshold) / record.noise.std)
    return chances
