"""Every block of Python in docs/preprocessing.md runs, top to bottom; and the benchmark does."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from smolvlm_jax.processing import http

from .conftest import tri_img

ROOT = Path(__file__).parents[2]


def test_preprocessing_page(checkpoint, data, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "preprocessing.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)
    assert len(blocks) >= 9 and page.count("```") == 2 * len(blocks)
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    shutil.copy(data / "clip.avi", tmp_path / "clip.avi")
    Image.fromarray(tri_img(48, 64)).save(tmp_path / "cat.jpg")
    Image.fromarray(tri_img(64, 48)).save(tmp_path / "dog.jpg")
    monkeypatch.chdir(tmp_path)
    true_fetch = http.fetch_url

    def fetch_url(url, limits, max_bytes):
        if limits.urls and url == "https://example.org/cat.jpg":
            return (tmp_path / "cat.jpg").read_bytes()
        return true_fetch(url, limits, max_bytes)

    monkeypatch.setattr(http, "fetch_url", fetch_url)
    names = {"__name__": "page"}
    for number, block in enumerate(blocks):
        line = page[: page.index(block)].count("\n")
        exec(compile("\n" * line + block, f"docs/preprocessing.md, block {number}", "exec"), names)


@pytest.mark.thorough
def test_benchmark_runs():
    """And the memory it measures stays within its bound."""
    script = str(ROOT / "benchmarks" / "preprocess.py")
    command = [sys.executable, script, "--runs", "1", "--skip-reference", "--sizes", "640x480", "1920x1080"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for words in ("resizes/uint8", "two threads", "median share of the resizes"):
        assert words in done.stdout
    shares = [int(share) for share in re.findall(r"^memory.*\((\d+)%\)$", done.stdout, re.M)]
    assert len(shares) == 2 and all(0 < share <= 100 for share in shares)
