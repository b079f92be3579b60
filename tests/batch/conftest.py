"""Records that several of these tests ask."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def lines(tmp_path) -> Path:
    """100 records: one in ten is a faulty one."""
    path = tmp_path / "records.jsonl"
    text = lambda n: "{" if n % 10 == 4 else json.dumps({"id": n, "prompt": f"{n}?", "max_new_tokens": 1 + n % 7, "label": n})
    path.write_text("".join(text(n) + "\n" for n in range(1, 101)))
    return path
