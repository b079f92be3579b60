"""Compiled programs in an object store: jax's own cache, through etils and fsspec."""

import os
import subprocess
import sys

import pytest

from smolvlm_jax.compilation_cache import keep_compiled_programs
from smolvlm_jax.errors import CheckpointError, InputError

pytestmark = pytest.mark.network
PROGRAM = """
import jax
found = []
jax.monitoring.register_event_listener(lambda event, **given: found.append(event))
from smolvlm_jax.compilation_cache import keep_compiled_programs
keep_compiled_programs()
jax.jit(lambda x: (x @ x).sum() + 41)(jax.numpy.ones((8, 8)))
print(found.count("/jax/compilation_cache/cache_hits"))
"""


def hits(where: str) -> int:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": where,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks the store by gRPC, which the emulator does not speak
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    return int(done.stdout)


@pytest.mark.thorough
def test_a_program_is_compiled_once_for_all_processes(bucket):
    where = f"{bucket}/compiled"
    assert hits(where) == 0 and list((bucket / "compiled").entries())
    assert hits(where) > 0


def test_a_store_that_is_not_there_is_one_line(bucket, front, monkeypatch, impatient):
    for where, error, message in (
        ("az://data/compiled", InputError, "names no bucket: it is SCHEME://BUCKET/KEY"),
        (
            f"{front.kind}://nowhere/compiled",
            CheckpointError,
            rf"^cannot read {front.kind}://nowhere/compi.*: no such .*bucket",
        ),
    ):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", where)
        with pytest.raises(error, match=message):
            keep_compiled_programs()
    with monkeypatch.context() as bounded:
        bounded.setenv("JAX_COMPILATION_CACHE_DIR", f"{bucket}/compiled")
        bounded.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "1000000")
        with pytest.raises(InputError, match="JAX_COMPILATION_CACHE_MAX_SIZE bounds a cache on a disk"):
            keep_compiled_programs()
    front.denied.add(bucket.bucket)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", f"{bucket}/compiled")
    with pytest.raises(CheckpointError, match="the store denies access"):
        keep_compiled_programs()
