"""Reads a Mixture-of-Experts model as a source, tensor by tensor, and gives its experts in any order and number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from upcycle.architectures.expert_terms import SHARED_FFN, DenseMatrix, ExpertTerms, FfnPart, PackedMatrix, Term
from upcycle.architectures.moe.dense_twin import beside_routed
from upcycle.architectures.moe_families import moe_family
from upcycle.architectures.stock import empty_model
from upcycle.architectures.stock_classes import not_loaded, stock_shapes
from upcycle.architectures.stored_moe import ExpertRows, MoeModel, expert_index, matrix_of
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.checkpoint import COPY_BLOCK_BYTES, Checkpoint
from upcycle.checkpoints.tensor_store import RenamedStore, TensorStore
from upcycle.files.formats.packed_folder import PackedFolder
from upcycle.files.formats.tensor_names import quantized_weights, refuse_quantized
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
        if isinstance(self.store, PackedFolder) and self.store.rounded:
            error = quantized_weights(
                self.raw_config, source.name, f"matrix '{min(self.store.rounded)}' is in few bits"
            )
            error.hint = "a second rounding adds to the first: compress the full-precision model that it was made from"
            raise error
        refuse_quantized(self.store.specs, self.raw_config, source.name)
        self.model = MoeModel.read(self.raw_config, self.store.specs, source.name)
        self.model.check(stock_shapes(self.raw_config), source.name)

    def _identify(self) -> None:
        self._family = moe_family(self.raw_config, self.source.name)

    def _named(self, store: TensorStore) -> TensorStore:
        """Return the store without what the class of a model of parts leaves out when it loads: layers that predict further."""
        if not self._family.parts:
            return store
        left_out = not_loaded(empty_model(self.raw_config, self.source.name))
        names = {name: name for name in store.specs if not left_out.search(name)}
        return store if len(names) == len(store.specs) else RenamedStore(store, names)

    def blocks(self, origin: Origin, dtype: str = "keep") -> Iterator[torch.Tensor]:
        """Yield a tensor of the result: as it is stored, or the wanted experts of it, in one or more blocks each."""
        if isinstance(origin, DenseMatrix):
            yield from self._dense(origin, dtype)
        elif isinstance(origin, PackedMatrix):
            yield from (self._packed(origin, terms, dtype) for terms in origin.experts)
        elif isinstance(origin, ExpertTerms):
            yield from (self._merged(origin, terms, dtype) for terms in origin.experts)
        elif not isinstance(origin, ExpertRows):
            yield from super().blocks(origin, dtype)
        elif origin.noise:
            yield self._with_noise(origin, dtype)
        elif origin.flat:
            rows = self.read(origin.name, dtype).view(-1)[list(origin.taken)]
            yield rows.view(origin.shape(self.store.specs[origin.name].shape))
        else:
            for expert in origin.taken:
                for block in self.store.chunks(origin.name, COPY_BLOCK_BYTES, (expert, 1)):
                    yield self._checked(origin.name, block, dtype)

    def matrices(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Return an expert's matrices in fp32: gate and up ``[F, d]``, down ``[d, F]``; and its biases, where it has some.

        ``SHARED_FFN`` stands for the shared ones.
        """
        import torch

        found: dict[str, torch.Tensor] = {}
        if expert == SHARED_FFN:
            for part, name in beside_routed(self.model, layer).items():
                whole = self.read(name).float()
                found |= dict(zip(("gate", "up"), whole.chunk(2), strict=True)) if part == "gate_up" else {part: whole}
            return found
        for name in self.model.names[layer]:
            role, part = self.model.role(name), matrix_of(name)
            if role == "expert" and expert_index(name) == expert:
                found[part] = self.read(name).float()
            elif role == "experts":
                stored = torch.cat([*self.store.chunks(name, COPY_BLOCK_BYTES, (expert, 1))])[0].float()
                whole = self.model.form(name).plain(stored)
                parts = {"down": whole} if part == "down" else dict(zip(("gate", "up"), whole.chunk(2), strict=True))
                found.update(parts)
            elif role == "expert biases":
                own = torch.cat([*self.store.chunks(name, COPY_BLOCK_BYTES, (expert, 1))])[0].float()
                found |= {"gate_bias": own[::2], "up_bias": own[1::2]} if part == "gate_up_bias" else {part: own}
        return found

    def _packed(self, origin: PackedMatrix, terms: Sequence[Term], dtype: str) -> torch.Tensor:
        """Return the rows of one expert in the order of ``upcycle_moe``, ``[rows, columns]``."""
        read: dict[int, dict[str, torch.Tensor]] = {}

        def matrix(expert: int, part: str) -> torch.Tensor:
            if expert not in read:
                read[expert] = self.matrices(origin.layer, expert)
            return read[expert][part]

        if origin.part == "down":
            rows = sum_of_terms(terms, "down", lambda expert: matrix(expert, "down")).T
        else:
            rows = packed_gate_up(*(sum_of_terms(terms, p, lambda e, p=p: matrix(e, p)) for p in ("gate", "up")))  # type: ignore[misc]
        stored = self.store.specs[origin.name].dtype if dtype == "keep" else dtype
        return self._checked(origin.name, rows.contiguous(), stored)

    def _merged(self, origin: ExpertTerms, terms: Sequence[Term], dtype: str) -> torch.Tensor:
        """Return the weighted sum of the terms' matrices, ``[rows, columns]``, or ``[1, rows, columns]`` of a fused tensor."""
        import torch

        def matrix(expert: int) -> torch.Tensor:
            name, rows = (origin.names[0], (expert, 1)) if origin.fused else (origin.names[expert], None)
            return origin.form.plain(torch.cat([*self.store.chunks(name, COPY_BLOCK_BYTES, rows)]).float())

        total = sum_of_terms(terms, origin.part, matrix)
        # Vectors are ``[1, rows]``, and their form is plain.
        total = origin.form.stored(total if origin.scale == 1 else origin.scale * total)
        stored = self.store.specs[origin.names[0]].dtype if dtype == "keep" else dtype
        return self._checked(origin.name, total, stored)

    def _dense(self, origin: DenseMatrix, dtype: str) -> Iterator[torch.Tensor]:
        """Yield a matrix of a dense FFN made of experts: rows part by part, or (down) whole."""
        import torch

        stored = self.store.specs[origin.name].dtype if dtype == "keep" else dtype
        made = (self.dense_part(origin.layer, part)[origin.part] for part in origin.cut.parts)
        whole = made if origin.part != "down" else iter([torch.cat([*made], 1)])
        return (self._checked(origin.name, matrix.contiguous(), stored) for matrix in whole)

    def dense_part(self, layer: int, part: FfnPart) -> dict[str, torch.Tensor]:
        """Return the matrices of some neurons of a dense FFN made of experts, fp32: gate and up ``[F', d]``, down ``[d, F']``."""
        import torch

        total: dict[str, torch.Tensor] = {}
        for term in part.terms:
            for name, matrix in self.matrices(layer, term.expert).items():
                own = matrix if term.order is None else reordered(matrix, name, torch.tensor(term.order))
                total[name] = term.weight * own + total[name] if name in total else term.weight * own
        if part.rank is not None:
            total = leading_directions(total, part.rank)
        return {**total, "down": part.scale * total["down"]}

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


def packed_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return the rows ``[2 F, d]`` of two matrices ``[F, d]`` in turns."""
    import torch

    return torch.stack([gate, up], 1).flatten(0, 1)


def sum_of_terms(terms: Sequence[Term], part: str, matrix: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Return the weighted sum of experts' matrices, the neurons of each in its order.

    Args:
        terms: the experts, at least one.
        part: which matrix it is.
        matrix: returns that of an expert, fp32.
    """
    import torch

    from upcycle.ffn.rounding.ternary import nearest_ternary

    total: torch.Tensor | None = None
    for term in terms:
        own = matrix(term.expert)
        if term.order is not None:
            own = reordered(own, part, torch.tensor(term.order))
        if term.ternary:
            own = nearest_ternary(own)
        total = term.weight * own if total is None else total + term.weight * own
    assert total is not None
    return total


def reordered(matrix: torch.Tensor, part: str, order: torch.Tensor) -> torch.Tensor:
    """Return an expert's matrix with its neurons in another order: columns of down, rows of the others."""
    import torch

    if part == "down":
        return matrix[..., order]
    if part == "down_bias":
        return matrix
    if part == "gate_up_bias":  # gate and up take turns
        pairs = matrix.unflatten(-1, (-1, 2))
        return torch.as_tensor(pairs[..., order, :].flatten(-2))
    if part == "gate_up":
        gate, up = matrix.chunk(2, -2)
        return torch.cat([gate[..., order, :], up[..., order, :]], -2)
    return matrix[..., order, :]


def leading_directions(matrices: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """Return an FFN of ``rank`` neurons: the combinations of an FFN's neurons that hold most of its weights.

    With ``M = [gate, up, down^T]`` ``[F, 3 d]`` ``= U S V^T``, they are the rows of ``U_r^T M``. The sign of each makes the largest
    entry of its column of U positive, so that the result does not depend on the library.
    """
    import torch

    names = [*matrices]
    stacked = torch.cat([matrices[name].T if name == "down" else matrices[name] for name in names], 1).double()
    vectors = torch.linalg.eigh(stacked @ stacked.T).eigenvectors.flip(1)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    made = ((vectors * largest.sign()).T @ stacked).float().chunk(len(names), 1)
    return {name: part.T if name == "down" else part for name, part in zip(names, made, strict=True)}
