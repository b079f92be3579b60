"""The commands of docs/evaluate.md."""

import re
import shlex
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
COMMANDS = re.findall(r"^    (\S.*)$", PAGE, re.M)


def test_commands_for_vlmevalkit_are_understood(monkeypatch, tmp_path, harnesses):
    from smolvlm_jax.evals import vlmevalkit
    from smolvlm_jax.evals.prompts import kind_of

    commands = [shlex.split(line) for line in COMMANDS if "evals.vlmevalkit" in line]
    assert len(commands) == 3
    (tmp_path / "run.py").touch()
    for command in commands:
        monkeypatch.setattr("sys.argv", [])
        assert vlmevalkit.main([str(tmp_path), *command[4:]]) == 0
        named = command[command.index("--data") + 1 :]
        assert all(kind_of(name) != "plain" for name in named if not name.startswith("-") and not name.isdigit())


def test_commands_for_lmms_eval_name_what_there_is():
    from smolvlm_jax.evals.prompts import TASKS

    commands = [shlex.split(line) for line in COMMANDS if "-m lmms_eval" in line]
    assert len(commands) == 3
    given = [command[command.index("--model_args") + 1] for command in commands]
    names = {pair.partition("=")[0] for text in given for pair in text.split(",")}
    assert names <= set(re.findall(r"`(\w+)`", PAGE.split("| name |")[1].split("\n\n")[0]))
    published = next(command for command, text in zip(commands, given, strict=True) if "published" in text)
    assert set(published[published.index("--tasks") + 1].split(",")) <= set(TASKS)


@pytest.mark.parametrize(
    "name", ["max_tiles", "do_image_splitting", "dtype", "attention", "kv_cache_dtype", "workers", "adapter"]
)
def test_arguments_that_the_page_names_are_taken(name):
    from smolvlm_jax.evals import settings

    assert name in PAGE and name in (*settings._ENGINE, *settings._PICTURES, "workers", "adapter")
