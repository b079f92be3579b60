"""The README is run: its Python from top to bottom, and its commands. The file map of docs/architecture.md is the tree."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_runs_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 3
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("The second."), done.stdout


def test_the_two_commands_at_the_top():
    first, second = (line.strip() for line in README.splitlines()[2:4])
    assert first == 'pip install -e . && smolvlm-jax generate --image examples/number.png "What number is written here?"'
    assert second == 'pip install -e ".[test]" && pytest'
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install -q -e ".[test]"\n' in ci and "\npytest\n" in ci


def test_convert_commands(tmp_path):
    lines = re.findall(r"^    smolvlm-jax ((?:convert|verify) .*?)(?:#.*)?$", README, re.M)
    assert len(lines) == 3
    for line in lines:
        arguments = [a.replace("runs/", f"{tmp_path}/") for a in shlex.split(line)]
        done = subprocess.run([sys.executable, "-m", "smolvlm_jax", *arguments], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr


def test_the_file_map_is_the_tree():
    block = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Files")[1].split("\n## ")[0]
    named = set(re.findall(r"^      (\w+(?:\.py|/))", block, re.M))
    modules = {p.name for p in (ROOT / "smolvlm_jax").glob("*.py") if not p.name.startswith("__")}
    packages = {f"{p.name}/" for p in (ROOT / "smolvlm_jax").iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert named == modules | packages


@pytest.mark.parametrize("document", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_and_named_files_exist(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (document.parent / target).exists(), target
    for target in re.findall(r"(?:examples|docs|tests|benchmarks|notebooks)/[\w/]+\.\w+", text):
        assert (ROOT / target).exists(), f"{document.name} names {target}"
