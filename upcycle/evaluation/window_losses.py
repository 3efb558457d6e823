"""The loss of a model in memory on a text, from strided windows: each token counts once, with context before it."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from upcycle.architectures.clean_settings import CONFIG, clean_file
from upcycle.architectures.module_paths import text_config
from upcycle.architectures.stock import build_config
from upcycle.errors import UsageError
from upcycle.files.formats.gguf_file import GgufFile
from upcycle.files.locate import locate
from upcycle.models.load import load_model
from upcycle.progress import Progress

_BATCH_LOGIT_BYTES = 1 << 28  # of the fp32 logits of a batch, at most


def context_of(name: str) -> int:
    """Return how many tokens a model reads at most, by its configuration alone.

    Raises:
        UpcycleError: there is no such model, or it has no configuration of a stock class.
    """
    path = locate(name).path
    raw = clean_file(path / CONFIG) if path.is_dir() else GgufFile(path).config
    context: int = text_config(build_config(raw, name)).max_position_embeddings
    return context


class WindowRunner:
    """Runs a model in memory over the windows of a text."""

    def __init__(self, name: str, window: int, stride: int | None) -> None:
        self.window = min(window, context_of(name))
        self.stride = stride or max(1, self.window // 2)
        if not 0 < self.stride < self.window:
            raise UsageError(f"the stride ({self.stride}) must be at least 1 and below the window ({self.window})")
        self.model = load_model(name)
        self.config = text_config(self.model.config)

    def loss(self, ids: torch.Tensor, progress: Progress, title: str) -> tuple[float, int]:
        """Return the mean negative log likelihood in nats of at least two tokens, and the number of those that are predicted."""
        starts = list(range(0, max(1, len(ids) - self.window + self.stride), self.stride))
        per_batch = max(1, _BATCH_LOGIT_BYTES // (4 * self.window * self.config.vocab_size))
        total, predicted = 0.0, 0
        with progress.phase(f"reading {title}", len(starts)), torch.no_grad():
            for first in range(0, len(starts), per_batch):
                for batch in _equal_lengths(
                    [ids[start : start + self.window] for start in starts[first : first + per_batch]]
                ):
                    logits = self.model(batch, use_cache=False).logits
                    losses = cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none")
                    for row, loss in enumerate(losses):
                        is_first = predicted == 0 and row == 0
                        # The last window may be short; its new tokens are those after the overlap.
                        new = loss if is_first else loss[self.window - self.stride - 1 :]
                        total += new.double().sum().item()
                        predicted += len(new)
                    progress.advance(len(batch))
        return total / predicted, predicted


def _equal_lengths(windows: list[torch.Tensor]) -> list[torch.Tensor]:
    full = [window for window in windows if len(window) == len(windows[0])]
    rest = [window[None] for window in windows[len(full) :]]
    return [torch.stack(full), *rest]
