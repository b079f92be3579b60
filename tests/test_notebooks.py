"""Every notebook runs from top to bottom, and what it shows is what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


@pytest.mark.thorough
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] or cell["execution_count"] for cell in cells)
    source = "\n\n".join("".join(cell["source"]) for cell in cells)
    child = subprocess.run([sys.executable, "-c", source], cwd=FOLDER, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr[-2000:]
    printed = ["".join(o["text"]) for cell in cells for o in cell["outputs"] if o["output_type"] == "stream"]
    assert child.stdout == "".join(printed), "the outputs that are shown are those of this version"


def test_there_is_a_notebook():
    assert list(FOLDER.glob("*.ipynb"))
