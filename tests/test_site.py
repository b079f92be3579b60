"""The pages of the site: all of them are in its navigation, and what they show is run. `.ci/site` builds it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from smolvlm_jax.listings import list_models

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_every_page_is_in_the_navigation():
    named = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    pages |= {f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}  # made by docs/hooks/notebooks.py
    assert sorted(named) == sorted(pages)


def test_every_extra_is_on_the_page_about_installation():
    import tomllib

    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    rows = re.findall(r"^\| (`.*?`) \|", (DOCS / "install.md").read_text(), re.M)
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert named - extras == set() and extras - named <= {"pyav", "test-without-torch"}


@pytest.mark.thorough
@pytest.mark.parametrize("page", [DOCS / "index.md", ROOT / "README.md"], ids=["index", "README"])
def test_the_table_of_models_has_their_figures(page):
    table = page.read_text(encoding="utf-8").split("## Models")[1].split("##")[0]
    for name, text in list_models():
        row = next(line for line in table.splitlines() if f"{name.rpartition('/')[2]}" in line)
        count, tokens, positions = re.search(r"([\d,.]+) M .* is (\d+) tokens; up to ([\d,]+) tokens", text).groups()
        cells = [cell.strip() for cell in row.split("|")]
        assert abs(float(cells[2].split()[0].replace(",", "")) - float(count.replace(",", ""))) < 0.6, name
        assert (cells[5], cells[6]) == (tokens, positions), name


@pytest.mark.thorough
def test_the_quickstart_runs_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "quickstart.md").read_text(), re.S)
    assert len(blocks) == 5
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, cwd=ROOT, env={**os.environ}, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("page", ["index.md", "quickstart.md"])
def test_commands_print_what_the_page_shows(page):
    blocks = re.findall(r"```console\n(.*?)```", (DOCS / page).read_text(), re.S)
    shown = [pair for block in blocks for pair in re.findall(r"^\$ (.*)\n((?:[^$\n].*\n)*)", block, re.M)]
    assert shown
    for line, output in shown:
        words = shlex.split(line.partition("&& ")[2] or line)
        assert words[0] == "smolvlm-jax"
        done = subprocess.run(
            [sys.executable, "-m", *["smolvlm_jax", *words[1:]]], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert (done.returncode, done.stdout) == (0, output), done.stderr
