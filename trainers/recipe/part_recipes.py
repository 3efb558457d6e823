"""Parameters of single parts of training: alarms, balance, router control, distillation, parameter groups."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field, model_validator

from upcycle.plugins import PluginParameters


class AlarmParameters(PluginParameters):
    """When each alarm is raised."""

    dead_steps: int = Field(100, ge=1, description="an expert is dead after so many steps in a row without a token")
    collapse_entropy: float = Field(
        0.2,
        ge=0,
        le=1,
        description="the load entropy, from 0 (k experts take all tokens) to 1 (uniform), below which a router is suspect",
    )
    collapse_steps: int = Field(
        20, ge=1, description="a router has collapsed after so many steps in a row below collapse_entropy"
    )
    identical_after: int = Field(1000, ge=0, description="the step from which on experts should differ")
    identical_cosine: float = Field(
        0.999, gt=0, le=1, description="experts are still copies if their mean pairwise cosine is above this"
    )
    spike_window: int = Field(50, ge=5, description="number of last losses that a spike is compared with")
    spike_deviations: float = Field(
        6.0,
        gt=0,
        description="a loss is a spike if it is so many standard deviations (from median deviations) above their median",
    )


class BiasBalanceParameters(PluginParameters):
    """Parameters of :class:`BiasBalance`."""

    rate: float = Field(0.001, gt=0, description="how far an expert's bias moves per optimizer step")


class ControlParameters(PluginParameters):
    """Parameters of :class:`RouterControl`; by default it does nothing."""

    jitter: float = Field(
        0.0, ge=0, lt=1, description="multiply the router's input by random numbers from U(1 - jitter, 1 + jitter)"
    )
    noise: Literal["none", "fixed", "learned"] = Field(
        "none",
        description="normal noise on the logits: of a fixed size, or of a size learned per token and expert (Shazeer)",
    )
    noise_std: float | None = Field(None, gt=0, description="size of fixed noise [default: 1/E, as in vision MoE]")
    noise_floor: float = Field(0.01, ge=0, description="the smallest learned size")
    normalize_logits: float | None = Field(
        None,
        gt=0,
        description="normalise each token's logits to mean 0 and this standard deviation, in validation, too (Skywork-MoE: 1)",
    )
    accept_unexported: bool = Field(
        False,
        description="normalise logits although no stock architecture can: the exported model then computes something else",
    )
    second: Literal["always", "random", "sampled"] = Field(
        "always",
        description="a token's experts after its first: all of top-k, each at random with a chance of twice its share of the weight "
        "(GShard), or sampled in proportion to their scores (DeepSpeed)",
    )
    choice: Literal["top_k", "soft", "sample", "expert_choice"] = Field(
        "top_k",
        description="BTX's routers: top_k as the model has it; soft: all experts, in validation, too; sample: in training one, drawn "
        "by Gumbel noise (Sample-Top-1). Or expert_choice: in training, experts choose the tokens of a row; for models of the rule "
        "causal_choice, beside the loss choice_prediction",
    )
    temperature_rate: float = Field(
        1e-4, ge=0, description="of sample: the temperature is exp(-rate * steps of the stage), from 1 on"
    )
    least_temperature: float = Field(0.5, gt=0, le=1, description="of sample: the temperature's lower end")
    soft_first: bool = Field(False, description="of sample: soft in the first MoE layer, as in the paper")
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="an expert takes up to this times n K / E choices of n tokens; the others are dropped [default: no limit]",
    )
    evaluation_capacity_factor: float | None = Field(
        None, gt=0, description="the same in validation [default: no limit, as in the exported model]"
    )
    capacity_group: Literal["row", "pass"] = Field(
        "row",
        description="the tokens that share a capacity: those of a row, however the batch is divided, or all of a rank's pass "
        "(DeepSpeed, Megatron-LM)",
    )
    drop: Literal["position", "probability"] = Field(
        "position",
        description="which choices are dropped: those of the last tokens, second choices before first ones, or those of least weight",
    )
    renormalize: bool = Field(
        False, description="scale the choices that a token keeps up to the weight that all of them had (DeepSpeed)"
    )
    min_capacity: int = Field(4, ge=1, description="an expert takes at least this many choices")
    expert_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="in training, every routed expert drops this share of its neurons, for every token anew (Switch: 0.4, Flan-MoE)",
    )
    cluster_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="in training, no token chooses this share of the experts of every cluster; at least one of each is left (MoEC: "
        "0.5)",
    )
    clusters: int = Field(2, ge=1, description="of cluster_dropout: groups of consecutive experts of one size")
    cluster_steps: int = Field(
        250, ge=1, description="of cluster_dropout: after so many steps other experts are dropped"
    )
    dense_gradients: bool = Field(
        False,
        description="compute all experts, so that routers get the gradient that they would have if all ran; the output is that of the "
        "chosen ones (DenseMixer)",
    )

    @model_validator(mode="after")
    def _one_choice(self) -> ControlParameters:
        of_sample = ("temperature_rate", "least_temperature", "soft_first")
        if self.choice != "sample" and (odd := [name for name in of_sample if self._changed(name)]):
            raise ValueError(f"{odd[0]} is of choice: sample, and choice is {self.choice}; leave it out")
        if self.choice != "top_k":
            others = {
                "noise": self.noise != "none",
                "second": self.second != "always",
                "capacity_factor": self.capacity_factor is not None or self.evaluation_capacity_factor is not None,
                "cluster_dropout": self.cluster_dropout > 0,
            }
            if given := [name for name, found in others.items() if found]:
                raise ValueError(
                    f"{given[0]} changes a choice of top-k, and choice is {self.choice}; leave one of them out"
                )
        return self

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def check_taught(self, losses: Collection[str], stage: str) -> None:
        """Refuse expert choice without the loss that teaches routers to predict it, and the loss without expert choice.

        Raises:
            ValueError: see above; it names the ``stage``.
        """
        if (self.choice == "expert_choice") != ("choice_prediction" in losses):
            raise ValueError(
                f"stage '{stage}': control.choice expert_choice and losses.choice_prediction go together: the loss teaches the "
                "routers that take expert choice's place when text is written"
            )


class DistillationParameters(PluginParameters):
    """Which outputs of the parent the student learns to match, and how much each counts."""

    logits: float = Field(
        1.0, ge=0, description="weight of the KL divergence from the parent's next-token distribution"
    )
    temperature: float = Field(1.0, gt=0, description="divides both models' logits; the KL is multiplied by its square")
    hidden: float = Field(0.0, ge=0, description="weight of the relative squared error of every layer's output")
    ffn: float = Field(0.0, ge=0, description="weight of the relative squared error of every FFN's output")
    next_token: float = Field(1.0, ge=0, description="weight of the usual next-token loss")
    preference: float = Field(
        0.0,
        ge=0,
        description="weight of the loss that prefers better answers by more than the parent does (LLaVA-MoD, DPO)",
    )
    beta: float = Field(0.1, gt=0, description="of preference: how much a difference of log probabilities counts")


class ExpertTargetParameters(PluginParameters):
    """Losses that teach routers what their experts would output."""

    prior_approximate: float = Field(
        0.0,
        ge=0,
        description="weight of FactorLLM's loss: choose the experts whose outputs are nearest to the parent's FFN",
    )
    prior_balance: float = Field(
        0.0,
        ge=0,
        description="weight of FactorLLM's balance loss: the mean over experts of the chosen ones' probabilities",
    )
    output_norms: float = Field(
        0.0, ge=0, description="weight of D2DMoE's loss: predict the norms of the experts' outputs from the logits"
    )
    router_tolerance: float = Field(
        0.01,
        gt=0,
        le=1,
        description="unit of the logits that these losses read: the papers weigh all chosen experts equally, and logits that differ "
        "by no more than about this do so nearly, too",
    )
    expert_scale: float | None = Field(
        None,
        gt=0,
        description="factor by which the conversion multiplied routed experts [default: from its record]",
    )

    @property
    def taught(self) -> list[str]:
        """Names of the losses whose weight is not 0."""
        return [name for name in ("prior_approximate", "prior_balance", "output_norms") if getattr(self, name)]


class MaskParameters(PluginParameters):
    """How what is new in a grown model is unmasked."""

    steps: int = Field(ge=1, description="optimizer steps over which the masks rise from 0 to 1, in a straight line")


class GroupParameters(PluginParameters):
    """Learning rates and weight decay of the parts of a model."""

    learning_rate: float = Field(gt=0, description="peak learning rate")
    router: float = Field(1.0, ge=0, description="factor on the learning rate of routers")
    experts: float = Field(1.0, ge=0, description="factor on the learning rate of routed experts")
    rest: float = Field(1.0, ge=0, description="factor on the learning rate of everything else")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices (vectors have none)")
    router_weight_decay: float | None = Field(None, ge=0, description="weight decay of routers [default: weight_decay]")
