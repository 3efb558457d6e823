"""Cheap-embed router: the token embeddings of each expert's prompts."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from upcycle.ffn.activations import Activations
from upcycle.routers.for_mixing.base import SourceRouter
from upcycle.routers.for_mixing.hidden import prompt_means


class CheapEmbedRouter(SourceRouter):
    """mergekit-moe's ``cheap_embed``: as ``hidden``, from the embeddings of the prompts' tokens instead of states, so that no
    layer runs; all layers have the same rows.

    Deviations: every prompt counts the same, whatever its length, and positive and negative prompts are subtracted as they
    are; mergekit brings each side to length one first.
    """

    name = "cheap_embed"
    title = "Embeddings of prompts"
    paper = None  # https://github.com/arcee-ai/mergekit, docs/moe.md
    walks = False

    def source_rows(self, activations: Activations, models: int) -> torch.Tensor:
        """Return fp64 ``[models, d]``, rows of length 1."""
        return normalize(prompt_means(activations, models), dim=1)
