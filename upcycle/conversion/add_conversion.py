"""Carries out the addition of an expert: fits the rows of the routers, copies everything else, and compares it bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.conversion.growth_conversion import GrowthConversion
from upcycle.conversion.job import TokensRead
from upcycle.files.formats.parsing import read_json
from upcycle.files.names import DECISION_FILE
from upcycle.methods.growing.add_expert import AddExpert, fine_tune
from upcycle.planning.growth_job import decided_growth, write_decision
from upcycle.progress import Progress

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class AddConversion(GrowthConversion):
    """A job that adds an expert to a MoE. Implements :class:`upcycle.conversion.job.ConversionJob`."""

    def read(self, checkpoint: Checkpoint, progress: Progress) -> TokensRead:
        """Read text for the experts that there are, and text of the new expert's kind, as many tokens of it."""
        from upcycle.calibration.source_samples import sampled_text

        tokens = super().read(checkpoint, progress)
        window = min(self.recipe.calibration.window, self.context, self.recipe.calibration.tokens)
        samples = sampled_text(fine_tune(self.recipe), checkpoint, self.recipe.calibration.tokens, window)
        return TokensRead(tokens.windows, samples, tokens.own, tokens.about)

    def decide(
        self, checkpoint: Checkpoint, tokens: TokensRead, folder: Path, progress: Progress
    ) -> tuple[Self, dict[str, Any] | None]:
        """Fit the rows of all routers."""
        from upcycle.calibration.compressing.fit_added import fit_added_rows
        from upcycle.checkpoints.extended_moe import ExtendedMoe
        from upcycle.text.mixture import traces
        from upcycle.text.text_record import text_record

        assert isinstance(checkpoint, ExtendedMoe)
        assert isinstance(self.method, AddExpert)
        assert tokens.windows is not None
        assert tokens.samples is not None
        recipe = self.recipe
        if not (folder / DECISION_FILE).exists():
            found = fit_added_rows(
                checkpoint,
                self.config,
                fine_tune(recipe).scale,
                self.method.parameters.sharpness,
                recipe.dtype,
                (tokens.windows, tokens.samples.windows),
                progress,
            )
            write_decision(folder, {"rows": found.rows, "routing": found.reports})
        text = {**text_record(recipe, tokens.windows), **traces(recipe.calibration), **tokens.about}
        return decided_growth(self, folder), text

    def finish(self, folder: Path) -> list[dict[str, Any]]:
        """Return :meth:`reports`; the file that holds the decision is final already."""
        return self.reports(folder)

    def reports(self, folder: Path) -> list[dict[str, Any]]:
        """Return, for every layer, which share of held-out tokens chose the new expert, and the ridge's strength."""
        found = read_json(folder / DECISION_FILE).get("routing", {})
        return [{"layer": int(layer), **report} for layer, report in found.items()]
