"""A parent's next-token distributions, truncated to the most probable tokens, to distil from without running the parent.

N positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from upcycle.errors import CheckpointError, UsageError
from upcycle.trainers.routing.routing_rule import widened


@dataclass(frozen=True)
class TopLogits:
    """The n most probable tokens of every position, and the probability of all others together.

    ``tokens`` int32 ``[N, n]``; ``log_probabilities`` fp32 ``[N, n]``; ``tail`` fp32 ``[N]``, the log probability of all tokens
    that were left out. A position that keeps fewer than n tokens is padded with its first token at minus infinity.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor
    tail: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, top_p: float = 0.95, most: int = 64) -> TopLogits:
        """Keep the fewest tokens of every position that have ``top_p`` of the probability, but at most ``most``.

        Args:
            logits: the parent's, ``[..., V]``, any floating dtype.
            top_p: in (0, 1].
            most: at least 1.

        Raises:
            UsageError: ``top_p`` or ``most`` is out of range.
        """
        if not 0 < top_p <= 1 or most < 1:
            raise UsageError(f"top_p {top_p} and most {most}: top_p must be above 0 and up to 1, most at least 1")
        everything = widened(logits.detach()).flatten(0, -2).log_softmax(-1)
        top, tokens = everything.topk(min(most, everything.shape[-1]), dim=-1)
        before = top.exp().cumsum(-1) - top.exp()
        kept = before < top_p
        width = int(kept.sum(-1).max())
        kept, top, tokens = kept[:, :width], top[:, :width], tokens[:, :width]
        tokens = torch.where(kept, tokens, tokens[:, :1])
        left = everything.scatter(1, tokens, -torch.inf).logsumexp(-1)
        return cls(tokens.int(), top.masked_fill(~kept, -torch.inf).float(), left.float())

    def kl(self, student: torch.Tensor) -> torch.Tensor:
        """``KL(parent || student)`` per position in nats, ``[...]``, from the student's logits ``[..., V]``.

        The tail counts as one more outcome on both sides: ``p_tail log(p_tail / q_tail)``. Merging outcomes never makes a KL
        larger (log-sum inequality), so this is a lower bound of the full KL, and equal to it where nothing was left out. Without
        this term, a student could put all its mass on the kept tokens. How it spreads its mass within the tail is left to it.

        Raises:
            UsageError: the cache holds another number of positions.
        """
        rows = widened(student).flatten(0, -2)
        if len(rows) != len(self.tokens):
            raise UsageError(
                f"cached logits of {len(self.tokens)} positions, but the student has {len(rows)}",
                hint="cache them again for this data and this batch size",
            )
        tokens = self.tokens.long().to(rows.device)
        log_p, log_tail = self.log_probabilities.to(rows), self.tail.to(rows)
        kept = log_p > -torch.inf
        total = rows.logsumexp(-1)
        given = rows.gather(1, tokens) - total[:, None]
        head = torch.where(kept, log_p.exp() * (log_p.masked_fill(~kept, 0.0) - given), 0.0).sum(-1)
        # Finite in place of minus infinity: where everything is kept, the gradient of the unused tail would not be finite.
        nothing = torch.finfo(rows.dtype).min / 4
        given_tail = rows.scatter(1, tokens, nothing).logsumexp(-1) - total
        some = log_tail > -torch.inf
        tail = torch.where(some, log_tail.exp() * (log_tail.masked_fill(~some, 0.0) - given_tail), 0.0)
        return (head + tail).view(student.shape[:-1])

    def positions(self, which: slice) -> TopLogits:
        """The same for some of the positions."""
        return TopLogits(self.tokens[which], self.log_probabilities[which], self.tail[which])

    def save(self, path: Path) -> None:
        """Write the three tensors to a ``.safetensors`` file."""
        from safetensors.torch import save

        tensors = {"tokens": self.tokens, "log_probabilities": self.log_probabilities, "tail": self.tail}
        # Not save_file, whose error on a full disk is no OSError.
        path.write_bytes(save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}))

    @classmethod
    def load(cls, path: Path) -> TopLogits:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise CheckpointError(f"{path} holds no cached logits: {error}", hint="cache them again") from None
