"""The parts of a conversion recipe: router, calibration, reconstruction, sources and verification."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from upcycle.plugins import StrictSettings
from upcycle.text.reading.plain_text import SELF_WRITTEN

PartName = Literal["auto", "language", "vision", "connector", "all", "text", "encoder", "decoder", "both"]


class RouterRecipe(StrictSettings):
    """Names a router initialiser and its parameters."""

    name: str = Field(
        "auto",
        description="router initialiser, or auto: random for copies; zero, cool or (calibrated) ridge for splits",
    )
    parameters: dict[str, Any] = Field(default_factory=dict, description="the initialiser's own parameters")


class RoutingRecipe(StrictSettings):
    """Names a routing rule: which experts run for a token, and what they weigh. All but plain top-k need upcycle_moe."""

    rule: Literal["top_k", "dynamic_k", "threshold", "relu", "expert_choice", "causal_choice"] = Field(
        "top_k",
        description="top_k experts; dynamic_k: all whose predicted norm is near the largest (D2DMoE); threshold on the softmax "
        "(DS-MoE); relu: all with a positive logit, at that weight (ReMoE); expert_choice: experts choose tokens (encoders only); "
        "causal_choice: those predicted to choose the token, after training (upcycle train causal_choice). "
        "All but top_k as it is here need --target upcycle_moe",
    )
    scores: Literal["softmax", "sigmoid", "ones"] | None = Field(
        None,
        description="of top_k: what an expert weighs, before it is normalized; ones: all the same (default softmax)",
    )
    normalized: bool | None = Field(
        None,
        description="of top_k and expert_choice: whether the chosen experts' weights are divided by their sum (default: true)",
    )
    spread: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="of top_k: bring every token's logits to mean 0 and this standard deviation first (Skywork-MoE: 1)",
    )
    tau: float | None = Field(
        None,
        ge=0,
        le=1,
        description="of dynamic_k: experts run from tau times the largest predicted norm on; 0: all (default 0.5)",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="of threshold: experts run whose softmax times their number is above it; 0: all (default 0.48); of causal_choice: "
        "those more probable to choose the token; 0: all (default 0.5)",
    )

    capacity_factor: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="of expert_choice and causal_choice: how many experts take a token, in the mean; as many as there are: all "
        "(default 2)",
    )
    group: Literal["sequence", "batch"] | None = Field(
        None,
        description="of expert_choice: the tokens among which an expert chooses: of a sequence (or image), or of the whole batch, "
        "as in the paper (default sequence)",
    )

    @property
    def parameters(self) -> dict[str, Any]:
        """The rule's own parameters that are given, by name."""
        return {key: value for key, value in vars(self).items() if key != "rule" and value is not None}

    @model_validator(mode="after")
    def _parameters_of_rule(self) -> RoutingRecipe:
        known: dict[str, tuple[str, ...]] = {
            "top_k": ("scores", "normalized", "spread"),
            "dynamic_k": ("tau",),
            "threshold": ("threshold",),
            "relu": (),
            "expert_choice": ("capacity_factor", "group", "normalized"),
            "causal_choice": ("capacity_factor", "threshold"),
        }
        if odd := sorted(set(self.parameters) - set(known[self.rule])):
            has = f"it has {', '.join(known[self.rule])}" if known[self.rule] else "it has none"
            raise ValueError(f"'{odd[0]}' is no parameter of the rule {self.rule}: {has}")
        return self


class CalibrationRecipe(StrictSettings):
    """Names the text on which methods, routers and refits are calibrated."""

    text: str | list[str] | None = Field(
        None,
        description="calibration text: UTF-8 text, rows (.jsonl, .json, .csv, .parquet), hub datasets, demo, or self (the model "
        "writes it); several are mixed evenly, self and all others half and half; for models that read images or sounds, folders of "
        "them or hub datasets; for images and text, both",
    )
    tokens: int = Field(65536, ge=16, description="calibration tokens")
    window: int = Field(512, ge=8, description="tokens per calibration window")
    mode: Literal["auto", "parallel", "sequential"] = Field(
        "auto",
        description="inputs from the dense model (parallel), or from the converted layers below (sequential; auto: for sparse splits)",
    )
    column: str = Field(
        "text",
        description="column of a dataset or file of rows that holds the text (or image, or audio: these by default)",
    )
    target: str | None = Field(
        None,
        description="column of a dataset or file of rows with what the decoder of a model of two texts writes (default: it reads the "
        "encoder's text), or what is said in a sound or shown in an image (default for datasets: text)",
    )

    @field_validator("text", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) and "," in value else value

    @property
    def texts(self) -> list[str]:
        """The texts as a list; empty when there is no calibration."""
        return [self.text] if isinstance(self.text, str) else self.text or []

    @property
    def own(self) -> bool:
        """Whether the model writes some of the text itself."""
        return SELF_WRITTEN in self.texts


class ReconstructionRecipe(StrictSettings):
    """Says how refit: blocks trains each layer."""

    passes: int = Field(4, ge=1, le=1000, description="how often every layer is trained on all calibration tokens")
    batch: int = Field(1024, ge=16, description="tokens per step")
    rate: float = Field(
        0.02,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="highest learning rate, as a fraction of each matrix's root mean square",
    )


class SourceRecipe(StrictSettings):
    """Describes one of several sources."""

    name: str = Field(description="local folder, hub id, or .gguf file")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="weight in the average of tensors that belong to no expert"
    )
    positive_prompts: list[str] = Field(
        default_factory=list, description="texts that its expert should get (routers hidden, cheap_embed)"
    )
    negative_prompts: list[str] = Field(default_factory=list, description="texts that its expert should not get")
    text: str | list[str] | None = Field(None, description="UTF-8 sample texts of its domain (router domain_ridge)")
    shared: bool = Field(False, description="its expert is always on beside the routed ones, at full weight")
    scale: float = Field(1.0, gt=0, allow_inf_nan=False, description="factor on the output of its expert")
    noise: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="standard deviation of normal noise on its expert's gate, up and down",
    )

    @property
    def role(self) -> str | None:
        """The first key that makes its expert something else than its FFN as a routed expert; None where there is none."""
        usual = {"shared": False, "scale": 1.0, "noise": 0.0}
        return next((key for key, value in usual.items() if getattr(self, key) != value), None)

    @property
    def texts(self) -> list[str]:
        """The sample texts as a list."""
        return [self.text] if isinstance(self.text, str) else self.text or []


class VerificationRecipe(StrictSettings):
    """Says how the result is verified."""

    enabled: bool = Field(True, description="compare the result with the dense model after converting")
    text: str | None = Field(
        None,
        description="UTF-8 text file to verify on, or folder of images; default: the embedded validation texts, or what was held out",
    )
    tokens: int = Field(1024, ge=16, description="tokens to verify on")
