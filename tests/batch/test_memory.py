"""Memory and the line on a terminal: what a job shows and takes does not grow with its input."""

import json
import os
import re
import time

import pytest

psutil = pytest.importorskip("psutil", reason="watches processes with psutil: pip install 'smolvlm-jax[test]'")

import batch_corpus as corpus
import numpy as np
from PIL import Image


@pytest.mark.thorough
def test_a_hundred_thousand_records_in_the_memory_of_a_thousand(tmp_path):
    """Text only, one new token: resident memory grows by at most 50 MB from record 1,000 to record 100,000."""
    source, out = tmp_path / "records.jsonl", tmp_path / "out"
    with open(source, "w") as file:
        for n in range(100_000):
            file.write(json.dumps({"id": n, "prompt": f"{n} and {n * 7 % 9999}: which number is larger?"}) + "\n")
    process = corpus.start(source, out, "--max-new-tokens", "1", "--workers", "1", "--shard-size", "1000", "--quiet")
    job, early, late = psutil.Process(process.pid), 0, 0
    while process.poll() is None:
        parts = len(list(out.glob("part-*")))
        try:
            resident = job.memory_info().rss
        except psutil.NoSuchProcess:
            break
        if parts:
            early = early or resident
        if parts >= 90:
            late = max(late, resident)
        time.sleep(0.1)
    printed, said = process.communicate()
    assert process.returncode == 0 and printed == "", said
    summary = corpus.summary_of(out)
    assert summary["records"] == summary["answers"] == 100_000
    assert early and late
    print(
        f"{early / 1e6:.0f} MB at record 1,000, {late / 1e6:.0f} MB at 100,000, {summary['records_per_second']:.0f} records/s"
    )
    assert late - early <= 50e6


@pytest.mark.thorough
@pytest.mark.skipif(os.name != "posix", reason="pretends a terminal with a pseudo terminal")
def test_the_line_on_a_terminal(tmp_path):
    import pty
    import termios

    source, out = tmp_path / "records.jsonl", tmp_path / "out"
    lines = [json.dumps({"id": n, "prompt": f"{n}?", "max_new_tokens": 2}) for n in range(1500)]
    lines.insert(700, "{")
    source.write_text("\n".join(lines))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, 160))
    process = corpus.start(source, out, "--shard-size", "500", "--workers", "1", stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not piece:
            break
        shown += piece
    process.communicate()
    os.close(ours)
    text = shown.decode()
    assert process.returncode == 0, text
    assert re.search(r"% \[.*records/s.*tiles/s.*tokens/s.*device idle \d+%", text), text
    assert re.search(r"\b1 error\b", text) and text.count("device idle") > 1, "the line moves while the job runs"


def peak(source, out, *flags: str) -> tuple[int, dict]:
    """(most resident bytes of all processes of a job at a time, its summary)."""
    process, most = corpus.start(source, out, "--quiet", "--max-error-rate", "1", *flags), 0
    job = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            most = max(most, sum(each.memory_info().rss for each in (job, *job.children(recursive=True))))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return most, corpus.summary_of(out)


@pytest.mark.slow
def test_records_of_many_pictures_wait_behind_slow_ones_in_bounded_memory(tmp_path):
    """2,000 records of ten pictures, four workers: at most 1.5 GB in all processes."""
    rng = np.random.default_rng(0)
    for n in range(10):
        Image.fromarray(rng.integers(0, 255, (300, 400, 3), np.uint8)).save(tmp_path / f"{n}.png")
    slow = {"prompt": "1?", "max_new_tokens": 900, "ignore_eos": True, "repetition_window": 0}
    wide = {"prompt": "?", "images": [f"{n}.png" for n in range(10)], "max_new_tokens": 2}
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [slow] * 4 + [wide] * 2000))
    flags = ("--workers", "4", "--slots", "1", "--ring-lengths", "1024")
    most, summary = peak(tmp_path / "records.jsonl", tmp_path / "out", *flags)
    print(f"{most / 1e6:.0f} MB")
    assert summary["answers"] == 2004 and most <= 1.5e9


@pytest.mark.thorough
def test_a_long_text_is_refused_in_little_memory(tmp_path):
    """A text of 24 MB adds at most 300 MB to all processes."""
    flags = ("--workers", "1", "--slots", "4", "--ring-lengths", "256", "--max-new-tokens", "3")
    most = []
    for size in (0, 0, 24):  # the first compiles
        texts = ["one?", *(["number 7 " * (size * 111_111)] if size else ()), "two?"]
        lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
        (tmp_path / "records.jsonl").write_text("".join(lines))
        found, summary = peak(tmp_path / "records.jsonl", tmp_path / f"out{len(most)}", *flags)
        most.append(found)
        assert summary["errors"] == bool(size)
    assert "prompt too long" in summary["first_errors"][0]["error"]
    print([f"{bytes / 1e6:.0f} MB" for bytes in most])
    assert most[2] - most[1] <= 300e6
