"""Reads a Mixture-of-Experts and a dense model whose FFNs become one more expert of it, behind the interface of one checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.architectures.added_expert import AddedMatrix, AddedRows
from upcycle.architectures.stored_moe import ExpertRows, matrix_of
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.checkpoints.compatibility import check_tokenizers
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.errors import UsageError

if TYPE_CHECKING:
    import torch

    from upcycle.files.locate import Source


class ExtendedMoe(MoeCheckpoint):
    """A stock MoE, with one more expert in every layer that has experts.

    Configuration, tokenizer and everything else are the MoE's.

    Args:
        source: the MoE.
        added: the dense model whose FFNs the expert has.
        dtype: the recipe's dtype; for ``keep``, FFNs and experts must be stored in the same one.
        tokenizers: compare tokenizers.

    Raises:
        UsageError: the models read text in different ways, or are stored in different dtypes.
        CheckpointError, RefusalError: as of :class:`~upcycle.checkpoints.moe_checkpoint.MoeCheckpoint`.
    """

    def __init__(self, source: Source, added: DenseCheckpoint, dtype: str, tokenizers: bool) -> None:
        self.added, self.sources = added, (added,)
        super().__init__(source)
        if tokenizers:
            hint = "the expert would read other tokens than it was trained on: take a fine-tune of this vocabulary"
            check_tokenizers(self, added, hint)
        if dtype == "keep":
            self._check_dtypes()
        self.fingerprint = hashlib.sha256(f"{self.fingerprint}\n{added.fingerprint}".encode()).hexdigest()

    def _check_dtypes(self) -> None:
        ours = next(spec.dtype for name, spec in self.store.specs.items() if matrix_of(name))
        for layer in self.model.moe_layers:
            if layer >= self.added.config.num_hidden_layers:
                return  # which the method refuses
            theirs = self.added.family.ffn_dtype(self.added.config, self.added.store.specs, layer)
            if ours != theirs:
                raise UsageError(
                    f"sources differ: experts are {ours} in {self.source.name}, and the FFN of layer {layer} is {theirs} in "
                    f"{self.added.source.name}",
                    hint=f"choose the dtype to write, for example --dtype {ours}",
                )

    @property
    def paths(self) -> list[Path]:
        """The folders and files that are read."""
        return [*super().paths, *self.added.paths]

    @property
    def modified(self) -> list[int]:
        """The modification time of each weight file of both models, in nanoseconds."""
        return [*super().modified, *self.added.modified]

    @property
    def version(self) -> list[Any]:
        """What tells versions of both models apart."""
        return [super().version, self.added.version]

    def blocks(self, origin: Origin, dtype: str = "keep") -> Iterator[torch.Tensor]:
        """Yield a tensor of the result: as it is stored, the added expert's, or that of all experts with the added one behind."""
        import torch

        if isinstance(origin, AddedMatrix):
            yield self.new_matrix(origin, origin.part, dtype)
        elif isinstance(origin, AddedRows):
            before = super().blocks(ExpertRows(origin.name, taken=origin.taken[:-1], flat=origin.flat), dtype)
            if origin.flat:
                yield torch.cat([*before, self._last_row(origin, dtype).view(1, 1)], 1)
                return
            yield from before
            yield self._last_row(origin, dtype)[None]
        else:
            yield from super().blocks(origin, dtype)

    def _last_row(self, origin: AddedRows, dtype: str) -> torch.Tensor:
        import torch

        if origin.part != "values":
            parts = ("gate", "up") if origin.part == "gate_up" else (origin.part,)
            return origin.form.stored(torch.cat([self.new_matrix(origin, part, dtype) for part in parts]))
        shape = () if origin.flat else self.store.specs[origin.name].shape[1:]
        row = (
            torch.tensor(origin.values, dtype=torch.float64)
            if origin.values
            else torch.zeros(shape, dtype=torch.float64)
        )
        return self._checked(origin.name, row.reshape(shape), self.dtype_of(origin.name, dtype))

    def new_matrix(self, origin: AddedMatrix | AddedRows, part: str, dtype: str) -> torch.Tensor:
        """Return a matrix of the new expert: the FFN's, with zero neurons behind its own up to the width of the experts.

        Args:
            origin: says of which layer, and in which dtype.
            part: gate, up or down.
            dtype: as a recipe means it.
        """
        import torch

        wanted = self.dtype_of(origin.name, dtype)
        matrix = self.added.whole(self.added.family.ffn_origins(self.added.config, origin.layer)[part], wanted)
        if origin.scale != 1:
            matrix = self._checked(origin.name, matrix.float() * origin.scale, wanted)
        missing = self.model.expert_width - matrix.shape[part == "down"]
        zeros = (0, missing) if part == "down" else (0, 0, 0, missing)
        return torch.nn.functional.pad(matrix, zeros).contiguous()
