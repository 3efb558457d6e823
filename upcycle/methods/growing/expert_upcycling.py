"""Expert upcycling: a Mixture-of-Experts with more experts, each a copy of one that it had."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import UsageError
from upcycle.methods.growing.base import CopiedExperts, Described, Grown, Growth, Promise, moe_pieces, refuse_groups
from upcycle.plugins import PluginParameters

if TYPE_CHECKING:
    import torch

    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
    from upcycle.progress import Progress
    from upcycle.recipe.conversion_recipe import Recipe


class ExpertUpcyclingParameters(PluginParameters):
    """Parameters of :class:`ExpertUpcycling`."""

    utility: Literal["uniform", "norm", "load", "saliency", "gradient"] = Field(
        "uniform",
        description="which experts are copied: uniform: all equally often; else those with the largest weights (norm), most "
        "tokens (load), |w dL/dw| (saliency), or squared gradient (gradient); the last three need --calibration",
    )
    most_copies: int = Field(
        3, ge=1, description="most added copies of one expert in a layer, where a utility chooses them"
    )
    noise: float = Field(
        0.01,
        ge=0,
        description="normal noise on the router rows of added copies, as a fraction of the rows' standard deviation",
    )


class ExpertUpcycling(Growth):
    """Implements expert upcycling (Dwivedi et al. 2026, arXiv 2604.19835): from E to E' experts, with top-k unchanged.

    Every expert, old or new, has a router row of its own.

    Every expert of the source is kept in its place; the added ones stand behind them. With ``utility=uniform`` each is copied
    equally often; with another one the most useful expert of a layer gets ``most_copies`` copies, then the next, until
    all are given out (the greedy rule of the authors' code, github.com/amazon-science/expert-upcycling, as is the limit).

    What becomes of the function. Let expert e have ``n`` copies with the same row, and so the same logit. Top-k chooses the
    copies of the best expert first. With top-k K and n = m for all, the result is the source with top-(K/m), whose weights
    are renormalised over fewer experts: not the source's function. With top-k m K (``--top-k``), the m K chosen are all copies
    of the source's K, each of which weighs 1/m of what it did: the same function, at m times the compute, whether the weights
    are renormalised or left as the softmax gives them; with sigmoid scores only if they are renormalised. Unequal numbers of
    copies never give the same function, for an expert with two copies is chosen twice, and stock routers have no bias that
    enters the weights.

    Copies that are chosen together with the same weight get the same gradient and never part. The paper leaves that to noise
    on a bias by which its router is balanced. Deviation: stock softmax routers have no such bias, so ``noise`` is put on the
    added rows (``copy_noise`` in the authors' code), at their default of 0.01; 0 leaves exact copies.

    Deviation: ``saliency`` is the sum over an expert's weights of ``|w dL/dw|``, the first-order estimate; the authors' code
    multiplies the norms of both, which bounds it. ``gradient`` is the squared norm of the gradient, as in
    their code. All matrices of an expert count; in their code, by default, only the first. The loss is that of the
    calibration text.
    """

    name = "expert_upcycling"
    title = "Expert upcycling"
    paper = "https://arxiv.org/abs/2604.19835"
    takes = "moe"
    keys = frozenset({"experts", "top_k", "calibration"})
    next_step = "upcycle evaluate {out} --reference {source}"
    Parameters = ExpertUpcyclingParameters
    parameters: ExpertUpcyclingParameters

    @property
    def text_for(self) -> str | None:
        """What calibration text is needed for: load and gradients are measured on it; ``None`` for other utilities."""
        utility = self.parameters.utility
        return f"utility={utility}" if utility in ("load", "saliency", "gradient") else None

    def grow(self, source: Described, recipe: Recipe, choice: CopiedExperts | None = None) -> Grown:
        """See the class."""
        model = MoeModel.read(source.raw, source.specs, source.where)
        named = recipe.model_fields_set
        experts = recipe.experts if "experts" in named else 2 * model.experts
        top_k = recipe.top_k if "top_k" in named else model.top_k
        self._check(model, experts, top_k, source.where)
        if choice is None:
            every = [*range(model.experts), *(i % model.experts for i in range(experts - model.experts))]
            choice = dict.fromkeys(model.moe_layers, tuple(every))
        noise = self.parameters.noise
        made = {layer: dict(model.origins(layer, taken, noise, recipe.seed)) for layer, taken in choice.items()}
        return Grown(
            config=model.config_with(experts, top_k),
            pieces=tuple(moe_pieces(model, made)),
            promise=self._promise(model, experts, top_k),
            summary=f"{experts} experts from {model.experts}, top-{top_k}",
            made={"experts": {str(layer): list(taken) for layer, taken in choice.items()}},
            context=model.context,
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            tied=model.tied,
            idle=model.expert_elements // model.experts * (experts - top_k),
            source_idle=model.expert_elements // model.experts * (model.experts - model.top_k),
            resolved={"experts": experts, "top_k": top_k},
            warnings=self._warnings(model, experts, top_k),
        )

    def _check(self, model: MoeModel, experts: int, top_k: int, where: str) -> None:
        old, most = model.experts, self.parameters.most_copies
        refuse_groups(model, self.name)
        if experts <= old:
            raise UsageError(
                f"{where} has {old} experts already, and {experts} are asked for",
                hint=f"--experts {2 * old} doubles them",
            )
        if top_k > experts:
            raise UsageError(f"top_k is {top_k}, but there are only {experts} experts", hint="a smaller --top-k")
        if self.parameters.utility == "uniform" and experts % old:
            raise UsageError(
                f"{experts} experts are no multiple of {old}: they cannot all be copied equally often",
                hint=f"--experts {-(-experts // old) * old}, or --param utility=norm",
            )
        if self.parameters.utility != "uniform" and experts - old > most * old:
            raise UsageError(
                f"{experts - old} added experts are more than {most} copies of each of {old}",
                hint=f"--experts {old * (most + 1)}, or --param most_copies={-(-(experts - old) // old)}",
            )

    def _promise(self, model: MoeModel, experts: int, top_k: int) -> Promise:
        """See the class."""
        times, rest = divmod(experts, model.experts)
        if self.parameters.utility != "uniform" or rest or model.family.sparse_mixer:
            why = f"experts that are copied more often take more of the {top_k} slots"
            mixed = "SparseMixer chooses copies of one expert, and divides the first weight among them"
            return "approximate", mixed if model.family.sparse_mixer else why
        same = _same_as(model, times, top_k)
        if not same and model.sigmoid and not model.normalized:
            return "approximate", "weights that are not normalised add up to more with every copy"
        if same != model.top_k:
            as_if = f", as in the source with top-{same}" if same else ""
            return "approximate", f"copies of one expert share the {top_k} slots{as_if}"
        if times > 1 and not model.sigmoid and model.biased:
            return (
                "approximate",
                "routers add a bias to scores that copies share: it counts more beside what each has left",
            )
        if self.parameters.noise:
            return (
                "approximate",
                f"the added copies' router rows have noise of {self.parameters.noise:g} of their deviation",
            )
        return "exact", f"the {top_k} chosen are all copies of the {model.top_k} that the source chooses"

    def _warnings(self, model: MoeModel, experts: int, top_k: int) -> tuple[str, ...]:
        if self.parameters.noise:
            return ()
        return ("noise=0: copies that are chosen together get the same gradient, and stay the same in training",)

    def memory(self, source: Described, recipe: Recipe) -> int:
        """Return the bytes of the model in fp32, and of the experts' gradients where the utility needs them."""
        if self.text_for is None:
            return 0
        from upcycle.methods.growing.expert_utility import needed_memory

        model = MoeModel.read(source.raw, source.specs, source.where)
        window = min(recipe.calibration.window, model.context)
        return needed_memory(model, window, gradients=self.parameters.utility != "load")

    def choose(
        self, checkpoint: MoeCheckpoint, recipe: Recipe, windows: torch.Tensor | None, progress: Progress
    ) -> tuple[CopiedExperts, dict[str, Any]] | None:
        """Choose the most useful experts of every layer for copying."""
        utility = self.parameters.utility
        if utility == "uniform":
            return None
        from upcycle.methods.growing.expert_utility import expert_utility

        model = checkpoint.model
        found = expert_utility(checkpoint, utility, windows, progress)
        choice = {layer: tuple(self.chosen(found[layer], recipe.experts)) for layer in model.moe_layers}
        return choice, {"utility": {str(layer): found[layer].tolist() for layer in choice}}

    def chosen(self, utility: np.ndarray, experts: int) -> list[int]:
        """Return, for each of ``experts``, the source's expert that it copies, given one layer's utility, fp64 ``[E]``."""
        best_first = np.argsort(-utility, kind="stable")
        added = np.repeat(best_first, self.parameters.most_copies)[: experts - len(utility)]
        return [*range(len(utility)), *added.tolist()]


def _same_as(model: MoeModel, times: int, top_k: int) -> int:
    """Return the top-k of the source whose function ``times`` copies of every expert have with ``top_k``; 0: there is none.

    Copies of one expert, without noise, have the same score and are chosen together. If weights are renormalised, the copies
    share its weight, however many are chosen. Of a softmax over all experts each copy has its share, so that all copies must be
    chosen. Sigmoid scores are not shared: a second copy adds the expert once more.
    """
    if model.normalized and top_k <= times:
        return 1
    if model.sigmoid and not model.normalized:
        return int(top_k == 1)
    return 0 if top_k % times else top_k // times
