"""Carries out a conversion that puts experts of low rank beside FFNs: clusters instructions, draws matrices, copies the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.architectures.dense.narrowed import MadeTensor
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.output_layout import OutputEntry, Unit, checked_finite
from upcycle.conversion.growth_conversion import GrowthConversion
from upcycle.conversion.job import TokensRead
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.names import DECISION_FILE
from upcycle.methods.beside.base import BesideMethod, ClusterTensor, DrawnTensor
from upcycle.planning.growth_job import write_decision
from upcycle.progress import Progress

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from upcycle.planning.verification_text import MeasuredText
    from upcycle.verification.verdict import Verification

_STARTS = 4  # of k-means, of which the best counts


@dataclass(frozen=True)
class BesideConversion(GrowthConversion):
    """A job that adds experts of low rank. Implements :class:`upcycle.conversion.job.ConversionJob`."""

    @property
    def beside(self) -> BesideMethod:
        """The method."""
        assert isinstance(self.method, BesideMethod)
        return self.method

    @property
    def record(self) -> dict[str, Any]:
        """The keys that only this kind of conversion adds to ``upcycle.json``."""
        return {"target": self.target_name, "beside": self.grown.summary}

    def read(self, checkpoint: Checkpoint, progress: Progress) -> TokensRead:
        """Read the instructions, the first tokens of texts, where they are clustered."""
        if not self.beside.clusters:
            return TokensRead()
        from upcycle.architectures.stock import load_tokenizer
        from upcycle.text.beginnings import beginnings

        if self.recipe.tokenizer == "none":
            raise UsageError(
                "instructions are clustered, and --tokenizer none leaves no tokenizer", hint="--tokenizer copy"
            )
        tokenizer = load_tokenizer(checkpoint.source.path)
        windows = beginnings(self.recipe.calibration, tokenizer, self.beside.instruction)
        if len(windows) < self.beside.clusters:
            raise UsageError(
                f"there are {len(windows)} instructions in the calibration text, and {self.beside.clusters} clusters",
                hint=f"--param clusters={max(2, len(windows) // 4)}, or more text",
            )
        return TokensRead(windows)

    def decide(
        self, checkpoint: Checkpoint, tokens: TokensRead, folder: Path, progress: Progress
    ) -> tuple[Self, dict[str, Any] | None]:
        """Cluster the instructions."""
        if tokens.windows is None:
            if not (folder / DECISION_FILE).exists():
                write_decision(folder, {})
            return self, None
        from upcycle.text.mixture import traces
        from upcycle.text.text_record import text_record

        if not (folder / DECISION_FILE).exists():
            centroids, sizes = instruction_clusters(
                _embeddings(self, checkpoint), tokens.windows, self.beside.clusters, self.recipe.seed
            )
            write_decision(folder, {"clusters": {"sizes": sizes, "centroids": centroids.tolist()}})
        return self, {**text_record(self.recipe, tokens.windows), **traces(self.recipe.calibration)}

    def blocks(
        self, unit: Unit, checkpoint: Checkpoint, folder: Path, threads: int
    ) -> Iterator[tuple[OutputEntry, Iterator[torch.Tensor]]]:
        """Yield every tensor of one unit: the source's, a drawn one, or what assigns instructions to clusters."""
        for entry in unit.entries:
            origin = entry.origin
            assert origin is not None
            if isinstance(origin, DrawnTensor):
                yield entry, iter([_drawn(origin, entry, self.recipe.seed)])
            elif isinstance(origin, ClusterTensor):
                yield entry, iter([checked_finite(entry, _assigning(self, origin, checkpoint, folder))])
            else:
                yield entry, checkpoint.blocks(origin, self.recipe.dtype)

    def finish(self, folder: Path) -> list[dict[str, Any]]:
        """Return :meth:`reports`; the file that holds the clusters is final already."""
        return self.reports(folder)

    def reports(self, folder: Path) -> list[dict[str, Any]]:
        """Return nothing: all layers are alike."""
        return []

    def verify(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        windows: MeasuredText,
        progress: Progress,
        training: dict[str, Any] | None = None,
    ) -> Verification:
        """Compare every tensor that is not new with its origin, and the logits of both models."""
        from upcycle.verification.verify_growth import verify_growth

        def same(entry: OutputEntry) -> bool:
            return not isinstance(entry.origin, MadeTensor)

        return verify_growth(self, checkpoint, folder, windows, progress, same, training)


def instruction_clusters(
    embeddings: torch.Tensor, windows: torch.Tensor, clusters: int, seed: int
) -> tuple[torch.Tensor, list[int]]:
    """Return the centroids ``[C, d]`` of the mean embeddings of instructions, in fp32, and how many instructions each has.

    Args:
        embeddings: of every token id, ``[V, d]``.
        windows: the instructions' token ids, ``[N, L]``.
        clusters: C.
        seed: of the starts of k-means.
    """
    import numpy as np
    import torch
    from sklearn.cluster import KMeans

    means = torch.stack([embeddings[window].float().mean(0) for window in windows])
    found = KMeans(clusters, n_init=_STARTS, random_state=seed).fit(means.numpy())
    sizes = np.bincount(found.labels_, minlength=clusters)
    return torch.from_numpy(found.cluster_centers_).float(), [int(size) for size in sizes]


def _embeddings(job: BesideConversion, checkpoint: Checkpoint) -> torch.Tensor:
    """Return the source's token embeddings ``[V, d]``."""
    name = next(
        entry.origin.name for unit in job.units if unit.name == "embeddings" for entry in unit.entries if entry.origin
    )
    return checkpoint.read(name).float()


def _assigning(job: BesideConversion, origin: ClusterTensor, checkpoint: Checkpoint, folder: Path) -> torch.Tensor:
    """Return the products of all embeddings with the centroids ``[V, C]``, or the squared norms of these ``[C]``."""
    import torch

    centroids = torch.tensor(read_json(folder / DECISION_FILE)["clusters"]["centroids"], dtype=torch.float32)
    if origin.part == "norms":
        return centroids.square().sum(1)
    return _embeddings(job, checkpoint) @ centroids.T


def _drawn(origin: DrawnTensor, entry: OutputEntry, seed: int) -> torch.Tensor:
    """Return the random numbers of a tensor: a function of its name and the seed."""
    import torch

    digest = hashlib.sha256(f"{seed} {origin.part}".encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    made = torch.empty(origin.shape)
    if origin.even:
        made.uniform_(-origin.spread, origin.spread, generator=rng)
    else:
        made.normal_(0.0, origin.spread, generator=rng)
    return made.to(getattr(torch, entry.spec.dtype))
