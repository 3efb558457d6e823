"""What the report's tests share: a hostile name, a comparison's row and a training log."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from upcycle.evaluation.speed import KernelSpeed, ModelSpeed, Speed
from upcycle.evaluation.task_scores import TaskScore, TaskScores
from upcycle.files import records

HOSTILE = "<script>alert('x')</script>\"'&"
COMPARED = {
    "active": 0.5,
    "method": HOSTILE,
    "router": "ridge",
    "refit": "down",
    "kl": 0.1,
    "ratio": 1.2,
    "baseline": None,
    "recommended": True,
}


def write_evaluated(out: Path) -> None:
    """What ``evaluate --tasks --speed`` keeps, of a task with a hostile name."""
    score = TaskScore(HOSTILE, "acc", "none", 20, 0.5, 0.11, True, 0.6, 0.1, -0.1)
    worse = TaskScore("passages", "word_perplexity", "none", 4, 300.0, None, False, 200.0, None, 100.0)
    dense, moe = ModelSpeed(4000.0, 90.0, 500_000_000, None), ModelSpeed(2000.0, 60.0, 525_000_000, "grouped_mm")
    kernels = KernelSpeed(3000.0, 80.0, HOSTILE, 0.75, 8 / 9)
    timed = Speed("cpu", "AVX2", "float32", 1, 256, 32, 5, moe, HOSTILE, dense, 0.5, 2 / 3, 1.05, kernels)
    scores = TaskScores("lm-eval 0.4.13", HOSTILE, None, [score, worse])
    records.write_evaluation(out, {"tasks": asdict(scores), "speed": asdict(timed)})


def write_log(path: Path, steps: int) -> None:
    """A training log as the loop writes it, its last line cut off."""
    lines: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "kind": "step",
                "step": step,
                "stage": HOSTILE,
                "loss": 3 + 1 / step,
                "loss/switch_balance": 1.5,
                "learning_rate": 1e-4 * step / steps,
                "gradient_norm": 1.0,
                "applied": step != 2,
                "tokens": 64 * step,
                "tokens_per_second": 100.0,
                "load_max_over_mean": [1.25, 1.5],
                "dead_experts": [0, 2],
                "dropped": 0.0,
            }
        )
        if step % 100 == 0:
            lines.append(
                {"kind": "validation", "step": step, "tokens": 64 * step, "validation/prose": 4.0 - step / steps}
            )
    lines.append({"kind": "alarm", "step": steps, "alarm": "dead expert", "message": HOSTILE})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "step", "st', encoding="utf-8")
