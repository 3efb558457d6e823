"""SpheroMoE: experts read slots, which are mixtures of all tokens (MoE Jetpack, arXiv 2406.04801). B sequences, n tokens, M slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from upcycle.models.own.moe_block import PackedExperts
from upcycle.models.own.replaced_ffn import ReplacedFfn
from upcycle.models.own.routing.top_k import TopKRule
from upcycle.models.own.slot_ffn import SlotFfn

_TEMPERATURE = 0.5  # with which both begin, as in the authors' code


class SlotBlock(nn.Module):
    """Maps ``[B, n, d]`` to ``[B, n, d]``, like the FFN that was here. Further arguments of a call are ignored.

    Queries are learned vectors, one per slot, normed and of length 1; keys are the tokens, scaled and shifted by channel, of length
    1. A slot is the mean of the tokens by a softmax over them of their cosine with its query over a temperature. Each expert reads
    its slots, and a token gets the mean of what all made of them, by a softmax over slots of the same cosines over another
    temperature. So much as the authors' released code; it then takes entmax-1.5 in the place of the last softmax, which the paper
    does not. All tokens are mixed: nothing that writes token by token can use it.

    Core experts (wide) and universal ones (narrow) differ in their widths alone: the paper's two paths.

    Args:
        ffn: its description.

    Attributes:
        queries: ``[M, d]``, the slots of one expert one behind the other; orthogonal at first.
        mask: of the tokens of the present call, 0 at padding; None: nothing is known of it.
    """

    def __init__(self, ffn: SlotFfn) -> None:
        super().__init__()
        d, count = ffn.hidden_size, ffn.experts * ffn.slots
        self.queries = nn.Parameter(torch.empty(count, d))
        self.query_norm = nn.LayerNorm(d)
        self.key_scale, self.key_shift = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.dispatch_temperature = nn.Parameter(torch.tensor(_TEMPERATURE))
        self.combine_temperature = nn.Parameter(torch.tensor(_TEMPERATURE))
        biases = frozenset({"up", "down"} if ffn.bias else ())
        packed = ((ffn.paths), d, ffn.activation, ffn.gated, biases, ffn.widths, 0, False, TopKRule(1))
        self.experts = PackedExperts(ReplacedFfn(*packed))  # type: ignore[arg-type]
        self.slots, self.noise, self.expert_dropout = ffn.slots, ffn.noise, ffn.expert_dropout
        self.dropout = nn.Dropout(ffn.dropout)
        self.mask: torch.Tensor | None = None
        nn.init.orthogonal_(self.queries)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See the class; tokens of images may lie in rows, ``[B, H, W, d]``."""
        d, count = hidden_states.shape[-1], len(self.queries)
        x = hidden_states.reshape(len(hidden_states) if hidden_states.ndim > 2 else 1, -1, d)
        dispatch, combine = self.weights(x)
        slots = (dispatch.transpose(1, 2) @ x).reshape(-1, d)
        owners = (torch.arange(count, device=x.device) // self.slots).repeat(len(x))[:, None]
        made = self.experts(slots, owners, torch.ones_like(owners, dtype=x.dtype)).to(x.dtype)
        out: torch.Tensor = self.dropout(combine @ made.view(len(x), count, d))
        return out.view_as(hidden_states)

    def weights(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for tokens ``[B, n, d]`` what each slot has of each token, and each token of each slot, both ``[B, n, M]``."""
        exact = x.dtype if x.dtype == torch.float64 else torch.float32  # cosines over small temperatures
        queries = functional.normalize(self.query_norm(self.queries).to(exact), dim=-1)
        keys = functional.normalize((x * self.key_scale + self.key_shift).to(exact), dim=-1)
        cosines = keys @ queries.T
        dispatch = self._noisy(cosines / self.dispatch_temperature.to(exact))
        combine = self._noisy(cosines / self.combine_temperature.to(exact))
        if self.mask is not None and self.mask.shape == x.shape[:2]:
            # Not the infinity: a softmax over nothing but padding is of no use to anyone, and must be a number.
            dispatch = dispatch.masked_fill((self.mask == 0)[..., None], torch.finfo(exact).min)
        if self.training and self.expert_dropout:
            lost = torch.rand(self.experts.count, device=x.device) < self.expert_dropout
            lost = (lost & ~lost.all()).repeat_interleave(self.slots)  # never all of them
            combine = combine.masked_fill(lost, torch.finfo(exact).min)
        return dispatch.softmax(1).to(x.dtype), combine.softmax(2).to(x.dtype)

    def _noisy(self, logits: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.noise):
            return logits
        return logits + torch.randn_like(logits) * (self.noise / self.experts.count)
