"""The parts of a training recipe that say how one thing is done: alarms, balance, routers, distillation, groups."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from upcycle.plugins import PluginParameters


class AlarmParameters(PluginParameters):
    """When to raise which alarm."""

    dead_steps: int = Field(100, ge=1, description="an expert without a token for so many steps in a row is dead")
    collapse_entropy: float = Field(
        0.2,
        ge=0,
        le=1,
        description="a router whose load entropy, scaled to 0 (k experts do all) to 1 (uniform), is below",
    )
    collapse_steps: int = Field(20, ge=1, description="this for so many steps in a row has collapsed")
    identical_after: int = Field(1000, ge=0, description="from this step on, experts should have parted")
    identical_cosine: float = Field(
        0.999, gt=0, le=1, description="they have not while their mean pairwise cosine is above this"
    )
    spike_window: int = Field(50, ge=5, description="losses that a spike is told from")
    spike_deviations: float = Field(
        6.0, gt=0, description="a loss is a spike this many standard deviations (from the median ones) above the median"
    )


class BiasBalanceParameters(PluginParameters):
    """Parameters of :class:`BiasBalance`."""

    rate: float = Field(0.001, gt=0, description="how far an expert's bias moves per optimizer step")


class ControlParameters(PluginParameters):
    """Parameters of :class:`RouterControl`; by default it does nothing."""

    jitter: float = Field(0.0, ge=0, lt=1, description="the router's input is multiplied by U(1 - jitter, 1 + jitter)")
    noise: Literal["none", "fixed", "learned"] = Field(
        "none",
        description="normal noise on the logits: of one size, or of a size learned per token and expert (Shazeer)",
    )
    noise_std: float | None = Field(None, gt=0, description="size of fixed noise [default: 1/E, as vision MoE]")
    noise_floor: float = Field(0.01, ge=0, description="what learned sizes are never below")
    normalize_logits: float | None = Field(
        None,
        gt=0,
        description="logits are normalised per token to mean 0 and this standard deviation, in validation, too (Skywork-MoE: 1)",
    )
    accept_unexported: bool = Field(
        False, description="normalise logits although no stock architecture stores that: the exported weights differ"
    )
    second: Literal["always", "random", "sampled"] = Field(
        "always",
        description="experts behind a token's first: all of top-k, each with a chance of twice its share of the weight "
        "(GShard), or drawn in proportion to their scores (DeepSpeed)",
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="an expert takes this times n K / E choices of n tokens, others are dropped [default: none]",
    )
    evaluation_capacity_factor: float | None = Field(
        None, gt=0, description="the same in validation [default: none are dropped, as in the exported model]"
    )
    capacity_group: Literal["row", "pass"] = Field(
        "row",
        description="the tokens that share the experts' room: a row, however the batch is divided, or all of a rank's pass "
        "(DeepSpeed, Megatron-LM)",
    )
    drop: Literal["position", "probability"] = Field(
        "position",
        description="who is dropped: the last tokens, all first choices coming before second ones, or those of least weight",
    )
    renormalize: bool = Field(
        False, description="what a token keeps is scaled up to the weight that its choices had together (DeepSpeed)"
    )
    min_capacity: int = Field(4, ge=1, description="an expert takes at least this many choices")


class DistillationParameters(PluginParameters):
    """What the student is told of the parent, and how much each counts."""

    logits: float = Field(
        1.0, ge=0, description="weight of the KL divergence from the parent's next-token distribution"
    )
    temperature: float = Field(
        1.0, gt=0, description="both logits are divided by it; the KL is multiplied by its square"
    )
    hidden: float = Field(0.0, ge=0, description="weight of the relative squared error of every layer's output")
    ffn: float = Field(0.0, ge=0, description="weight of the relative squared error of every FFN's output")
    next_token: float = Field(1.0, ge=0, description="weight of the usual next-token loss beside it")


class ExpertTargetParameters(PluginParameters):
    """How much routers are told of their experts."""

    prior_approximate: float = Field(
        0.0, ge=0, description="weight of FactorLLM's loss: choose the experts that come nearest to the parent's FFN"
    )
    prior_balance: float = Field(
        0.0, ge=0, description="weight of FactorLLM's balance: the mean over experts of the chosen ones' probabilities"
    )
    output_norms: float = Field(
        0.0, ge=0, description="weight of D2DMoE's loss: logits tell the norms of the experts' outputs"
    )
    router_tolerance: float = Field(
        0.01,
        gt=0,
        le=1,
        description="these losses read logits in multiples of it: the papers add chosen experts up unweighted, and logits that "
        "differ by about as much weigh them nearly the same",
    )
    expert_scale: float | None = Field(
        None,
        gt=0,
        description="what the conversion multiplied routed experts by, left out: as its record says",
    )

    @property
    def taught(self) -> list[str]:
        """Those losses that are asked for."""
        return [name for name in ("prior_approximate", "prior_balance", "output_norms") if getattr(self, name)]


class GroupParameters(PluginParameters):
    """Learning rates and weight decay by part of the model."""

    learning_rate: float = Field(gt=0, description="peak learning rate")
    router: float = Field(1.0, ge=0, description="routers train with this times the learning rate")
    experts: float = Field(1.0, ge=0, description="routed experts likewise")
    rest: float = Field(1.0, ge=0, description="everything else likewise")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices; vectors have none")
    router_weight_decay: float | None = Field(None, ge=0, description="that of routers [default: weight_decay]")
