"""Qwen2-57B-A14B's initialisation: narrow experts cut from shuffled copies of the dense FFN, half of each re-initialised."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.base import PREFERRED_MULTIPLE, Scale
from upcycle.methods.copying.base import Copies, CopiesParameters, chosen_mask, part_of, seeded


class QwenFineGrainedParameters(CopiesParameters):
    """Parameters of :class:`QwenFineGrained`."""

    segments: int = Field(4, ge=1, description="experts that one copy of the FFN is cut into")
    expert_size: int = Field(0, ge=0, description="neurons per expert, instead of segments; 0: F / segments")
    reset: float = Field(0.5, ge=0, le=1, description="share of every expert's neurons that are re-initialised")
    std: float | None = Field(
        None, gt=0, description="standard deviation of the new weights; default: the model's initializer_range"
    )


class QwenFineGrained(Copies):
    """Implements the recipe of the Qwen2 technical report (arXiv 2407.10671) for Qwen2-57B-A14B, and Qwen1.5-MoE's layout.

    ``r = ceil(n h_E / F)`` copies of the FFN, each with its neurons in a random order of its own, are laid one after
    another and cut into n experts of ``h_E`` neurons; the rest is dropped. Half of each expert (``reset``) is re-initialised.
    Qwen1.5-MoE's layout is ``--shared 4 --experts 60 --top-k 4``. Its authors speak of 64 experts, so n counts the shared
    ones, too: they are cut from the same copies.

    How we read what is not published: the half are whole neurons, and their weights are normal with mean 0 and the
    configuration's ``initializer_range``; shared experts are treated like the others; nothing is scaled (``paper``, the
    default). ``--scale exact`` is F/h_E, which makes the routed part as strong as the dense FFN on average; with shared
    experts beside it, the sum is stronger than that.

    Deviation: the chosen experts' weights are renormalised unless ``gate=softmax``, which is what Qwen's models have.
    """

    name = "qwen_fine_grained"
    title = "Qwen's fine-grained upcycling"
    paper = "https://arxiv.org/abs/2407.10671"
    default_scale = "paper"
    exact_when_all_active = False
    exact_with_any_router = False
    Parameters = QwenFineGrainedParameters
    parameters: QwenFineGrainedParameters

    def __init__(self, parameters: QwenFineGrainedParameters) -> None:
        super().__init__(parameters)
        self.draws = parameters.reset > 0

    def inexact(self, shape: MoeShape, scale: float) -> str:
        """Name the shuffled pieces: only by coincidence do they add up to the dense FFN."""
        drawn = f", {self.parameters.reset:.0%} of each re-initialised" if self.draws else ""
        return f"experts are random pieces of shuffled copies{drawn}"

    def expert_size(self, intermediate_size: int, experts: int, shared: int, pad: bool) -> int:
        """Return ``F / segments``, rounded up to a multiple of 8 when padding is allowed, or what the parameter says.

        Raises:
            UsageError: both parameters are given, the width does not divide, or an expert would be wider than the FFN.
        """
        size, segments = self.parameters.expert_size, self.parameters.segments
        if size and "segments" in self.parameters.model_fields_set:
            raise UsageError("segments and expert_size say the same thing twice", hint="leave one of them out")
        if size > intermediate_size or segments > intermediate_size:
            what = f"expert_size = {size}" if size else f"segments = {segments}"
            raise UsageError(f"{what}: the FFN has {intermediate_size} neurons", hint="choose a smaller number")
        if size:
            return size
        if pad:
            return -(-intermediate_size // (segments * PREFERRED_MULTIPLE)) * PREFERRED_MULTIPLE
        if intermediate_size % segments:
            raise UsageError(
                f"{intermediate_size} neurons do not divide into {segments} segments",
                hint="--pad (wider experts, filled from the next copy), or --param expert_size=...",
            )
        return intermediate_size // segments

    def scale(self, convention: Scale, experts: int, top_k: int, shared: int = 0) -> float:
        """Return 1 for ``paper`` and F/h_E for ``exact``; see the class."""
        super().scale(convention, experts, top_k, shared)
        if convention == "paper":
            return 1.0
        if self.parameters.expert_size:
            raise UsageError(
                "--scale exact is the number of segments, and expert_size is given instead",
                hint="--param segments=..., or --scale with a number",
            )
        return float(self.parameters.segments)

    def blueprint(
        self,
        ffn: FeedForward,
        shape: MoeShape,
        scale: float,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> LayerBlueprint:
        """Cut the shuffled copies into experts, the shared ones first, and mark which neurons are re-initialised."""
        size, pieces = shape.expert_size, shape.shared + shape.experts
        copies = -(-pieces * size // ffn.intermediate_size)
        pool = torch.cat([torch.randperm(ffn.intermediate_size, generator=rng) for _ in range(copies)])
        count = part_of(self.parameters.reset, size)

        def fresh() -> torch.Tensor | None:
            return chosen_mask(size, count, rng).expand(3, -1).contiguous() if count else None

        specs = tuple(ExpertSpec(neurons, fresh()) for neurons in pool[: pieces * size].split(size))
        draws = seeded(rng, std=self.parameters.std, initializer=True) if count else None
        return LayerBlueprint(ffn.layer, specs[shape.shared :], shape.top_k, scale, specs[: shape.shared], draws=draws)
