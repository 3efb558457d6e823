"""What routers share that tell the domains of several mixed models apart."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations, Inputs
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.plugins import PluginParameters
from upcycle.routers.base import LinearRouter

if TYPE_CHECKING:
    from upcycle.recipe.conversion_recipe import Recipe

DEGENERATE = 5.0  # condition number: four unit rows whose common cosine is 0.86, so that their logits hardly differ


class SourceParameters(PluginParameters):
    """Parameters of every :class:`SourceRouter`."""

    sharpness: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="all rows are multiplied by it: more lets the first expert weigh more",
    )


class SourceRouter(LinearRouter):
    """A router with one row per mixed model, made of what the recipe says the model is for; the model's chunks share the row.

    ``samples`` is what every source must name in the recipe. With ``walks``, a layer's rows are made of what its router will
    read: the FFN's inputs in the model ``source``. Without, they are made of the token embeddings, the same for all layers.
    """

    samples: ClassVar[Literal["prompts", "text"]] = "prompts"
    walks: ClassVar[bool] = True
    Parameters = SourceParameters
    parameters: SourceParameters

    def check_sources(self, recipe: Recipe, members: Sequence[int], copies: bool) -> None:
        """Demand a tokenizer, and for every expert's source a text or prompts that no other source has.

        Raises:
            UsageError: names the source and the key.
        """
        if not members:
            raise UsageError(
                f"the {self.name} router tells apart several sources, and experts are of one",
                hint="--router random, or --method branch_train_mix with --sources",
            )
        if recipe.tokenizer == "none":
            raise UsageError(
                f"the {self.name} router reads {self.samples}, and --tokenizer none leaves no tokenizer",
                hint="--tokenizer copy, or --router orthogonal",
            )
        if copies:
            raise UsageError(
                f"the {self.name} router has a row per source: copies of an expert would tie",
                hint="leave --experts out, or --router random",
            )
        key = "positive_prompts" if self.samples == "prompts" else "text"
        seen: dict[str, str] = {}
        for member in members:
            if member >= len(recipe.sources):
                raise UsageError(
                    f"the {self.name} router knows no {key} of the generalist {recipe.source}",
                    hint=f"list it in 'sources' with its {key}, in place of generalist=true",
                )
            source = recipe.sources[member]
            told = (sorted(source.positive_prompts), sorted(source.negative_prompts)) if key != "text" else source.text
            if not getattr(source, key):
                raise UsageError(
                    f"sources: {source.name} has no '{key}', and the {self.name} router needs them of every source",
                    hint=f"add '{key}:' to it in the recipe, or --router random",
                )
            if repr(told) in seen:
                raise UsageError(
                    f"sources: {seen[repr(told)]} and {source.name} have the same {self.samples}: their experts would tie",
                    hint="say what each is for, or --router random",
                )
            seen[repr(told)] = source.name

    @abstractmethod
    def source_rows(self, activations: Activations, models: int) -> torch.Tensor:
        """Return ``[models, d]``, made of the labelled tokens; :func:`labelled` reads them."""

    def rows(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> torch.Tensor:
        """Return the rows, fp32 ``[E, d]``.

        Raises:
            UsageError: there are no labelled tokens, or a row is not finite.
        """
        if activations is None or activations.samples is None:
            raise UsageError(
                f"the {self.name} router needs {self.samples} of every source", hint="add them to 'sources'"
            )
        whose = [e if expert.source is None else expert.source for e, expert in enumerate(blueprint.routed)]
        places = {source: place for place, source in enumerate(dict.fromkeys(whose))}
        rows = self.source_rows(activations, len(places)) * self.parameters.sharpness
        if not bool(rows.isfinite().all()) or not bool(rows.any(dim=1).all()):
            raise UsageError(
                f"layer {ffn.layer}: the {self.name} router finds no direction for a source",
                hint="its positive and negative prompts may cancel out; write others",
            )
        return rows[[places[source] for source in whose]].float()


def labelled(activations: Activations) -> Iterator[tuple[Inputs, torch.Tensor, torch.Tensor]]:
    """Yield every batch of router inputs with its tokens' ``owner`` and ``share``, as in ``Samples``."""
    assert activations.samples is not None
    first = 0
    for batch in activations.inputs():
        part = slice(first, first + len(batch.x))
        yield batch, activations.samples.owner[part], activations.samples.share[part]
        first = part.stop


def condition(rows: torch.Tensor) -> float:
    """Return the largest over the smallest singular value of the distinct rows; infinite where one is a combination of others."""
    values = torch.linalg.svdvals(torch.unique(rows.double(), dim=0))
    return (values.max() / values.min()).item() if values.min() > 0 else float("inf")


def own_expert(activations: Activations, blueprint: LayerBlueprint, rows: torch.Tensor) -> float:
    """Return the share of the sources' own tokens that choose an expert of their source, each source counting the same."""
    whose = torch.tensor([e if expert.source is None else expert.source for e, expert in enumerate(blueprint.routed)])
    names = torch.tensor(list(dict.fromkeys(whose.tolist())))
    found = total = 0.0
    for batch, owner, share in labelled(activations):
        chosen = whose[(batch.x @ rows.T).topk(blueprint.top_k, dim=1).indices]
        weight = share.clamp(min=0).double()
        found += (weight * (chosen == names[owner][:, None]).any(dim=1)).sum().item()
        total += weight.sum().item()
    return found / total
