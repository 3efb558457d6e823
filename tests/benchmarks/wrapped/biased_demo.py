"""Loads balanced by a bias on the choice of experts (DeepSeek-V3), and what remains when experts are then cut unevenly.

The demo model's FFNs are cut into 16 experts of ERNIE 4.5's kind, whose routers have such a bias; 4 run for a token, behind ridge
routers. One model is trained with Switch's balance loss and leaves its biases at zero, the others by moving them, on the same
batches, as far as the paper does or less: the scores of such routers differ by little. Then a quarter of the experts of each is
left out (REAP, refitted): equally many in every layer, which stays a stock ERNIE 4.5, and as many in all layers together, which
``upcycle_moe`` holds under the rule ``biased_top_k``. Losses are of held-out documents, the mean of code and prose; the load is
that of the fullest expert of a layer, mean over layers and the last tenth of the steps.

    python -P tests/benchmarks/wrapped/biased_demo.py --out docs/measured/biased_demo.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "training")]

from d2d_demo import BATCH, LENGTH, measured, windows
from healing import demo_texts, sampled
from training_curves import cosine, run_recipe, trained, write_domains, write_page

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.files.locate import locate
from upcycle.trainers.run.step_reports import read_log

KEEP = 0.75
SPLIT: dict[str, Any] = {
    "method": "weight_kmeans",
    "experts": 16,
    "top_k": 4,
    "router": "ridge",
    "target": "ernie4_5_moe",
    "verification": {"enabled": False},
}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "loss": ("Switch's balance loss", {"losses": {"switch_balance": {"coefficient": 0.01}}}),
    "bias": ("a bias that moves by 0.001 (DeepSeek-V3)", {"balance": {"rate": 1e-3}}),
    "slow": ("a bias that moves by 0.00001", {"balance": {"rate": 1e-5}}),
}
CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "even": ("12 of 16 experts in every layer", {}),
    "uneven": ("as many in all layers together", {"parameters": {"layers": "uneven"}, "target": "upcycle_moe"}),
}


def main() -> None:
    """Convert, train, cut, measure and print the table; with ``--out`` it is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help=f"of training, {LENGTH * BATCH} tokens each")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--jobs", type=int, default=2, help="training runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="biased-"))
    texts = demo_texts()
    data = write_domains(work / "text", texts)
    calibration = {"text": [str(path) for path in sampled(work / "text", texts)], "tokens": 16384, "window": LENGTH}
    start = work / "start"
    if not start.exists():
        upcycle.convert("demo", start, calibration=calibration, **SPLIT)
    runs: dict[str, Mapping[str, Any]] = {}
    for arm, (_, how) in ARMS.items():
        stage = cosine(options.steps, options.rate, **how)
        every = max(1, options.steps // 2)
        runs[arm] = run_recipe(start, data, stage, (LENGTH, BATCH), validated=every, export=True)
    trained(runs, work / "runs", options.jobs)
    text = windows(texts, load_tokenizer(locate("demo").path))
    lines = [
        f"The demo model itself: {measured(locate('demo').path, text).loss:.4f} nats per token; its split before training: "
        f"{measured(start, text).loss:.4f}. {options.steps * LENGTH * BATCH:,} tokens of training.",
        "",
        "| balanced by | load | trained | " + " | ".join(title for title, _ in CUTS.values()) + " |",
        "|---|---:|" + "---:|" * (1 + len(CUTS)),
    ]
    for arm, (title, _) in ARMS.items():
        model = work / "runs" / arm / "model"
        steps = [line for line in read_log(work / "runs" / arm / "log.jsonl") if line["kind"] == "step"]
        load = fmean(fmean(line["load_max_over_mean"]) for line in steps[-max(1, options.steps // 10) :])
        cells = [measured(model, text).loss]
        for name, (_, more) in CUTS.items():
            out = work / f"{arm}-{name}"
            if not out.exists():
                told: dict[str, Any] = {"method": "reap", "keep": KEEP, "refit": "down", **more}
                upcycle.convert(str(model), out, calibration=calibration, verification={"enabled": False}, **told)
            cells.append(measured(out, text).loss)
        lines.append(f"| {title} | {load:.2f}x | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")
    said = "\n".join(lines) + "\n"
    print(said)
    if options.out:
        write_page(options.out, "A bias on the choice of experts, on the demo model", "wrapped/biased_demo.py", said)


if __name__ == "__main__":
    main()
