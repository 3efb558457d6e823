"""Carries out conversions of dense models into experts: calibrates, decides every layer, builds experts, verifies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle.calibration.blueprint_join import blueprint_reports, decided_layer, join_layers, keep_layer
from upcycle.calibration.decide_layer import decide
from upcycle.calibration.imitate import imitated_tensors
from upcycle.checkpoints.checkpoint import Checkpoint, DenseCheckpoint
from upcycle.checkpoints.output_layout import OutputEntry, Unit, checked_finite
from upcycle.conversion.job import TokensRead
from upcycle.conversion.threads import torch_threads
from upcycle.errors import UsageError
from upcycle.ffn.blueprint import BlueprintFile, LayerBlueprint
from upcycle.ffn.expert_tensors import ExpertTensors
from upcycle.files.records import hash_tokens
from upcycle.methods.base import AnyMethod
from upcycle.planning.expert_job import ExpertJob
from upcycle.planning.from_configs import describe_dense
from upcycle.planning.open_sources import mix_of
from upcycle.planning.prepare_experts import prepare_experts
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from upcycle.ffn.feed_forward import FeedForward
    from upcycle.ffn.gated_experts import BuildsParts
    from upcycle.planning.verification_text import MeasuredText
    from upcycle.verification.verdict import Verification


@dataclass(frozen=True)
class ExpertConversion(ExpertJob):
    """A job that makes experts of a dense model's FFNs. Implements :class:`upcycle.conversion.job.ConversionJob`.

    ``saved`` is a blueprint that the user gave; nothing is decided then.
    """

    takes_blueprints: ClassVar[bool] = True
    brought: ClassVar[str] = "--experts, --shared and --layers"  # options that a saved blueprint decides

    saved: BlueprintFile | None = None

    @classmethod
    def of_checkpoint(cls, recipe: Recipe, method: AnyMethod, checkpoint: Checkpoint) -> Self:
        """Plan a recipe on an opened dense model, or several."""
        assert isinstance(checkpoint, DenseCheckpoint)
        return prepare_experts(
            cls,
            recipe,
            method,
            checkpoint.family,
            checkpoint.config,
            checkpoint.store.specs,
            checkpoint.has_tokenizer,
            mix_of(checkpoint),
            checkpoint.note(recipe.dtype),
        )

    @classmethod
    def of_configs(cls, recipe: Recipe, method: AnyMethod) -> Self:
        """Plan a recipe from its sources' ``config.json`` alone."""
        found = describe_dense(recipe, method)
        note = found.family.remark or None
        return prepare_experts(cls, recipe, method, found.family, found.dense, found.specs, mix=found.mix, note=note)

    def given(self, blueprint: Path) -> Self:
        """Return the job with every layer decided by a saved blueprint.

        Raises:
            UsageError: its experts are not those that the recipe asks for.
        """
        saved, shape = BlueprintFile(blueprint), self.shape
        for layer in shape.moe_layers:
            numbers = saved.shape(layer) if layer in saved.layers else None
            wanted = (shape.experts, shape.shared, shape.at(layer).expert_size)
            if numbers != wanted:
                raise UsageError(
                    f"{blueprint}: layer {layer} has (experts, shared, neurons each) = {numbers}, the recipe needs {wanted}",
                    hint=f"leave {self.brought} out: the blueprint brings its own recipe",
                )
        return replace(self, saved=saved)

    @property
    def working_bytes(self) -> int:
        """Bytes that a calibration keeps in the working folder: none where a blueprint was given."""
        return 0 if self.saved else super().working_bytes

    def read(self, checkpoint: Checkpoint, progress: Progress) -> TokensRead:
        """Read the calibration text or images, and the prompts or texts that tell several sources apart."""
        windows = samples = own = None
        assert isinstance(checkpoint, DenseCheckpoint)
        if self.saved:
            return TokensRead()
        if self.sampled and not self.undecided:
            from upcycle.calibration.source_samples import read_samples

            samples = read_samples(self, checkpoint)
        if self.calibrated and self.family.pauses:
            from upcycle.calibration.read_inputs import calibration_inputs, reads_texts

            if not reads_texts(self):
                self.check_memory()
                return TokensRead(inputs=calibration_inputs(self, checkpoint, progress))
        elif self.calibrated and self.family.reads == "images":
            from upcycle.calibration.read_images import calibration_images

            self.check_memory()
            windows, images = calibration_images(self, checkpoint, progress)
            return TokensRead(windows, about=images.about, images=images)
        if self.calibrated or self.undecided:
            from upcycle.calibration.read_tokens import calibration_windows

            self.check_memory()
            windows, own = calibration_windows(self, checkpoint, progress)
        return TokensRead(windows, samples, own)

    def decide(
        self, checkpoint: Checkpoint, tokens: TokensRead, folder: Path, progress: Progress
    ) -> tuple[Self, dict[str, Any] | None]:
        """Decide every layer on the text; without text, layers are decided when they are written."""
        assert isinstance(checkpoint, DenseCheckpoint)
        if self.family.pauses and (tokens.inputs or tokens.ids):
            return self, self._decide_paused(checkpoint, tokens, folder, progress)
        if not tokens.ids:
            return self, None
        from upcycle.calibration.calibrate import calibrate
        from upcycle.text.mixture import traces

        pixels = tokens.images.pixels if tokens.images else None
        record = calibrate(self, checkpoint, tokens.windows, folder, progress, tokens.samples, pixels)
        if tokens.images:
            return self, {**record, **tokens.about}
        return self, record if tokens.windows is None else {**record, **traces(self.recipe.calibration), **tokens.about}

    def _decide_paused(
        self, checkpoint: DenseCheckpoint, tokens: TokensRead, folder: Path, progress: Progress
    ) -> dict[str, Any]:
        """Decide every layer of a model whose passes pause at its layers; return what ``upcycle.json`` says of the calibration."""
        from upcycle.calibration.paused_walk import calibrate_paused
        from upcycle.calibration.read_inputs import text_batches
        from upcycle.text.mixture import traces

        texts, mode = self.recipe.calibration, self.calibration_mode
        if tokens.inputs:
            calibrate_paused(self, checkpoint, tokens.inputs.batches(), folder, progress)
            return {**tokens.inputs.about, "mode": mode}
        assert tokens.windows is not None
        calibrate_paused(self, checkpoint, text_batches(self, checkpoint, tokens.windows), folder, progress)
        read = {"text": texts.texts, "tokens": tokens.windows.numel(), "window": tokens.windows.shape[1]}
        return {**read, "token_ids_sha256": hash_tokens(tokens.windows), "mode": mode, **traces(texts), **tokens.about}

    def blocks(
        self, unit: Unit, checkpoint: Checkpoint, folder: Path, threads: int
    ) -> Iterator[tuple[OutputEntry, Iterator[torch.Tensor]]]:
        """Yield every tensor of one unit as blocks of rows: copied, or built by the layer's blueprint."""
        dtype = self.recipe.dtype
        experts: BuildsParts | None = None
        imitated = imitated_tensors(self, unit.layer, folder)
        for entry in unit.entries:
            if entry.origin:
                yield entry, checkpoint.blocks(entry.origin, dtype)
                continue
            if entry.name in imitated:
                yield entry, iter([checked_finite(entry, imitated[entry.name]())])
                continue
            if experts is None:
                assert unit.layer is not None
                assert isinstance(checkpoint, DenseCheckpoint)
                ffn = checkpoint.feed_forward(unit.layer, dtype)
                with torch_threads(threads):
                    blueprint = self._blueprint(ffn, folder)
                matrices = checkpoint.expert_matrices(unit.layer, dtype)
                experts = self.target.built(ExpertTensors(ffn, blueprint, matrices), self.dense)
            yield entry, _built(entry, experts)

    def _blueprint(self, ffn: FeedForward, folder: Path) -> LayerBlueprint:
        """Return a layer's blueprint, decided by the calibration, saved or decided now, and keep it until all are joined."""
        if (found := decided_layer(self, folder, ffn.layer)) is not None:
            return found
        if self.saved:
            blueprint = replace(self.saved.layer(ffn.layer), top_k=self.shape.top_k, rule=self.shape.rule)
            if blueprint.down is None and self.recipe.refit != "scale":
                blueprint = replace(blueprint, scale=self.scale, spread=self.method.spread)
        else:
            blueprint = decide(self, ffn)
        keep_layer(folder, blueprint)
        return blueprint

    def finish(self, folder: Path) -> list[dict[str, Any]]:
        """Join the blueprints of all layers into one file."""
        return join_layers(self, folder)

    def reports(self, folder: Path) -> list[dict[str, Any]]:
        """Return what was measured and decided of every layer, as plain data."""
        return blueprint_reports(folder)

    def verify(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        windows: MeasuredText,
        progress: Progress,
        training: dict[str, Any] | None = None,
    ) -> Verification:
        """Compare the result's logits and layers with the dense model's."""
        from upcycle.verification.verify_experts import verify_experts

        assert isinstance(checkpoint, DenseCheckpoint)
        return verify_experts(self, checkpoint, folder, windows, progress, training)


def _built(entry: OutputEntry, experts: BuildsParts) -> Iterator[torch.Tensor]:
    """Yield the blocks of a tensor that is built and not copied."""
    assert entry.built is not None
    return (checked_finite(entry, experts.part(part)) for part in entry.built.parts)
