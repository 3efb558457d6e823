"""Forecasts how long a conversion takes, phase by phase, from about a second of measurements on this machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from upcycle.conversion.jobs import job_of
from upcycle.errors import UpcycleError
from upcycle.evaluation.forecast.probes import (
    LayerTimes,
    byte_times,
    comparison_seconds,
    layer_times,
    product_seconds,
    too_wide,
)
from upcycle.formatting import duration
from upcycle.hardware.clocks import clock
from upcycle.planning.cost import MOST_CACHE_BYTES
from upcycle.planning.job import method_of
from upcycle.planning.open_sources import all_local, open_sources
from upcycle.progress import SILENT
from upcycle.text.reading.plain_text import SELF_WRITTEN

if TYPE_CHECKING:
    from upcycle.conversion.job import ConversionJob
    from upcycle.planning.cost import Plan
    from upcycle.planning.expert_job import ExpertJob
    from upcycle.recipe.conversion_recipe import Recipe

_FORECAST = ("copies", "partition", "overlap")  # kinds of methods, whose jobs put experts in the place of FFNs
WORTH_IT = 1e12  # parameters times calibration tokens: some ten seconds on a small processor
_BESIDE = 1.25  # norms, rotations, softmax and sums beside a layer's matrix products
_STREAMS = 5  # vectors that a calibrated layer writes and reads back for every token
_PASSES = 4  # over activations that are too large to be kept


@dataclass(frozen=True)
class Forecast:
    """Holds seconds by phase, as progress bars name them; ``unknown`` says why there are none."""

    phases: dict[str, float]
    unknown: str | None = None

    @property
    def seconds(self) -> float:
        """Return the sum of all phases."""
        return sum(self.phases.values())


def timed_job(recipe: Recipe) -> tuple[ConversionJob, float]:
    """Plan a conversion; return its job, and how long that took, which the conversion does, too.

    Raises:
        UpcycleError: whatever the conversion would refuse before reading weights.
    """
    now = clock()
    start = now()
    job = job_of(recipe)
    return job, now() - start


def forecast(job: ConversionJob, opening: float = 0.0) -> Forecast:
    """Forecast a conversion. The text that it reads is read here, and that is timed; a download is not forecast.

    Args:
        job: the conversion.
        opening: seconds that planning it took.

    Raises:
        UpcycleError: the text cannot be read.
    """
    if method_of(job.recipe).kind not in _FORECAST:
        return Forecast({}, "only copies and splits are")
    divided = cast("ExpertJob", job)
    if reason := _unlike(divided):
        return Forecast({}, reason)
    now = clock()
    start = now()
    tokens = _calibration_tokens(divided)
    return Forecast({"opening": opening + now() - start, **_phases(divided, tokens)})


def forecast_of(recipe: Recipe, least: float) -> Forecast | None:
    """Forecast a conversion; None where it cannot be planned, as the conversion itself will say, or is shorter than it is worth.

    Args:
        recipe: the conversion's.
        least: parameters times calibration tokens from which it is forecast.
    """
    try:
        job, opening = timed_job(recipe)
        plan = job.cost()
        return forecast(job, opening) if plan.parameters_dense * plan.calibration_tokens >= least else None
    except UpcycleError:
        return None


def forecast_in_words(found: Forecast) -> str:
    """Return a forecast in words."""
    parts = ", ".join(f"{title} {duration(seconds)}" for title, seconds in found.phases.items())
    return f"{duration(found.seconds)} ({parts})"


def calibrating_seconds(job: ExpertJob, tokens: int) -> float | None:
    """Forecast the calibration of one job on so many tokens; None where nothing is known of its time."""
    if _unlike(job):
        return None
    product = product_seconds(512, job.dense.hidden_size, job.dense.intermediate_size)
    return _calibrating(job, tokens, _attention(job, product), layer_times(job), byte_times().streamed)


def _unlike(job: ExpertJob) -> str | None:
    """Return what is unlike in a conversion, where nothing is known of its time."""
    family, calibrated = job.family, job.calibrated
    reasons = {
        "what several sources or attention's projections take is not forecast": job.members
        or job.undecided
        or job.sampled
        or job.projections
        or job.router.walks,
        "only decoders of text are forecast": job.shape.sizes
        or family.reads != "text"
        or family.encoder
        or family.pauses,
        "a pass backward through the model is not forecast": calibrated and job.method.needs_gradients,
        "text that the model writes itself is not forecast": calibrated
        and SELF_WRITTEN in job.recipe.calibration.texts,
        "its layers are too wide to be timed in a moment": calibrated and too_wide(job),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _calibration_tokens(job: ExpertJob) -> int:
    """Return how many tokens the calibration texts hold, of those that are wanted."""
    if not job.calibrated:
        return 0
    if not all_local(job.recipe):
        return job.recipe.calibration.tokens
    from upcycle.calibration.read_tokens import calibration_windows

    windows, _ = calibration_windows(job, open_sources(job.recipe, job.method), SILENT)
    return 0 if windows is None else windows.numel()


def _phases(job: ExpertJob, tokens: int) -> dict[str, float]:
    plan, dense = job.cost(), job.dense
    times = layer_times(job)
    product = product_seconds(512, dense.hidden_size, dense.intermediate_size)
    moved = byte_times()
    attention = _attention(job, product)
    found = {}
    if tokens:
        found["calibrating"] = _calibrating(job, tokens, attention, times, moved.streamed)
    found["converting"] = plan.bytes_output * (moved.written + moved.streamed / 2)
    if job.recipe.verification.enabled:
        found["verifying"] = _verifying(job, plan, attention, times.ffn, product, moved.loaded)
    return found


def _attention(job: ExpertJob, product: float) -> float:
    """Return the seconds per token of a layer without its FFN."""
    dense, layer = job.dense, job.shape.moe_layers[0]
    weights = sum(math.prod(shape) for shape in job.family.stored_specs(dense, layer).values())
    form = job.shape.at(layer).form
    ffn = len(form.matrices) * dense.hidden_size * dense.intermediate_size
    scores = 2 * job.recipe.calibration.window * dense.num_attention_heads * dense.head_dim
    return _BESIDE * product * (max(0, weights - ffn) + scores)


def _calibrating(job: ExpertJob, tokens: int, attention: float, times: LayerTimes, streamed: float) -> float:
    """Return the seconds of a calibration up to the last layer that becomes experts."""
    dense = job.dense
    moved = 4 * dense.hidden_size * streamed
    plain = attention + times.ffn + moved
    decided = attention + times.ffn + times.token + _STREAMS * moved
    if job.calibration_mode == "sequential":  # the dense model runs beside the converted one
        decided += attention
    if 4 * tokens * (dense.hidden_size + dense.intermediate_size) > MOST_CACHE_BYTES:
        decided += _PASSES * times.ffn
    converted = len(job.shape.moe_layers)
    others = max(job.shape.moe_layers) + 1 - converted
    return tokens * (converted * decided + others * plain) + converted * times.fixed


def _verifying(job: ExpertJob, plan: Plan, attention: float, ffn: float, product: float, loaded: float) -> float:
    """Return the seconds of reading a text with both models, and of loading them."""
    dense = job.dense
    others = dense.num_hidden_layers * attention + product * dense.hidden_size * dense.vocab_size
    passing = others + dense.num_hidden_layers * ffn
    converted = passing * plan.flops_per_token / plan.flops_per_token_dense
    compared = comparison_seconds(dense.vocab_size) * dense.vocab_size
    texts = 2 if job.calibrated and job.promise[0] == "approximate" else 1  # of another kind, too
    blocks = max(0.0, converted - others)  # which run a second time, on the dense model's inputs
    loading = (plan.bytes_dense + plan.bytes_output) * loaded
    return job.recipe.verification.tokens * (texts * (passing + converted + compared) + blocks) + loading
