"""ReMoE and DS-MoE from the demo model, beside a fixed top-k and the dense model: loss against neurons that run, trained alike.

All start from pieces of the demo model's FFNs, and are trained on the same batches:

- ReLU routers whose L1 norm leads to 2 of 8 experts (``configs/convert/remoe.yaml``, ``configs/train/remoe.yaml``);
- 32 experts that all run, and learn by mutual information to be preferred by some tokens; a threshold then chooses (``ds_moe``);
- 2 of 8 experts behind a ridge router with Switch's balance loss, which start sparse.

Rates and coefficients are those of a run of minutes. Losses are of held-out documents, the mean of code and prose.

    python -P tests/benchmarks/wrapped/varying_demo.py --out docs/measured/varying_demo.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "training")]

from d2d_demo import BATCH, LENGTH, ROOT, measured, table, training, windows
from healing import demo_texts, sampled
from training_curves import trained, write_domains, write_page

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.files.locate import locate
from upcycle.recipe.conversion_recipe import read_recipe

THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.48, 0.8, 1.0, 1.5, 2.0)
TOP_K: dict[str, Any] = {
    "method": "weight_kmeans",
    "experts": 8,
    "top_k": 2,
    "router": "ridge",
    "target": "upcycle_moe",
}
ARMS: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any], tuple[dict[str, Any], ...]]] = {
    "dense": ("The dense model", None, {}, ({},)),
    "top_k": ("Top-k: 2 of 8 experts", TOP_K, {"switch_balance": {"coefficient": 0.01}}, ({},)),
    "remoe": (
        "ReMoE: about 2 of 8 experts",
        {},
        {"relu_l1": {"experts": 2, "coefficient": 1e-2, "factor": 1.1}},
        ({},),
    ),
    "ds_moe": (
        "DS-MoE: 32 experts, all trained, run by a threshold",
        {},
        {"mutual_information": {"coefficient": 0.02}},
        tuple({"threshold": value} for value in THRESHOLDS),
    ),
}


def main() -> None:
    """Convert, train, measure and print the tables; with ``--out`` they are written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help=f"of training, {LENGTH * BATCH} tokens each")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which are trained; the dense model is"
    )
    parser.add_argument("--coefficient", type=float, default=1e-2, help="of ReMoE's L1 norm at the first step")
    parser.add_argument("--jobs", type=int, default=2, help="training runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="varying-"))
    texts = demo_texts()
    data = write_domains(work / "text", texts)
    calibration = {"text": [str(path) for path in sampled(work / "text", texts)], "tokens": 32768, "window": LENGTH}
    runs: dict[str, Mapping[str, Any]] = {}
    arms = {name: arm for name, arm in ARMS.items() if name in {"dense", *options.arms}}
    for name, (_, recipe, losses, _) in arms.items():
        if name == "remoe":
            losses["relu_l1"]["coefficient"] = options.coefficient
        run = training(data, options.steps, options.rate, None)
        run["stages"][0]["losses"] = losses
        if recipe is not None:
            run["model"] = str(work / f"{name}-start")
            if not (work / f"{name}-start").exists():
                keys = recipe or read_recipe(ROOT / "configs" / "convert" / f"{name}.yaml")
                more = {"calibration": calibration} if "top_k" in keys else {}
                upcycle.convert("demo", work / f"{name}-start", verification={"enabled": False}, **keys, **more)
        runs[f"{name}-{options.rate:g}-{options.steps}"] = run
    trained(runs, work / "runs", options.jobs)
    text = windows(texts, load_tokenizer(locate("demo").path))
    dense = measured(work / "runs" / next(iter(runs)) / "model", text).loss
    start = measured(locate("demo").path, text).loss
    parts = [
        f"The demo model itself: {start:.4f} nats per token. All were trained on {options.steps * LENGTH * BATCH:,} tokens.\n"
    ]
    for (title, _, _, settings), folder in zip(arms.values(), runs, strict=True):
        points = [measured(work / "runs" / folder / "model", text, setting or None) for setting in settings]
        parts.append(table(title, points, dense).replace("| dense |", "| as trained |"))
    said = "\n".join(parts)
    print(said)
    if options.out:
        write_page(options.out, "ReMoE and DS-MoE on the demo model", "wrapped/varying_demo.py", said)


if __name__ == "__main__":
    main()
