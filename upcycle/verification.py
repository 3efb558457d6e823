"""Says how equal a converted model is to its dense parent: measured in fp32, on real text, with stock modelling code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax

from upcycle import provenance
from upcycle.activations import activation_function
from upcycle.calibration_text import text_names
from upcycle.checkpoint import Checkpoint, DenseCheckpoint
from upcycle.errors import CheckpointError, UsageError
from upcycle.growth import GrowthJob
from upcycle.job import Job
from upcycle.mixing import MixedCheckpoint, open_sources
from upcycle.planning import AnyJob, job_for
from upcycle.progress import SILENT, Progress
from upcycle.recipe import parse_recipe, read_recipe
from upcycle.runtime import StockModel, available_memory, converted_model, dense_model
from upcycle.stock import load_tokenizer
from upcycle.tensor_files import SafetensorsFolder
from upcycle.text import DEMO_TEXTS, demo_parts, encode, read_text, windows_of

if TYPE_CHECKING:
    from torch.nn import Module

EXACT_TOLERANCE = 1e-5
_WINDOW = 256
_LOGIT_BYTES = 1 << 26
# Unit roundoff: the largest relative error of storing one number.
_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}


@dataclass(frozen=True)
class Verification:
    """What was promised, what was measured, and the verdict. ``as_dict`` has the documented JSON keys.

    Errors are relative: ``||moe - dense|| / ||dense||`` over all tokens. ``all_experts_error`` is the largest error of any
    layer with every expert active, measured where fewer are used, against ``all_experts_reference``: the dense FFN, or where
    several models are mixed the mean of theirs. ``layer_errors`` are those of each block on the
    dense model's own FFN inputs. ``kl`` is the mean KL(dense || moe) of next-token distributions in nats.

    Of a growth step what is called dense is its source; ``compared_tensors`` of its result were found to be the source's
    bit for bit (or what the step says it made of them), which is all of them, and there are no layer errors.
    """

    verdict: Literal["exact", "approximate", "broken"]
    explanation: str
    promise: str
    relative_logit_error: float
    tolerance: float | None
    max_logit_difference: float
    kl: float
    top1_agreement: float
    perplexity_dense: float
    perplexity: float
    layer_errors: list[float]
    all_experts_error: float | None
    all_experts_reference: str
    tokens: int
    text: str
    streamed: bool
    compared_tensors: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self)


def verify(
    out: str | Path,
    *,
    source: str | None = None,
    text: str | None = None,
    tokens: int = 1024,
    progress: Progress = SILENT,
) -> Verification:
    """Verify a folder that :func:`upcycle.convert` wrote, and keep the result in its ``verification.json``.

    Args:
        out: the converted model.
        source: the dense model, when it is no longer where ``recipe.yaml`` says.
        text: UTF-8 file to measure on; default: the embedded validation texts.
        tokens: how many tokens of it.
        progress: where to report.

    Raises:
        CheckpointError: a file is missing or has changed since it was written, or the source is not the one converted.
    """
    folder = Path(out).expanduser()
    record = provenance.read(folder)
    with progress.phase("checking files", 1):
        provenance.check_files(folder, record)
        progress.advance()
    job, checkpoint = reopen(folder, record, source)
    text = text or job.recipe.verification.text
    result = verify_job(job, checkpoint, folder, text, tokens, progress, record.get("training"))
    try:
        provenance.write_verification(folder, result.as_dict())
    except OSError as error:
        progress.note(f"{provenance.VERIFICATION_FILE} cannot be written, and push needs it: {error.strerror}")
    return result


def reopen(folder: Path, record: dict[str, Any], source: str | None = None) -> tuple[AnyJob, Checkpoint]:
    """The job that wrote ``folder`` and the checkpoint it was made from, found again by its recipe and its record.

    Raises:
        UsageError: the source is not there.
        CheckpointError: it is not the one that was converted.
    """
    content = read_recipe(folder / provenance.RECIPE_FILE)
    if source:
        content |= {"source": source, "revision": None}
    elif record["source"]["revision"]:
        content["revision"] = record["source"]["revision"]
    for listed, opened in zip(content.get("sources") or [], record.get("sources") or [], strict=False):
        listed["revision"] = opened["revision"]
    recipe = parse_recipe(content, str(folder / provenance.RECIPE_FILE))
    try:
        checkpoint = open_sources(recipe)
    except UsageError as error:
        raise UsageError(f"the dense model is needed: {error.message}", hint="say where it is with --source") from None
    if checkpoint.fingerprint != record["source"]["fingerprint"]:
        raise CheckpointError(
            f"{recipe.source} is not the checkpoint {folder} was converted from",
            hint="name the right one with --source",
        )
    return job_for(recipe, checkpoint), checkpoint


def verify_job(
    job: AnyJob,
    checkpoint: Checkpoint,
    folder: Path,
    text: str | None,
    tokens: int,
    progress: Progress = SILENT,
    training: dict[str, Any] | None = None,
) -> Verification:
    """Compare ``folder`` with the checkpoint it was made from; ``training`` says how it was trained since, if it was."""
    if isinstance(job, GrowthJob):
        from upcycle.growth_verification import verify_growth

        return verify_growth(job, checkpoint, folder, text, tokens, progress)
    assert isinstance(checkpoint, DenseCheckpoint)
    check_keys(job, folder)
    elements = sum(entry.spec.elements for unit in job.units for entry in unit.entries)
    elements += sum(spec.elements for spec in checkpoint.store.specs.values())
    streamed = 4 * elements > 0.6 * available_memory()
    with progress.phase("loading text and both models", 3):
        ids, label = token_windows(job, checkpoint, text, tokens)
        progress.advance()
        dense = dense_model(checkpoint, job.recipe.dtype, streamed)
        progress.advance()
        moe = converted_model(job, folder, streamed)
        progress.advance()
    layers = _LayerErrors(job, moe, checkpoint)
    totals = Totals()
    batches = ids.split(batch_size(job, ids, streamed))
    with progress.phase("verifying", 2 * len(batches)):
        for batch in batches:
            with layers.measured_on(dense):
                expected = dense.logits(batch)
            progress.advance()
            totals.add(batch, expected, moe.logits(batch))
            progress.advance()
    if training is not None:
        return _trained(layers, totals, label, streamed, training)
    return _judge(job, layers, totals, label, streamed)


def batch_size(job: AnyJob, ids: torch.Tensor, streamed: bool) -> int:
    """Windows per batch. Streaming reads every weight once per batch: larger ones cost memory, and save that."""
    return max(1, _LOGIT_BYTES * (8 if streamed else 1) // (4 * ids.shape[1] * job.vocab_size))


def check_keys(job: AnyJob, folder: Path) -> None:
    """Compare the stored names, shapes and dtypes with the plan.

    Raises:
        CheckpointError: one differs.
    """
    stored = SafetensorsFolder(folder).specs
    planned = {entry.name: entry.spec for unit in job.units for entry in unit.entries}
    if stored != planned:
        wrong = sorted(name for name in set(stored) | set(planned) if stored.get(name) != planned.get(name))
        raise CheckpointError(f"{folder}: tensor '{wrong[0]}' is not as planned ({len(wrong)} such tensors)")


def token_windows(job: AnyJob, checkpoint: Checkpoint, text: str | None, tokens: int) -> tuple[torch.Tensor, str]:
    """Token ids ``[N, W]`` to measure on, and what they are from."""
    window = min(_WINDOW, job.context, tokens)
    if job.recipe.tokenizer == "none":
        rng = torch.Generator().manual_seed(job.recipe.seed)
        ids = torch.randint(job.vocab_size, (max(1, tokens // window), window), generator=rng)
        return ids, "random token ids (no tokenizer)"
    tokenizer = load_tokenizer(checkpoint.source.path)
    if text:
        contents, label = [read_text(text)], text
    elif set(text_names(job.recipe.calibration.texts)) & set(DEMO_TEXTS):
        contents = [demo_parts(name)[1] for name in DEMO_TEXTS]
        label = "the quarter of the embedded texts that was not calibrated on"
    else:
        contents, label = [read_text(name) for name in DEMO_TEXTS], "embedded validation texts"
    return windows_of([encode(tokenizer, content) for content in contents], tokens, window), label


class _LayerErrors:
    """Squared errors and norms of every block on the dense model's FFN inputs."""

    def __init__(self, job: Job, moe: StockModel, checkpoint: DenseCheckpoint) -> None:
        self._job = job
        mixes = isinstance(checkpoint, MixedCheckpoint) and not (job.method.exact_when_all_active or job.method.draws)
        self._mixed = checkpoint if isinstance(checkpoint, MixedCheckpoint) and mixes else None
        self._moe = moe
        count = job.dense.num_hidden_layers
        self._squares = torch.zeros(4, count, dtype=torch.float64)  # error, with all experts, norm, norm of their mean
        # A refit changes the experts, and overlapping ones never added up: there is nothing to compare.
        comparable = (job.method.exact_when_all_active or mixes) and job.refit == "none"
        self.all_experts_measured = job.promise[0] == "approximate" and comparable

    @contextmanager
    def measured_on(self, dense: StockModel) -> Iterator[None]:
        """Compare block by block while the dense model runs."""
        hooks = [
            layer.get_submodule(self._job.family.block).register_forward_hook(
                lambda _, args, output, i=i: self._compare(i, args[0], output)
            )
            for i, layer in enumerate(dense.layers)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _compare(self, index: int, x: torch.Tensor, expected: torch.Tensor) -> None:
        with torch.no_grad():
            blocks = self._moe.blocks(index)
            actual: torch.Tensor = sum(block(x) for block in blocks)
            self._squares[0, index] += (actual - expected).double().square().sum()
            if self.all_experts_measured and index in self._job.shape.moe_layers:
                everyone = _all_experts(blocks, x, self._job)
                reference = self._mean_of_sources(index, x) if self._mixed else expected
                self._squares[1, index] += (everyone - reference).double().square().sum()
                self._squares[3, index] += reference.double().square().sum()
            self._squares[2, index] += expected.double().square().sum()
            self._moe.drop(index)

    def _mean_of_sources(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What the layer is where the router weighs all experts equally: computed from the sources, one in memory."""
        assert self._mixed is not None
        method, total = self._job.method, torch.zeros_like(x)
        parts = [(source, 1 / len(method.members)) for source in method.members]
        for source, part in [*parts, *((source, 1.0) for source in method.shared_members)]:
            ffn = self._mixed.members[source].feed_forward(index, self._job.recipe.dtype)
            hidden = activation_function(ffn.activation)(linear(x, ffn.gate.float())) * linear(x, ffn.up.float())
            total += linear(hidden, ffn.down.float()) * (part * method.told_scale(source))
        return total

    @property
    def reference(self) -> str:
        """What a layer with all experts on is compared with."""
        if not self._mixed:
            return "the dense FFN"
        return "the mean of the sources' FFNs" + (" and the shared ones" if self._job.method.shared_members else "")

    @property
    def relative(self) -> list[float]:
        """Relative error of every layer."""
        return (self._squares[0] / self._squares[2]).sqrt().tolist()

    @property
    def all_experts(self) -> float | None:
        """Largest relative error of any layer with all experts active."""
        if not self.all_experts_measured:
            return None
        measured = list(self._job.shape.moe_layers)
        return (self._squares[1] / self._squares[3])[measured].sqrt().max().item()


def _all_experts(blocks: list[Module], x: torch.Tensor, job: Job) -> torch.Tensor:
    """The block with every expert active at equal weight and the scale that makes that the dense FFN."""
    block, target = blocks[0], job.target
    experts, count = block.experts, job.shape.experts
    factor = job.method.scale("exact", count, count) / (job.scale * count)
    total = torch.zeros_like(x)
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):  # type: ignore[union-attr,arg-type]
        gate, up = linear(x, gate_up).chunk(2, dim=-1)
        total += linear(experts.act_fn(gate) * up, down)  # type: ignore[union-attr,operator]
    total *= factor
    shared = getattr(block, target.shared, None) if target.shared else None
    if shared is not None:
        switch = torch.sigmoid(block.get_submodule(target.shared_switch)(x)) if target.shared_switch else 1
        total += shared(x) * switch
    for other in blocks[1:]:
        total += other(x)
    return total


class Totals:
    """Sums over tokens, in fp64."""

    def __init__(self) -> None:
        self.error = self.norm = self.kl = self.loss_dense = self.loss = 0.0
        self.largest = 0.0
        self.agreeing = self.tokens = self.predictions = 0

    def add(self, ids: torch.Tensor, dense: torch.Tensor, moe: torch.Tensor) -> None:
        """Compare two sets of logits ``[N, T, V]``."""
        difference = moe - dense
        self.error += difference.double().square().sum().item()
        self.norm += dense.double().square().sum().item()
        self.largest = max(self.largest, difference.abs().max().item())
        self.agreeing += int((moe.argmax(-1) == dense.argmax(-1)).sum())
        self.tokens += ids.numel()
        p, q = log_softmax(dense, -1), log_softmax(moe, -1)
        self.kl += kl_div(q, p, log_target=True, reduction="sum").item()
        targets = ids[:, 1:].flatten()
        self.loss_dense += cross_entropy(p[:, :-1].flatten(0, 1), targets, reduction="sum").item()
        self.loss += cross_entropy(q[:, :-1].flatten(0, 1), targets, reduction="sum").item()
        self.predictions += targets.numel()

    @property
    def relative_error(self) -> float:
        """``||moe - dense|| / ||dense||``."""
        return math.sqrt(self.error / self.norm)

    @property
    def numbers(self) -> dict[str, Any]:
        """As :class:`Verification` names them."""
        return {
            "relative_logit_error": self.relative_error,
            "max_logit_difference": self.largest,
            "kl": max(0.0, self.kl / self.tokens),
            "top1_agreement": self.agreeing / self.tokens,
            "perplexity_dense": math.exp(self.loss_dense / self.predictions),
            "perplexity": math.exp(self.loss / self.predictions),
            "tokens": self.tokens,
        }


def _trained(
    layers: _LayerErrors, totals: Totals, label: str, streamed: bool, training: dict[str, Any]
) -> Verification:
    """A trained model is another function than its dense parent: what is promised is that it is whole, and finite."""
    broken = not math.isfinite(totals.relative_error)
    done = f"trained for {training['step']:,} steps, {training['tokens']:,} tokens, since it was converted"
    return Verification(
        verdict="broken" if broken else "approximate",
        explanation="the logits are not finite" if broken else done,
        promise="trained",
        tolerance=None,
        layer_errors=layers.relative,
        all_experts_error=None,
        all_experts_reference=layers.reference,
        text=label,
        streamed=streamed,
        **totals.numbers,
    )


def _judge(job: Job, layers: _LayerErrors, totals: Totals, label: str, streamed: bool) -> Verification:
    promise, reason = job.promise
    error = totals.relative_error
    roundoff = _ROUNDOFF[job.dtype]
    # Layers' rounding errors are independent: they add up like a random walk.
    tolerance = {"exact": EXACT_TOLERANCE, "rounded": roundoff * math.sqrt(job.dense.num_hidden_layers)}.get(promise)
    everyone = layers.all_experts
    verdict: Literal["exact", "approximate", "broken"] = "exact" if promise == "exact" else "approximate"
    explanation = reason
    if everyone is not None and job.method.members:
        explanation += f"; with all experts at equal weight a layer is {layers.reference} (within {everyone:.1e})"
    if tolerance is not None and not error <= tolerance:
        verdict, explanation = "broken", f"relative logit error {error:.1e}, promised below {tolerance:.1e}"
    elif everyone is not None and not everyone <= (roundoff if job.rounding_factors else EXACT_TOLERANCE):
        verdict = "broken"
        explanation = f"with all experts active a layer is off by {everyone:.1e}, and it must equal {layers.reference}"
    elif not math.isfinite(error):
        verdict, explanation = "broken", "the logits are not finite"
    return Verification(
        verdict=verdict,
        explanation=explanation,
        promise=promise,
        tolerance=tolerance,
        layer_errors=layers.relative,
        all_experts_error=everyone,
        all_experts_reference=layers.reference,
        text=label,
        streamed=streamed,
        **totals.numbers,
    )
