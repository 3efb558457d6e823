"""Reads a Mixture-of-Experts model as a source, tensor by tensor, and gives its experts in any order and number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from upcycle.architectures.stock_classes import stock_shapes
from upcycle.architectures.stored_moe import ExpertRows, MoeModel, moe_family
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.checkpoint import COPY_BLOCK_BYTES, Checkpoint
from upcycle.files.formats.tensor_names import refuse_quantized
from upcycle.files.locate import Source

if TYPE_CHECKING:
    import torch


class MoeCheckpoint(Checkpoint):
    """A stock MoE on disk, with its experts stored one by one or fused.

    Raises:
        CheckpointError: the folder is damaged, or its tensors are not those of the stock class.
        RefusalError: the model is not a MoE that upcycle knows.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        refuse_quantized(self.store.specs, self.raw_config, source.name)
        self.model = MoeModel.read(self.raw_config, self.store.specs, source.name)
        self.model.check(stock_shapes(self.raw_config), source.name)

    def _identify(self) -> None:
        moe_family(self.raw_config, self.source.name)

    def blocks(self, origin: Origin, dtype: str = "keep") -> Iterator[torch.Tensor]:
        """Yield a tensor of the result: as it is stored, or the wanted experts of it, in one or more blocks each."""
        if not isinstance(origin, ExpertRows):
            yield from super().blocks(origin, dtype)
        elif origin.noise:
            yield self._with_noise(origin, dtype)
        else:
            for expert in origin.taken:
                for block in self.store.chunks(origin.name, COPY_BLOCK_BYTES, (expert, 1)):
                    yield self._checked(origin.name, block, dtype)

    def _with_noise(self, origin: ExpertRows, dtype: str) -> torch.Tensor:
        """Return a router's rows ``[E', d]``, with noise on those of new experts, added in fp32 and rounded once.

        The noise is scaled by the population standard deviation of all stored rows, computed in fp64.
        """
        import torch

        from upcycle.ffn.random_weights import stream

        stored = self.read(origin.name, dtype)
        std = stored.double().std(correction=0).item()
        taken = stored[list(origin.taken)]
        fresh = taken[origin.kept :]
        drawn = torch.randn(fresh.shape, generator=stream(origin.seed, origin.name, "noise"))
        taken[origin.kept :] = (fresh.float() + origin.noise * std * drawn).to(taken.dtype)
        return taken
