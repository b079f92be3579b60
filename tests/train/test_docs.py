"""docs/train.md is run: its Python, its commands' words, its table of recipes."""

import re
import subprocess
import sys

import pytest
from train_helpers import ROOT, environment, write_records

from smolvlm_jax.cli import _parser
from smolvlm_jax.train.recipes import load_recipe, recipe_names

TEXT = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")


@pytest.mark.thorough
def test_python(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    write_records(tmp_path / "data", 12, name="example")
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.thorough
def test_the_recipe_of_ones_own(tmp_path):
    (block,) = re.findall(r"```yaml\n(model: .*?)```", TEXT, re.S)
    write_records(tmp_path / "data", 12, name="example")
    (tmp_path / "mine.yaml").write_text(block)
    command = [sys.executable, "-m", "smolvlm_jax", "train", "mine.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 0 and (tmp_path / "runs/mine/model/model.safetensors").exists(), done.stderr
    assert (tmp_path / "runs/mine/adapter").is_dir() and "step 4" in done.stdout


def test_commands_and_settings():
    for line in re.findall(r"^    smolvlm-jax (train .*)$", TEXT, re.M):
        _parser().parse_args(line.replace("[key=value …]", "").split())
    for block in re.findall(r"```yaml\n(?!model: )(.*?)```", TEXT, re.S):
        name, _, value = block.strip().partition(": ")
        load_recipe("lora-256m", [f"{name}={value}"])
    for words in re.findall(r"`(\w[\w.]*): (\[?\{.*?\}\]?|\w+)`", TEXT):
        if words[0] not in ("mesh", "type"):
            # Random weights have no adapters.
            load_recipe("tiny-numbers" if words[0] == "weights" else "lora-256m", ["=".join(words)])


def test_the_table_names_the_recipes():
    table = TEXT.split("## Recipes")[1].split("###")[0]
    assert set(re.findall(r"^\| `([\w.-]+)`", table, re.M)) == set(recipe_names())
