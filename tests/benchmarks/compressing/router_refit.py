"""Does a closed-form refit of the router's rows help after a cut? Perplexity of a cut split of the demo model, with and without.

The split (8 experts, top-4) is cut by ``reap``. Its experts that are left keep their rows, as ``upcycle compress`` leaves them; or all
rows are fitted anew by ridge regression to what the uncut layer says of the best use of these experts: the root of
``<f_e(x), y(x)>``, where ``f_e`` is an expert's output and ``y`` the uncut layer's, at the length that the rows had. Both with and
without the refit of down projections, which follows. Measured on the embedded validation texts. Prints a table in Markdown; a few
minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear, silu

import upcycle
from upcycle.architectures.expert_terms import LayerCut
from upcycle.ffn.ridge_sums import RidgeSums
from upcycle.methods.compressing.dropping.reap import Reap
from upcycle.methods.compressing.layer_source import ExpertTokens, Matrices
from upcycle.registry import METHODS

TOKENS = 8192
TEXTS = ["prose", "code"]


class RowsFitted(Reap):
    """REAP, whose rows are fitted anew."""

    name = "reap_rows_fitted"
    makes = frozenset({"router"})

    def made(
        self, cut: LayerCut, keep: int, rows: torch.Tensor, tokens: Callable[[int], ExpertTokens], matrices: Matrices
    ) -> dict[str, torch.Tensor]:
        """Every token is there once for each expert that it chose, so that all count the same."""
        seen = [tokens(expert) for expert in range(len(rows))]
        x, held = torch.cat([part.x for part in seen]), torch.cat([part.held for part in seen])
        outputs = torch.stack([output(matrices(expert), x) for expert in range(len(rows))], 1)  # [t, E, d]
        scores = linear(x, rows).softmax(-1)
        chosen = scores.topk(len(seen) // 2)
        weights = torch.zeros_like(scores).scatter(1, chosen.indices, chosen.values)
        whole = torch.einsum("te,ted->td", weights / weights.sum(1, keepdim=True), outputs)
        kept = list(cut.rows)
        target = torch.einsum("ted,td->te", outputs[:, kept], whole).clamp(min=0).sqrt()
        sums = RidgeSums(x.shape[1], len(kept))
        for outside in (False, True):
            some = held == outside
            centred = target[some] - target[some].mean(1, keepdim=True)
            sums.add(x[some], centred, torch.ones(len(centred)), held_out=outside)
        fitted = sums.solve(sums.best().strength).weights.T.float()
        return {"router": fitted * linear(x, rows[kept]).std() / linear(x, fitted).std()}


def output(expert: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """An expert's output ``[t, d]``."""
    return linear(silu(linear(x, expert["gate"])) * linear(x, expert["up"]), expert["down"])


def perplexities(model: Path) -> list[str]:
    """On each text."""
    found = upcycle.evaluate(str(model), text=TEXTS, tokens=4096, window=256, stride=255).texts
    return [f"{text.perplexity:.2f}" for text in found]


def main() -> int:
    """Split, cut, measure, print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    METHODS[RowsFitted.name] = f"{__name__}:{RowsFitted.__name__}"
    calibration = {"text": "demo", "tokens": TOKENS}
    unverified = {"calibration": calibration, "verification": {"enabled": False}}
    print(f"| kept | rows | refit | {' | '.join(TEXTS)} |", "|---" * (3 + len(TEXTS)) + "|", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        moe = Path(folder) / "moe"
        upcycle.convert("demo", moe, method="coactivation_kmeans", experts=8, top_k=4, **unverified)
        print(f"| 100% | - | - | {' | '.join(perplexities(moe))} |", flush=True)
        for keep in (0.75, 0.5):
            for refit in ("none", "down"):
                for method, rows in ((Reap.name, "kept"), (RowsFitted.name, "fitted")):
                    out = Path(folder) / f"{keep}-{refit}-{rows}"
                    upcycle.convert(str(moe), out, method=method, keep=keep, refit=refit, **unverified)
                    print(f"| {keep:.0%} | {rows} | {refit} | {' | '.join(perplexities(out))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
