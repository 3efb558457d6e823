"""One place loads with transformers, and says every time that no code of a folder is run and nothing is fetched."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The engines' workers run in a Python of the engine's; code of the card is text for its reader.
LOADERS = re.compile(
    r"from_pretrained\(|for_model\(|\bfrom_config\(|AutoConfig|AutoTokenizer|AutoModel\w+|GenerationConfig"
)
# These name Auto classes, to choose one and to register more, and call none.
REGISTERING = ("upcycle/architectures/stock_auto.py", "upcycle/models/own/")
ALLOWED = (
    *("upcycle/architectures/stock.py", "upcycle/publishing/card_", "upcycle/verification/engines/workers/"),
    *REGISTERING,
)
CALLS = re.compile(r"\.(from_pretrained|from_config|for_model)\(")


def test_nothing_else_loads_with_transformers() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("upcycle", "kernels", "trainers", "splitters")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not str(path.relative_to(ROOT)).startswith(ALLOWED)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        # Not what users are told to do: text in quotes, or in backquotes.
        if LOADERS.search(line) and "``" not in line and not line.strip().startswith(('"', "'"))
    ]
    assert not found
    naming = [path for path in (ROOT / "upcycle").rglob("*.py") if str(path.relative_to(ROOT)).startswith(REGISTERING)]
    assert len(naming) > 5
    assert not [path for path in naming if CALLS.search(path.read_text(encoding="utf-8"))]
    own = (ROOT / "upcycle" / "architectures" / "stock.py").read_text()
    calls = re.findall(r"(?:from_pretrained|from_config)\((?:[^()]|\([^()]*\))*\)", own)
    assert len(calls) == len(re.findall(r"(?:from_pretrained|from_config)\(", own)) >= 4
    assert all("trust_remote_code=False" in call for call in calls)
    assert all("local_files_only=True" in call for call in calls if call.startswith("from_pretrained"))
