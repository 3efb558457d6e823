"""The part of a recipe that makes experts of attention's projections."""

from __future__ import annotations

from pydantic import Field

from upcycle.plugins import StrictSettings


class ProjectionsRecipe(StrictSettings):
    """Says what becomes of the projections of attention (q, k, v, o) in the converted layers; without experts, nothing."""

    experts: int = Field(
        0,
        ge=0,
        description="of a split by rule dynamic_k: every projection becomes a two-layer ReLU MLP that imitates it, split into so many "
        "experts as FFNs are (D2DMoE); 0: projections stay as they are",
    )
    flops: float = Field(
        1.0, gt=0, le=16, description="size of these MLPs: as many multiplications as so many times the projection"
    )
    tau: float | None = Field(
        None, ge=0, le=1, description="of their rule; 0: all experts run (default: that of routing)"
    )
    hoyer: float = Field(
        0.0,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="coefficient of the loss that makes their neurons sparse while they are trained",
    )
    tokens: int = Field(32768, ge=1, description="trained on about this many calibration tokens, if there are so many")
    epochs: int = Field(20, ge=1, le=1000, description="passes of training over them")
    batch: int = Field(512, ge=1, description="tokens per step")
    rate: float = Field(0.003, gt=0, le=1, allow_inf_nan=False, description="Adam's highest learning rate")
