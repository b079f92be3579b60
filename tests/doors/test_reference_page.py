"""docs/from-transformers.md: its tables are the signatures, and its example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "from-transformers.md"


@pytest.fixture
def pages():
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    sys.path.insert(0, str(Path(__file__).parent))
    import reference_page

    if transformers.__version__ != reference_page.VERSION:
        pytest.skip(f"the page describes transformers {reference_page.VERSION}, this is {transformers.__version__}")
    return reference_page


def test_the_tables_are_the_signatures(pages):
    text = PAGE.read_text(encoding="utf-8")
    assert pages.page(text) == text, "a signature has changed: python tests/doors/reference_page.py, and read what it wrote"


def test_a_signature_that_drifts_is_noticed(pages, monkeypatch):
    text = PAGE.read_text(encoding="utf-8")
    for kind, name in ((pages.ours.SmolVLMProcessor, "apply_chat_template"), (pages.ours.SmolVLMTextModel, "__call__")):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, lambda self, conversation, brand_new=3: None)
            assert "brand_new" in pages.page(text) != text


def test_everything_of_the_reference_has_a_word_beside_it(pages):
    rows = [line for line in pages.tables().splitlines() if line.startswith("| ") and "argument" not in line]
    assert len(rows) > 200
    without = [row for row in rows if not row.split("|")[4].strip()]
    assert not without


@pytest.mark.thorough
def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("Assistant: 4207"), done.stderr


@pytest.mark.thorough
def test_the_examples_of_the_documentation_run():
    command = [sys.executable, "examples/documentation.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.endswith("3, 512, 512)") for line in lines)
    assert lines[-1] == "(1152, 2)" and done.stdout.count("Assistant:") == 5
