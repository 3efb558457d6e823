"""``upcycle compare`` on SmolLM2-135M: every splitting method, router and refit, on three kinds of real text.

Documentation, code and science (see ``domains.py``) are calibrated on; other documents of these kinds are measured on.
Prints what the command prints, and leaves its table in ``docs/measured/compare_smollm2.md`` (``--out`` for another file).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

from domains import texts
from measure import UPCYCLE

TABLE = Path(__file__).resolve().parents[3] / "docs" / "measured" / "compare_smollm2.md"


def main() -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--active", default="0.5", help="fractions, as the command takes them (default: 0.5)")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens (default: 8192)")
    parser.add_argument("--methods", default="all", help="as the command takes them (default: all)")
    parser.add_argument("--out", type=Path, default=TABLE, help="where the table goes")
    arguments = parser.parse_args()
    smollm2 = [sys.executable, "-P", Path(__file__).resolve().parents[2] / "support" / "smollm2.py"]
    model = subprocess.run(smollm2, capture_output=True, text=True, check=True).stdout.split("\n")[-2]
    calibration, evaluation = texts()
    with tempfile.TemporaryDirectory() as folder:  # short names: the table quotes the commands it recommends
        for path in (Path(model), *calibration, *evaluation):
            Path(folder, path.name).symlink_to(path)
        command = [UPCYCLE, "compare", Path(model).name, "--active", arguments.active, "--methods", arguments.methods]
        command += ["--calibration", ",".join(path.name for path in calibration)]
        command += ["--calibration-tokens", arguments.tokens, "--text", ",".join(path.name for path in evaluation)]
        command += ["--dtype", "float32", "--window", 512, "--out", arguments.out.resolve(), "--quiet"]
        return subprocess.run(list(map(str, command)), check=False, cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
