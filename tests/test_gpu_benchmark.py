"""`benchmarks/gpu.py` runs from end to end where there is no GPU, with the bundled checkpoint."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


def run(directory: Path, *words: str) -> tuple[str, dict]:
    """What it printed, and its rows by side."""
    out = directory / "figures.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--model", "tiny", "--json", out, *words], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, {side: found["rows"] for side, found in json.loads(out.read_text())["sides"].items()}


@pytest.mark.thorough
def test_our_side_measures_the_engines_programs(tmp_path):
    printed, sides = run(tmp_path, "--only", "encoder", "prefill", "decode", "--skip-reference")
    assert sides["ours"].keys() == {"encoder 1", "encoder 4", "prefill 64", "decode 1", "decode 2"}
    for name, row in sides["ours"].items():
        assert row["seconds"] > 0 and row["flops"] > 0 and name in printed
    rows = sides["ours"]
    assert rows["encoder 4"]["flops"] == 4 * rows["encoder 1"]["flops"]
    assert rows["decode 2"]["bytes"] > rows["decode 1"]["bytes"] > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the reference: pip install 'smolvlm-jax[test]'")
def test_every_part_beside_transformers(tmp_path):
    printed, sides = run(tmp_path)
    assert sides["ours"].keys() == sides["transformers"].keys()
    assert all("seconds" in row for rows in sides.values() for row in rows.values())
    assert "tokens/s" in printed and "identical to the last token: 6 of 6" in printed and "ratio:" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--model", "nope"], "--model nope: no model 'nope'", marks=pytest.mark.thorough),
        (["--json", "absent/a.json"], "--json absent/a.json: there is no such directory"),
    ],
)
def test_mistakes_are_told_at_once(words, message, tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
