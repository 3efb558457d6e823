"""Masked structural growth of the demo model against going on with it: the same new text, in the same order, for all.

The text is that of ``growing.py``: prose and code that the demo model has not seen. Each growth (``GROWTHS``) is tried with masks that
rise over half of the steps, and, to show what they are for, with masks that are gone after the first step. Passes when every masked
growth begins with the dense model's loss, and ends below what the same growth without masks ends at.

    python -P tests/benchmarks/training/masked_growing.py --out docs/measured/masked_growing_demo.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parent))

from domains import parted
from training_curves import cosine, run_recipe, trained, write_domains, write_page

import upcycle

KINDS = {"prose": "science", "code": "library"}
GROWTHS: dict[str, dict[str, int]] = {
    "FFN, 2 times": {"intermediate": 2},
    "layers, 1.5 times": {"layers": 3},
    "heads, 2 times": {"heads": 2},
    "hidden size, 1.5 times": {"hidden": 3},
    "all of these": {"intermediate": 2, "layers": 3, "heads": 2, "hidden": 3},
}  # 2: doubled; 3: half as much again
RATE, LENGTH, BATCH = 1e-3, 256, 4


def parameters_of(growth: Mapping[str, int]) -> dict[str, int]:
    """The new sizes of the demo model."""
    from upcycle.checkpoints.checkpoint import DenseCheckpoint

    config = DenseCheckpoint.open("demo").config
    sizes = {
        "intermediate": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "hidden": config.hidden_size,
    }
    return {key: sizes[key] * times if times == 2 else sizes[key] * times // 2 for key, times in growth.items()}


def recipe(start: str, steps: int, masked: int | None, data: Mapping[str, Any]) -> dict[str, Any]:
    """A run, the same for all but for where it starts and over how many steps its masks rise."""
    stage = cosine(steps, RATE, **({"masks": {"steps": masked}} if masked else {}))
    return run_recipe(start, data, stage, (LENGTH, BATCH), validated=steps // 2, saved=25)


def main() -> int:
    """Train, print, write; 1 when a growth does not begin or end as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=25_000)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, help="keep runs here, and continue them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="masked-growing-"))
    work.mkdir(parents=True, exist_ok=True)
    data = write_domains(work / "text", {kind: parted(domain) for kind, domain in KINDS.items()})
    steps = -(-options.tokens // (LENGTH * BATCH))
    recipes, sizes = {f"dense-{steps}": recipe("demo", steps, None, data)}, {}
    for number, (name, growth) in enumerate(GROWTHS.items()):
        out = work / f"grown-{number}"
        plan = upcycle.plan("demo", method="masked_growth", parameters=parameters_of(growth))
        if not out.exists():
            upcycle.convert("demo", out, method="masked_growth", parameters=parameters_of(growth))
        sizes[name] = plan.parameters_total / plan.parameters_dense
        recipes[f"{number}-{steps}-masked"] = recipe(str(out), steps, steps // 2, data)
        recipes[f"{number}-{steps}-at-once"] = recipe(str(out), steps, 1, data)
    curves = trained(recipes, work / "runs", options.jobs)
    dense = curves.pop(f"dense-{steps}").losses()
    pairs = [
        (curves[f"{number}-{steps}-masked"].losses(), curves[f"{number}-{steps}-at-once"].losses())
        for number in range(len(GROWTHS))
    ]
    start, (half, middle), end = dense[0][1], dense[1], dense[-1][1]
    lines = [
        f"{steps * LENGTH * BATCH:,} tokens of prose and code; mean loss in nats per token. Masks rise over the first half, or are "
        "gone after the first step.",
        "",
        f"| growth | parameters | at the start | after {half:,}, masked | at the end, masked | at the end, at once |",
        "|---|---:|---:|---:|---:|---:|",
        f"| none | 1.00x | {start:.4f} | {middle:.3f} | {end:.3f} | |",
    ]
    good = True
    for name, (masked, at_once) in zip(GROWTHS, pairs, strict=True):
        good &= abs(masked[0][1] - start) < 1e-4 and masked[-1][1] < at_once[-1][1]
        cells = (
            f"{sizes[name]:.2f}x",
            f"{masked[0][1]:.4f}",
            f"{masked[1][1]:.3f}",
            f"{masked[-1][1]:.3f}",
            f"{at_once[-1][1]:.3f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        write_page(options.out, "Masked growth of the demo model", "training/masked_growing.py", text)
    print(f"every growth begins as the dense model, and masks end lower: {'PASS' if good else 'FAIL'}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
