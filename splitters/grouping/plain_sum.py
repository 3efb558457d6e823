"""The base of partitions whose paper adds the chosen experts up without weights."""

from __future__ import annotations

from upcycle.methods.base import Partition, Scale


class PlainSumPartition(Partition):
    """A partition whose paper gives every chosen expert the weight one, so that its ``paper`` scale is ``sum`` = K."""

    def scale(self, convention: Scale, experts: int, top_k: int, shared: int = 0) -> float:
        """Return the scale of every partition; ``paper`` is that of ``sum``."""
        return super().scale("sum" if convention == "paper" else convention, experts, top_k, shared)
