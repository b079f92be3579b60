"""A job that is told to stop, or that is stuck, keeps what is finished."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import batch_corpus as corpus
import pytest
from batch_double import batch, run

from smolvlm_jax.checkpoint import resolve

TINY = str(resolve("tiny"))
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.thorough)]
)
def test_preemption_loses_nothing(tmp_path, number, code):
    """With the real engine: a signal in the middle, the code of it within 20 seconds, and every row used again."""
    source, out = tmp_path / "records.jsonl", tmp_path / "out"
    records = [{"id": n, "prompt": f"{n}?", "max_new_tokens": 40, "ignore_eos": True} for n in range(600)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ("--shard-size", "200", "--workers", "1")
    process = corpus.start(source, out, *flags)
    assert corpus.kill_after(process, out, 150, number)
    begin = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and time.monotonic() - begin < 20
    assert "run the same command again" in said and "Traceback" not in said
    kept = corpus.finished_rows(out)
    assert kept >= 150
    process = corpus.start(source, out, *flags)
    _, said = process.communicate(timeout=300)
    summary = corpus.summary_of(out)
    assert process.returncode == 0, said
    assert summary["records"] == 600 and summary["new_records"] == 600 - kept
    assert [row["id"] for row in corpus.rows_of(out)] == list(range(600))


STUCK = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from batch_double import Double
from test_job import batch
from smolvlm_jax.batch.signals import stop_on_signals

def stuck(count):
    if count == 35:
        print("stuck", flush=True)
        {hang}

with batch(Path({lines!r}), Path({out!r}), Double(after=stuck)) as job, stop_on_signals(job, grace=1.0):
    job.run()
"""


@pytest.mark.parametrize("hang", ["time.sleep(1000)", "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"])
def test_a_job_that_is_stuck_on_the_device_is_parked(lines, tmp_path, hang):
    """The second hang computes inside C, where no signal handler of Python's runs, as in a long compilation."""
    out = tmp_path / "out"
    code = STUCK.format(tests=str(Path(__file__).parent), lines=str(lines), out=str(out), hang=hang)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=corpus.environment()
    )
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=15)
    assert process.returncode == 143
    assert corpus.finished_rows(out) >= 35
    assert run(lines, out)["records"] == 100 and len(corpus.rows_of(out)) == 100


def test_a_job_in_a_thread_leaves_signals_alone(lines, tmp_path):
    from smolvlm_jax.batch.signals import stop_on_signals

    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with batch(lines, tmp_path / "out") as job, stop_on_signals(job):
            found.append(signal.getsignal(signal.SIGTERM))
            found.append(job.run()["records"])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, 100]


def test_signals_are_as_before_when_the_job_is_over(lines, tmp_path):
    from smolvlm_jax.batch.signals import stop_on_signals

    before, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    with batch(lines, tmp_path / "out") as job, stop_on_signals(job) as came:
        job.run()
    assert came == [] and signal.getsignal(signal.SIGTERM) is before and threading.active_count() == threads
