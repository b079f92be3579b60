"""Runs, each a process of its own, from which the world takes things away. Each ends with one line that says why, and started
again it goes on; in the end losses and weights are those of a run that nobody disturbed."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from train_helpers import ROOT, complaints, environment, recipe, small_checkpoint, write_records

from smolvlm_jax.train.claim import only_run
from smolvlm_jax.train.metrics import read_metrics

pytestmark = pytest.mark.thorough

STEPS = 8
COMMAND = "import sys; from smolvlm_jax.cli import main; sys.exit(main(sys.argv[1:]))"
# Trouble when the run writes its first line of metrics.
AT_FIRST_LINE = """
import os
from smolvlm_jax.train.metrics import Log
write = Log.write
def trouble(self, step, values):
    Log.write = write
    {trouble}
    write(self, step, values)
Log.write = trouble
"""
KILL = "os.kill(os.getpid(), 9)"
# At the moment before a checkpoint, or the exported model, would get its final name.
KILLED_IN_CHECKPOINT = f"import os, smolvlm_jax.train.checkpoints as c; c.Checkpoints._seal = lambda self: {KILL}"
KILLED_IN_EXPORT = f"import os, smolvlm_jax.directories as d; d._sync = lambda directory: {KILL}"


def run(home: Path, *words: str, patch: str = "") -> subprocess.CompletedProcess:
    """A run to its end. patch: code that its process runs first."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(home / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-c", f"{patch}\n{COMMAND}", "train", str(home / "recipe.yaml"), *words]
    return subprocess.run(command, env=environment(**cache), capture_output=True, text=True, timeout=300, cwd=ROOT)


def one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    lines = complaints(done.stderr)
    text = lines[-1] if lines else ""
    assert done.returncode == 1 and text.startswith("smolvlm-jax: ") and len(lines) == 1, done.stderr
    assert all(word in text for word in words), text


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A small checkpoint, data, a recipe, and `whole`, what an undisturbed run of it leaves."""
    folder = tmp_path_factory.mktemp("world")
    write_records(folder, 30)
    small_checkpoint(folder)
    recipe(folder, folder / "model", steps=STEPS, lora={"rank": 2})
    done = run(folder, f"output={folder / 'whole'}")
    assert done.returncode == 0, done.stderr
    return folder


def full_at(size: str) -> str:
    """Code for a full disk: the system refuses to let a file of the process grow beyond so many bytes."""
    return f"import os, resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))"


def test_a_run_to_which_everything_happens(home):
    out, data, base = home / "run", home / "train.jsonl", home / "model" / "model.safetensors"
    text, weights = data.read_bytes(), base.read_bytes()
    one_line(run(home, patch=full_at("500")), "File too large", "run.json")
    assert run(home, patch=KILLED_IN_CHECKPOINT).returncode == -9
    one_line(run(home, patch=full_at("12_000")), "cannot be written")
    truncated = f"os.truncate({str(data)!r}, {len(text) // 2})"
    one_line(run(home, patch=AT_FIRST_LINE.format(trouble=truncated)), "train.jsonl has changed")
    data.write_bytes(text)
    full = full_at("os.path.getsize(self._path) + 9")
    one_line(run(home, patch=AT_FIRST_LINE.format(trouble=full)), "File too large")
    with only_run(out):
        one_line(run(home), "another run is writing")
    replaced = f"open({str(base)!r}, 'r+b').write(b'x' * 8)"
    one_line(run(home, patch=AT_FIRST_LINE.format(trouble=replaced)), "model.safetensors changed")
    base.write_bytes(weights)
    assert run(home, patch=KILLED_IN_EXPORT).returncode == -9
    assert not (out / "model").exists()
    command = shlex.join([sys.executable, "-m", "smolvlm_jax", "train", str(home / "recipe.yaml")])
    done = subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], env=environment(), capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and (done.stdout, done.stderr) == (b"", b"")
    losses = [{line["step"]: line["loss"] for line in read_metrics(folder)} for folder in (out, home / "whole")]
    assert losses[0] == losses[1]
    ours, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (out, home / "whole"))
    assert ours == theirs
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (home / "whole").iterdir())
