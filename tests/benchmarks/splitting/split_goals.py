"""Everything that is promised of the split recipes, by one command: quality, time, the cost of converting, and a layer of a 7B model.

It runs, one after another and each by itself as its own page describes: ``split_speed.py`` (time beside dense and pruned models),
``split_quality.py --oracle`` (time and memory of a conversion; then perplexity on 65,536 calibration tokens, static pruning, the
oracle's bound, news), ``split_rivals.py`` (what else saves time without training), and the split layer of ``bench_experts.py``. On
two cores that takes about two hours; nothing else should run. The exit code is 0 where every goal is reached.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PARTS = (
    ("split_speed.py", "--rounds", "9"),
    ("split_quality.py", "--oracle"),
    ("split_rivals.py",),
    ("../kernels/bench_experts.py", "--only", "split"),
)


def main() -> int:
    """Run all parts; returns the exit code."""
    codes = []
    for script, *options in PARTS:
        print(f"\n== {' '.join((script, *options))}", flush=True)
        codes.append(
            subprocess.run([sys.executable, "-P", Path(__file__).with_name(script), *options], check=False).returncode
        )
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
