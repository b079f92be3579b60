"""What a job says while it works, read from its standard error: on a terminal, and where there is none."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smolvlm_jax.progress import Figures, Progress, clock_text

TESTS = Path(__file__).parent
# A job whose device takes seconds for each answer, with a log line after one second of silence instead of 14.
SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {batch!r})
from batch_double import Double
from smolvlm_jax.batch import job as jobs, pool, sinks, signals, workers
from smolvlm_jax.engine import SamplingParams
from smolvlm_jax.locate import resolve
from smolvlm_jax.progress import Progress
from smolvlm_jax.records.sources import open_source
from smolvlm_jax.terminal import say

def engine():
    progress.tell("compiling", 3, 10)
    time.sleep({compile})
    return Double(pause={pause})

source, out = open_source(Path({lines!r})), Path({out!r})
out.mkdir(exist_ok=True)
setup = workers.Setup(str(resolve("tiny")), source.parse, SamplingParams())
with Progress(log_seconds=1.0) as progress, pool.WorkerPool(setup, 0) as workers:
    job = jobs.BatchJob(source, out, sinks.open_sink("jsonl"), jobs.Shard(size=3), workers, engine, progress=progress)
    with signals.stop_on_signals(job, grace=1.0, notify=say):
        job.run()
"""


def start(tmp_path: Path, stderr: int, *, compile: float = 3.5, pause: float = 1.5) -> subprocess.Popen:
    lines = tmp_path / "records.jsonl"
    lines.write_text("".join(f'{{"id": {n}, "prompt": "?", "max_new_tokens": 2}}\n' for n in range(3)))
    code = SLOW.format(batch=str(TESTS / "batch"), lines=str(lines), out=str(tmp_path / "out"), compile=compile, pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], stderr=stderr, stdout=subprocess.DEVNULL)


def read(descriptor: int, seconds: float = 60) -> list[tuple[float, str]]:
    """What arrives until the end, each piece with the time since the one before it."""
    found, last, end = [], time.monotonic(), time.monotonic() + seconds
    while time.monotonic() < end:
        if not select.select([descriptor], [], [], 0.1)[0]:
            continue
        try:
            piece = os.read(descriptor, 65536)
        except OSError:  # a terminal whose other side is closed
            break
        if not piece:
            break
        now = time.monotonic()
        found.append((now - last, piece.decode()))
        last = now
    return found


def test_the_line_has_share_clock_time_left_and_work():
    with Progress(show=False) as progress:
        progress.tell("compiling", 3, 10)
        assert progress.line() == "[0:00] compiling 3 of 10"
        progress.follow(lambda: Figures(0.25, 4000, "2 errors"))
        assert progress.line() == "25.0% [0:00<1:06:40] compiling 3 of 10, 2 errors"
    assert clock_text(59.9) == "0:59" and clock_text(3600) == "1:00:00"


@pytest.mark.thorough
@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_silent(tmp_path, terminal):
    """A clock that ticks twice a second on a terminal, elsewhere a line a second, also while a program is compiled."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    process = start(tmp_path, theirs)
    os.close(theirs)
    pieces = read(ours)
    os.close(ours)
    assert process.wait(timeout=30) == 0
    said = "".join(text for _, text in pieces)
    assert max(gap for gap, _ in pieces[1:]) < 5, "of a loaded machine; the line is due after one second"
    clocks = [int(seconds) for seconds in re.findall(r"\[0:(\d\d)[\]<]", said)]
    assert clocks == sorted(clocks) and len(set(clocks)) >= 4
    assert "compiling 3 of 10 (0:02)" in said and re.search(r"33\.3% \[0:\d\d<0:\d\d\]", said)
    assert ("\r" in said and "\x1b[K" in said) if terminal else ("\r" not in said and said.endswith("\n"))


@pytest.mark.thorough
def test_an_interruption_is_answered_at_once(tmp_path):
    """With what is saved and how to go on; nothing is under way here that could be waited for."""
    ours, theirs = os.pipe()
    process = start(tmp_path, theirs, compile=60)
    os.close(theirs)
    while b"compiling" not in os.read(ours, 65536):
        pass
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    said = "".join(text for _, text in read(ours))
    os.close(ours)
    assert process.wait(timeout=30) == 130 and time.monotonic() - begin < 5
    assert f"0 records are saved in {tmp_path / 'out'}; run the same command again to go on" in said
