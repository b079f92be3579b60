"""Every notebook runs on a CPU within three minutes, is kept without outputs, and is linked from the README."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def _cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def _script(path: Path) -> str:
    """The code of a notebook as a program. A cell of shell is a process, as in IPython, and its failure ends the program."""
    lines = ["import subprocess"]
    for cell in _cells(path):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("%%bash\n"):
            source = f"subprocess.run(['bash', '-ec', {source.partition(chr(10))[2]!r}], check=True)"
        lines += [source] if cell["cell_type"] == "code" else []
    return "\n\n".join(lines)


# Building the documentation executes them as well, with the same limit, and .ci/run does that.
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:smolvlm_jax", "-c", _script(path)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 180, "three minutes; of the processor, since a machine that does other things too takes longer"


def test_notebooks_are_kept_without_outputs():
    assert len(NOTEBOOKS) == 5
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), path.name
        assert all(not cell["metadata"] for cell in notebook["cells"]), path.name


def test_notebooks_say_how_to_use_a_real_model_and_are_linked():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        cells = _cells(path)
        first = "".join(cells[0]["source"])
        assert f"notebooks/{path.name}" in readme
        assert "change one line" in first, path.name
        name = first.split("change one line: `")[1].partition(" = ")[0]
        assert any("".join(cell["source"]).startswith(f'{name} = "tiny"') for cell in cells), path.name
