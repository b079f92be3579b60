"""The doubles of the harnesses, and pictures of numbers with what a batch job answers to them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import harness_double
import pytest


@pytest.fixture
def harnesses(monkeypatch):
    harness_double.install(monkeypatch)


@pytest.fixture(scope="session")
def numbers(tmp_path_factory) -> Path:
    """A folder with tasks of lmms-eval and their documents: 16 pictures of numbers."""
    lmms_numbers = pytest.importorskip("lmms_numbers", reason="the digits need scikit-learn")
    folder = tmp_path_factory.mktemp("numbers")
    lmms_numbers.write_tasks(folder, 16, 2024)
    return folder


@pytest.fixture(scope="session")
def documents(numbers) -> list[dict]:
    return [json.loads(line) for line in (numbers / "numbers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def batch_answers(numbers, tmp_path_factory) -> dict[str, str]:
    """What a batch job answers to the documents, by their ids."""
    folder = tmp_path_factory.mktemp("answers")
    command = ["batch", numbers / "numbers.jsonl", folder, "--model", "tiny", "--max-new-tokens", "20", "--workers", "1"]
    subprocess.run([sys.executable, "-m", "smolvlm_jax", *command, "--quiet"], check=True, env={**os.environ, "XLA_FLAGS": ""})
    rows = [json.loads(line) for part in sorted(folder.glob("part-*.jsonl")) for line in part.read_text().splitlines()]
    return {row["id"]: row["text"] for row in rows}
