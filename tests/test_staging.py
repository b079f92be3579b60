"""Temporary folders: whatever ends a process but SIGKILL, nothing of them is left."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from smolvlm_jax.staging import temporary_folder
from smolvlm_jax.train import runner
from smolvlm_jax.train.recipes import load_recipe

STOPPING = """if True:
    import threading
    from smolvlm_jax.staging import temporary_folder
    from smolvlm_jax.batch.signals import stop_on_signals
    from smolvlm_jax.train.stopping import told_to_stop

    class Job:
        answering = False
        stop = park = lambda self: None
        kept = lambda self: "nothing"

    with temporary_folder() as folder, {block}:
        (folder / "file").write_text("x")
        print("ready", flush=True)
        threading.Event().wait(60)
"""


def test_a_folder_goes_although_a_thread_writes_into_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    remove = shutil.rmtree

    def interrupted(path, **kwargs):
        monkeypatch.setattr(shutil, "rmtree", remove)
        remove(path / "part", **kwargs)
        (path / "late").write_text("x")  # after the folder was listed: it is not empty, and stays

    with temporary_folder() as folder:
        (folder / "part").mkdir()
        monkeypatch.setattr(shutil, "rmtree", interrupted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("block", "answers"),
    [("told_to_stop(lambda line: print(line, flush=True))", 1), ("stop_on_signals(Job())", 0)],
    ids=["train", "batch"],
)
def test_a_process_that_ends_at_once_leaves_no_folder(tmp_path, block, answers):
    """`os._exit` runs no `finally`. Of training it is the second signal that ends the process, of a batch job the first."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING.format(block=block)],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ, TMPDIR=str(tmp_path)),
    )
    assert process.stdout.readline() == "ready\n" and len(list(tmp_path.iterdir())) == 1
    for _ in range(answers):
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline().startswith("stopping: ")
        threading.Event().wait(0.6)  # what comes sooner is the same stop
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143 and not list(tmp_path.iterdir())


@pytest.mark.network
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_run_that_is_ended_before_it_trains_leaves_nothing(number, kind, bucket, tmp_path, monkeypatch):
    """Neither the directory that is sent to a store nor one of its own; and signals are as before."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, seen = signal.getsignal(number), []

    def end(config, mesh, directory: Path, *args, **kwargs):
        (directory / "config.json").write_text("{}")
        seen.append(directory)
        os.kill(os.getpid(), number)
        threading.Event().wait(20)

    monkeypatch.setattr(runner, "_train", end)
    for output in (bucket / "run", tmp_path / "deep" / "run"):
        config = load_recipe("tiny-numbers", ["data.batch_size=4", "data.train=nothing.jsonl", f"output={output}"])
        with pytest.raises(kind):
            runner.run(config, progress=False)
        assert seen.pop().is_relative_to(tmp_path) and not list(tmp_path.iterdir())
    assert signal.getsignal(number) is before
