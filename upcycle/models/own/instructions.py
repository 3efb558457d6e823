"""Finds the cluster of every token's instruction, for routers that read clusters. B sequences of n tokens, C clusters, V ids."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn

from upcycle.models.own.adapted_ffn import AdaptedFfn
from upcycle.models.own.lora_block import ClusterRouter, LoraBlock

CLUSTERS_MODULE = "instruction_clusters"  # of the base model
_STATE = "instruction_of_upcycle"  # on a cache: what was read of the instruction before


class Instruction(NamedTuple):
    """What was read of the instructions of sequences: the sum of their tokens' products ``[B, C]``, and how many tokens ``[B]``."""

    total: torch.Tensor
    tokens: torch.Tensor


class InstructionClusters(nn.Module):
    """Assigns an instruction to the nearest of C centroids: by the mean of the embeddings of its tokens, as they were at conversion.

    ``|m - c|^2`` is smallest where ``2 m c - |c|^2`` is largest, and the products of a mean are the mean of the tokens' products.
    So the module keeps the products of every token's embedding with every centroid, and never reads the model's embeddings.

    Attributes:
        products: ``[V, C]``, fp32.
        norms: ``[C]``, the squared norms of the centroids.
        length: how many of a document's first tokens its instruction is.
    """

    def __init__(self, ffn: AdaptedFfn) -> None:
        super().__init__()
        self.length = ffn.instruction
        self.products: torch.Tensor = nn.Buffer(torch.zeros(ffn.vocabulary, ffn.clusters, dtype=torch.float32))
        self.norms: torch.Tensor = nn.Buffer(torch.zeros(ffn.clusters, dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow the model to another device, but stay in fp32: a model in half precision has the same clusters."""
        kept = self.products, self.norms
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.products.dtype != torch.float32:
            self.products, self.norms = (old.to(self.norms.device) for old in kept)
        return self

    @torch.no_grad()
    def forward(
        self,
        ids: torch.Tensor,
        real: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        before: Instruction | None = None,
    ) -> tuple[torch.Tensor, Instruction]:
        """Return the cluster of every token ``[B, n]``, of what was read up to it, and the instructions of the last documents.

        A token looks at none behind it, so that a text has the same clusters whether it is read at once or token by token.

        Args:
            ids: ``[B, n]``.
            real: bool ``[B, n]``, false at padding; None: there is none.
            starts: bool ``[B, n]``, true where a document begins; None: every sequence is one.
            before: of the sequences' earlier tokens; None: there were none.
        """
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        first = torch.zeros_like(ids) if starts is None else _latest(starts)
        known = real & (ids < len(self.products))  # tokens that were added later say nothing
        count = known.cumsum(1)
        count = count - (count - known.long()).gather(1, first)
        whole = first == 0
        if before is not None:
            count = count + torch.where(whole, before.tokens.to(ids.device)[:, None], 0)
        taken = known & (count <= self.length)
        products = self.products[ids.clamp(max=len(self.products) - 1)] * taken[..., None]
        total = products.cumsum(1)
        total = total - (total - products).gather(1, first[..., None].expand_as(total))
        if before is not None:
            total = total + torch.where(whole[..., None], before.total.to(ids.device)[:, None], 0)
        mean = total / count.clamp(1, self.length)[..., None]
        clusters = (2 * mean - self.norms).argmax(-1)
        return clusters, Instruction(total[:, -1], count[:, -1])


def _latest(starts: torch.Tensor) -> torch.Tensor:
    """Return, for every place ``[B, n]``, the place of the latest start up to it."""
    places = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return torch.where(starts, places, 0).cummax(1).values


def add_clusters(model: Any, ffns: list[AdaptedFfn]) -> None:
    """Give a base model the module that its routers of clusters need, if it has such, and let it see the inputs of every call.

    The clusters stay until the next call, so that layers that are computed again in the backward pass find them. What was read of
    an instruction stays on the cache; a search that reorders a cache keeps prompts in their places, whose instruction is known.

    Args:
        model: a model of transformers, whose blocks are in place.
        ffns: the descriptions of these.
    """
    base = model.base_model
    described = next((ffn for ffn in ffns if ffn.clusters), None)
    blocks = [one for one in base.modules() if isinstance(one, LoraBlock) and isinstance(one.router, ClusterRouter)]
    if described is None or not blocks:
        return
    setattr(base, CLUSTERS_MODULE, InstructionClusters(described))
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), CLUSTERS_MODULE}
    base.register_forward_pre_hook(_read, with_kwargs=True)
    base.register_forward_hook(_keep, with_kwargs=True)


def _read(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the blocks of a base model the clusters of the call that begins."""
    ids = _argument(base, args, kwargs, "input_ids")
    clusters = None
    if isinstance(ids, torch.Tensor):
        cache = _argument(base, args, kwargs, "past_key_values")
        before = getattr(cache, _STATE, None) if cache is not None and cache.get_seq_length() else None
        mask = _argument(base, args, kwargs, "attention_mask")
        real = starts = None
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            real = mask[:, -ids.shape[1] :].bool()
        elif before is None:
            starts = _starts(ids, _argument(base, args, kwargs, "position_ids"))
        module: Any = getattr(base, CLUSTERS_MODULE)
        clusters, module.last = module(ids, real, starts, before)
    for block in base.modules():
        if isinstance(block, LoraBlock):
            block.clusters = clusters


def _keep(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Leave what was read of the instructions on the cache, for the call that continues the text."""
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        cache = _argument(base, args, kwargs, "past_key_values")
    module: Any = getattr(base, CLUSTERS_MODULE)
    last, module.last = getattr(module, "last", None), None
    if cache is not None and last is not None:
        setattr(cache, _STATE, last)


def _starts(ids: torch.Tensor, positions: Any) -> torch.Tensor | None:
    """Return where positions begin anew, as they do at the documents of a packed row."""
    if not isinstance(positions, torch.Tensor) or positions.ndim not in (2, 3):
        return None
    rows = positions if positions.ndim == 2 else positions[0]
    return (rows == 0).expand_as(ids)


def _argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    if name in kwargs:
        return kwargs[name]
    names = list(inspect.signature(module.forward).parameters)
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else None
