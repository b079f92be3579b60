"""Worker processes of the training data end with a parent that is killed, and not before it."""

import os
import signal
import subprocess
import sys
import time

import pytest
from train_helpers import environment


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_worker_ends_with_its_parent(tmp_path):
    code = """
import multiprocessing, sys, time
from smolvlm_jax.train.worker import end_with_parent, unstopped
def work():
    end_with_parent(0, 1)
    print("at work", flush=True)
    time.sleep(60)
if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work, daemon=True)
    with unstopped():
        worker.start()
    print(worker.pid, flush=True)
    worker.join()
"""
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "at work\n"
    for number in (signal.SIGTERM, signal.SIGINT):  # as all processes of a group receive them
        os.kill(pid, number)
    time.sleep(0.1)
    os.kill(pid, 0)
    with open(f"/proc/{pid}/stat") as file:
        assert file.read().rpartition(")")[2].split()[0] != "Z"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    raise AssertionError("the worker outlives its parent")


@pytest.mark.parametrize("release", ["", "release_semaphores(); "])
def test_semaphores_of_a_process_that_ends_at_once_are_removed(release):
    """Without it Python's resource tracker warns, as it does of what else is left."""
    code = (
        "import multiprocessing, os; from smolvlm_jax.train.worker import release_semaphores; "
        f"queue = multiprocessing.get_context('spawn').Queue(2); {release}os._exit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3 and ("leaked semaphore" in done.stderr) == (not release), done.stderr


STOPPED = """
import sys, time
from smolvlm_jax.train.stopping import told_to_stop
step = {step}
with told_to_stop(lambda line: print(line, flush=True), lambda: step):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("step", "kept"),
    [(None, "nothing was saved"), (1200, "step 1,200 is saved, and the same command goes on from there")],
)
def test_a_second_stop_ends_at_once_and_says_what_is_saved(step, kept):
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED.format(step=step)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        process.terminate()
        time.sleep(0.001)
    assert process.stdout.readline().startswith("stopping: the step under way")
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == f"ended at once; {kept}\n"
    assert process.returncode == 130
