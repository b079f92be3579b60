"""Every command on every page can be read by a shell and by our command line; every snippet is run by some test.

Commands that need no accelerator, network or large model are executed by the tests named in EXECUTED and by `.ci/first-hour`.
"""

import ast
import re
import subprocess
import sys

import pytest
from page_commands import PAGES, ROOT, commands, problems

# Pages with Python, and the test that runs all of it.
EXECUTED = {
    "README.md": "tests/test_docs.py",
    "batch.md": "tests/batch/test_docs.py",
    "convert.md": "tests/convert/test_docs.py",
    "family.md": "tests/convert/test_docs.py",
    "for-jax.md": "tests/test_pages.py",
    "from-transformers.md": "tests/doors/test_reference_page.py",
    "preprocessing.md": "tests/processing/test_docs.py",
    "quickstart.md": "tests/test_site.py",
    "train.md": "tests/train/test_docs.py",
}


def test_every_command_can_be_read():
    found = {path.name: list(commands(path)) for path in PAGES}
    assert sum(map(len, found.values())) > 100
    assert all(found[name] for name in ("README.md", "install.md", "tpu.md", "gke.md", "train.md", "batch.md", "evaluate.md"))
    wrong = [f"{name}: {line}: {what}" for name, lines in found.items() for line in lines for what in problems(line)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("smolvlm-jax batch in out --modle tiny", "is refused"),
        ("smolvlm-jax batch photos answers --model tiny", "has no --prompt"),
        ("smolvlm-jax train lora-256m data.trian=a.jsonl", "is refused"),
        ('pip install -e ".[hubb]"', "there is no extra hubb"),
        ("python examples/nothing.py", "does not exist"),
        ("python benchmarks/speed.py --one-corr", "has no --one-corr"),
        ("cd x && wget y", "wget is no command"),
    ],
)
def test_a_wrong_command_is_found(line, what):
    assert any(what in problem for problem in problems(line)), list(problems(line))


def test_every_page_with_python_is_run_by_a_test():
    pages = {
        path.name: re.findall(r"^ *```python\n(.*?)^ *```", path.read_text(encoding="utf-8"), re.M | re.S) for path in PAGES
    }
    assert {name for name, blocks in pages.items() if blocks} == set(EXECUTED)
    for name, test in EXECUTED.items():
        assert name in (ROOT / test).read_text(), f"{test} runs {name}"
        for block in pages[name]:
            ast.parse(block)


@pytest.mark.thorough
def test_the_page_for_users_of_jax_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "for-jax.md").read_text(encoding="utf-8"), re.S)
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
