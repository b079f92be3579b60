"""Worker processes of the training data end with a parent that is killed."""

import subprocess
import sys
import time

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_worker_ends_with_its_parent(tmp_path):
    code = """
import multiprocessing, sys, time
from smolvlm_jax.train.worker import end_with_parent
def work():
    end_with_parent(0, 1)
    print("at work", flush=True)
    time.sleep(60)
if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work, daemon=True)
    worker.start()
    print(worker.pid, flush=True)
    worker.join()
"""
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "at work\n"
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
