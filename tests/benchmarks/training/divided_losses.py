"""One optimizer step divided in four ways: how far its losses are from those of one pass on one rank.

The demo model as a Mixtral of 4 copied experts, 2 per token, sees the same 16 rows of made-up conversations, whose answers alone are
learned, in fp32 with equal weights: in one pass, in eight, on two ranks, and on two ranks in eight passes each. The table has the
relative difference of every loss to that of one pass on one rank, and, for comparison, what it would be with ``losses_over: pass``.
Mutual information is a small difference of two entropies; its differences are relative to these, whose size is its coefficient.
Passes when no loss that is over the whole batch differs by more than 1e-6.

    python -P tests/benchmarks/training/divided_losses.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

MOST = 1e-6
ROWS, LENGTH = 16, 128
COEFFICIENT = 0.01
NAMES = "switch_balance", "device_balance", "skywork_balance", "importance_cv2", "mutual_information", "router_z"
LOSSES = {name: {"coefficient": COEFFICIENT} for name in NAMES}
DIVISIONS = {"8 passes": (2, 1), "2 ranks": (8, 2), "2 ranks, 8 passes each": (1, 2)}


def losses_of(model: Path, work: Path, micro_batch: int, ranks: int, over: str) -> dict[str, float]:
    """The losses of a run's only step, by name."""
    from chats import sums, write_chats
    from training_runs import finish, start, steps

    from upcycle.trainers.recipe.training_recipe import parse_train_recipe

    folder = work / f"{micro_batch}-{ranks}-{over}"
    folder.mkdir()
    content: dict[str, Any] = {
        "model": str(model),
        "output": str(folder / "run"),
        "data": {
            "domains": {"sums": write_chats(work / "sums.jsonl", sums(400))},
            "chat_template": "turns",
            "cache": str(work / "cache"),
            "validation": {"fraction": 0},
        },
        "length": LENGTH,
        "global_batch": ROWS,
        "micro_batch": micro_batch,
        "stages": {"steps": 1, "learning_rate": 1e-5, "losses": LOSSES, "losses_over": over},
        "saving": {"export": False},
        "log": {"peak_tflops": 0.05},
    }
    recipe = parse_train_recipe(content, "divided_losses")
    finish(start(recipe, *(["--nproc", str(ranks)] if ranks > 1 else [])))
    (step,) = steps(recipe)
    return {"next_token": step["loss"], **{name: step[f"loss/{name}"] for name in LOSSES}}


def main() -> int:
    """Print the table; returns 1 if a loss differs."""
    import upcycle

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = work / "moe"
        upcycle.convert("demo", model, experts=4, top_k=2, verification={"enabled": False})
        whole = losses_of(model, work, ROWS, 1, "batch")
        found = {name: losses_of(model, work, *division, "batch") for name, division in DIVISIONS.items()}
        apart = losses_of(model, work, *DIVISIONS["8 passes"], "pass")
    print(f"| loss | 1 pass | {' | '.join(DIVISIONS)} | 8 passes, `losses_over: pass` |")
    print("|---|---|" + "---|" * (len(DIVISIONS) + 1))
    worst = 0.0
    for name, value in whole.items():
        size = COEFFICIENT if name == "mutual_information" else abs(value)
        differences = [abs(each[name] - value) / size for each in found.values()]
        worst = max(worst, *differences)
        cells = [f"{value:.6f}", *(f"{each:.1e}" for each in (*differences, abs(apart[name] - value) / size))]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nlargest difference {worst:.1e}, allowed {MOST:.0e}")
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
