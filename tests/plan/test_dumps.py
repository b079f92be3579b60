"""What compilers dump: gone after each program, and whatever is killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from smolvlm_jax.child import AVAILABLE, Child
from smolvlm_jax.errors import JobError
from smolvlm_jax.plan import CHIPS, PlanConfig, Workload, plan, run
from smolvlm_jax.plan.measure import Measurer, TooLarge

posix = pytest.mark.skipif(not AVAILABLE, reason="no child processes with a socket on this system")


def wait_until_gone(directory: Path) -> None:
    deadline = time.monotonic() + 30
    while directory.exists():
        assert time.monotonic() < deadline, f"{directory} was left behind"
        time.sleep(0.02)


@pytest.mark.parametrize("fits", [True, False])
def test_a_program_leaves_no_dump(tmp_path, fits):
    seen = []

    class Lowered:
        def compile(self):
            seen.extend(tmp_path.iterdir())
            (tmp_path / "2-mine-01-final_bundles.txt").write_text("of this program")
            if not fits:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory")
            return jax.jit(lambda x: x + 1).lower(jnp.zeros(3)).compile()

    (tmp_path / "1-earlier-01-final_bundles.txt").write_text("of what was compiled before")
    with nullcontext() if fits else pytest.raises(TooLarge):
        Measurer(CHIPS["v5e"], str(tmp_path)).cost("a sum", Lowered())
    assert not seen and not list(tmp_path.iterdir())


@posix
def test_a_killed_run_leaves_no_dump(tmp_path):
    """Killed so that nothing of its own can run; what it started to clean up belongs to another session."""
    code = """if True:
        import time
        from smolvlm_jax.plan.run import _dump_directory
        with _dump_directory() as made:
            print(made, flush=True)
            time.sleep(60)
    """
    environment = dict(os.environ, TMPDIR=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        made = Path(process.stdout.readline().strip())
        (made / "dump.txt").write_text("much")
        process.send_signal(signal.SIGKILL)
    assert made.parent == tmp_path
    wait_until_gone(made)


@posix
@pytest.mark.thorough
def test_a_killed_compiler_leaves_no_dump(tmp_path, monkeypatch):
    started = []

    class Watched(Child):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    def kill(*program):
        (made,) = tmp_path.iterdir()
        (made / "dump.txt").write_text("much")
        started[0].kill()

    monkeypatch.setattr(run, "Child", Watched)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = PlanConfig(model="tiny", on="here", slots=(8,), ring_lengths=(256,), workload=Workload(tiles=1, prompt=40, new=20))
    with pytest.raises(JobError, match="ended without an answer"):
        plan(config, kill)
    assert not list(tmp_path.iterdir())
