"""docs/convert.md, executed: its commands in order, then its Python."""

import os
import re
import subprocess
import sys
from pathlib import Path

import convert_helpers as helpers
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "convert.md"


@pytest.mark.thorough
def test_every_command_of_the_page_runs(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^\$ (.*)$", text, re.MULTILINE)
    assert len(commands) >= 7
    assert all(command.startswith("smolvlm-jax ") for command in commands)
    helpers.make(tmp_path / "model")
    helpers.add_processor(tmp_path / "model")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    for command in commands:
        # this test's interpreter, and not a `smolvlm-jax` from the path
        line = command.replace("smolvlm-jax", f"{sys.executable} -m smolvlm_jax", 1)
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    assert (tmp_path / "report.html").stat().st_size > 1000
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_the_manifest_is_described_key_by_key(tmp_path):
    import json

    from smolvlm_jax.convert.conversion import convert

    convert(helpers.make(tmp_path / "model"), tmp_path / "orbax", quiet=True)
    keys = set(json.loads((tmp_path / "orbax" / "manifest.json").read_text()))
    table = PAGE.read_text(encoding="utf-8").split("`manifest.json` holds")[1].split("##")[0]
    described = {
        key for line in table.splitlines() if line.startswith("| `") for key in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert described == keys
