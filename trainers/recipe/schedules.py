"""Learning-rate schedules: pure functions of the step, which give a factor on the peak learning rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from upcycle.plugins import StrictSettings

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

ScheduleKind = Literal["constant", "cosine", "wsd", "inverse_sqrt"]


class Schedule(StrictSettings):
    """A schedule with its numbers. Called with a step, counted from 0, it returns the factor of that step.

    - ``constant``: 1.
    - ``cosine``: half a cosine from 1 at the end of the warm-up to ``floor`` at the last step (arXiv 1608.03983).
    - ``wsd``: 1, then over the last ``decay`` of the steps down to ``floor`` (MiniCPM, arXiv 2404.06395), linearly or as
      ``1 - sqrt``.
    - ``inverse_sqrt``: 1 until ``timescale``, then ``sqrt(timescale / (position + step))`` (T5, arXiv 1910.10683). Sparse Upcycling
      (arXiv 2212.05055) continues at the dense run's step count, which is ``position``.

    A warm-up multiplies this by ``(step + 1) / warmup`` until that is 1, so that the first step is not 0. Steps after the last one
    keep its factor.
    """

    kind: ScheduleKind = Field("cosine", description="constant, cosine, wsd or inverse_sqrt")
    steps: int = Field(ge=1, description="optimizer steps of the stage")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    floor: float = Field(0.1, ge=0, le=1, description="the last factor of cosine and wsd")
    decay: float = Field(0.2, gt=0, le=1, description="wsd: the fraction of all steps that decays")
    shape: Literal["linear", "sqrt"] = Field("linear", description="wsd: how it decays")
    position: int = Field(0, ge=0, description="inverse_sqrt: optimizer steps that the dense run has done")
    timescale: int = Field(
        10_000, ge=1, description="inverse_sqrt: the factor is 1 up to this step, counted with position"
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> Schedule:
        if self.warmup >= self.steps and self.warmup:
            raise ValueError(f"warmup {self.warmup} must be less than steps {self.steps}")
        return self

    def __call__(self, step: int) -> float:
        """The factor of optimizer step ``step``, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return warm * self._body(min(step, self.steps - 1))

    def _body(self, step: int) -> float:
        if self.kind == "inverse_sqrt":
            return math.sqrt(self.timescale / max(self.timescale, self.position + step))
        if self.kind == "constant":
            return 1.0
        last = self.steps - 1
        if self.kind == "cosine":
            done = _fraction(step, self.warmup, last)
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2
        done = _fraction(step, last - round(self.decay * self.steps), last)
        return 1 - (1 - self.floor) * (math.sqrt(done) if self.shape == "sqrt" else done)

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """A scheduler for torch and DeepSpeed; every parameter group keeps its own peak learning rate."""
        from torch.optim.lr_scheduler import LambdaLR

        return LambdaLR(optimizer, self.__call__)


def _fraction(step: int, first: int, last: int) -> float:
    """How far ``step`` is on the way from ``first`` (0) to ``last`` (1); clamped to this range."""
    return min(1.0, max(0.0, (step - first) / max(1, last - first)))


class Preset(BaseModel):
    """A published way to set the learning rate after upcycling, relative to the dense run's."""

    model_config = ConfigDict(frozen=True)

    what: str
    paper: str
    peak_of_dense_peak: float  # factor on the dense run's peak learning rate
    kind: ScheduleKind
    floor: float


# NVIDIA's 2B model was pre-trained from 2e-4 down to 2e-5, hence the floors; the end that the paper prints for its 15B run does not
# agree with its start. Skywork's study (300M parameters, dense 3e-3 -> 3e-4) found 1.8e-3 good from a checkpoint of 100B tokens and
# 1.2e-3 from one of 300B, and the dense run's last 3e-4 worst. It does not give a floor, so that of its dense run is taken.
PRESETS = {
    "nvidia": Preset(
        what="back to the pre-training peak, then a cosine down to where the dense run ended (a tenth of it)",
        paper="https://arxiv.org/abs/2410.07524",
        peak_of_dense_peak=1.0,
        kind="cosine",
        floor=0.1,
    ),
    "nvidia_half": Preset(
        what="back to half the pre-training peak, as good on their 2B model",
        paper="https://arxiv.org/abs/2410.07524",
        peak_of_dense_peak=0.5,
        kind="cosine",
        floor=0.2,
    ),
    "skywork_early": Preset(
        what="from a dense checkpoint early in its decay: 0.6 of the dense peak",
        paper="https://arxiv.org/abs/2406.06563",
        peak_of_dense_peak=0.6,
        kind="cosine",
        floor=1 / 6,
    ),
    "skywork_late": Preset(
        what="from a dense checkpoint that was trained to the end: 0.4 of the dense peak",
        paper="https://arxiv.org/abs/2406.06563",
        peak_of_dense_peak=0.4,
        kind="cosine",
        floor=1 / 4,
    ),
    "sparse_upcycling": Preset(
        what="no reset: the dense run's inverse square root continues at its step count (set position)",
        paper="https://arxiv.org/abs/2212.05055",
        peak_of_dense_peak=1.0,
        kind="inverse_sqrt",
        floor=0.0,
    ),
}


def preset(name: str, dense_peak: float, steps: int, warmup: int = 0, position: int = 0) -> tuple[float, Schedule]:
    """The peak learning rate and the schedule of a published recipe.

    Args:
        name: one of ``PRESETS``.
        dense_peak: the dense run's peak learning rate.
        steps: optimizer steps to train.
        warmup: steps of linear warm-up.
        position: optimizer steps of the dense run, for the schedule that continues it.

    Raises:
        UsageError: there is no such preset.
    """
    from upcycle.errors import UsageError
    from upcycle.registry import suggestion

    if name not in PRESETS:
        raise UsageError(f"unknown learning-rate preset '{name}'", hint=suggestion(name, PRESETS))
    chosen = PRESETS[name]
    schedule = Schedule(kind=chosen.kind, steps=steps, warmup=warmup, floor=chosen.floor, position=position)
    return dense_peak * chosen.peak_of_dense_peak, schedule
