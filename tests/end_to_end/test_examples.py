"""The notebooks in ``examples/`` run from the first cell to the last, and show what they promise."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# A notebook -> what its outputs show.
SHOWN = {
    "convert_and_check": ("<h4>Plan</h4>", "<h4>Conversion</h4>", "exact", "<h4>Evaluation</h4>", "<iframe srcdoc="),
    "split_compare_heal": ("upcycle convert", "<h4>Comparison</h4>", "approximate", "<h4>TrainResult</h4>", "trained"),
    "mix_fine_tunes": ("<h4>Conversion</h4>", "mixed ", "<iframe srcdoc="),
}


def cells(name: str) -> list[dict[str, Any]]:
    return list(json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"])


def test_every_notebook_is_tried() -> None:
    assert sorted(SHOWN) == sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("name", SHOWN)
def test_notebooks_begin_with_words_and_are_kept_without_outputs(name: str) -> None:
    found = cells(name)
    assert found[0]["cell_type"] == "markdown"
    code = [cell for cell in found if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    for cell in code:
        ast.parse("".join(cell["source"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    shutil.copy(EXAMPLES / f"{name}.ipynb", tmp_path)
    notebook = nbformat.read(tmp_path / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = "".join(
        "".join(output.get("data", {}).get("text/html", ""))
        + output.get("text", "")
        + output.get("data", {}).get("text/plain", "")
        for output in outputs
    )
    assert [part for part in SHOWN[name] if part not in shown] == []
