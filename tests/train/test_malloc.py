"""Freed memory is kept where that is wanted, and left alone elsewhere."""

import subprocess
import sys

import pytest
from train_helpers import environment

PROGRAM = """
import resource, sys
from smolvlm_jax.train.malloc import keep_freed_memory
assert keep_freed_memory() or "without" in sys.argv
assert "jax" not in sys.modules
import numpy as np
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**25)  # 256 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")
def test_a_second_allocation_faults_no_page():
    def run(*words, **more) -> int:
        return int(subprocess.run(
            [sys.executable, "-c", PROGRAM, *words], env=environment(**more), capture_output=True, text=True, check=True
        ).stdout)  # fmt: skip

    assert run() < 100
    # On a host of accelerators: as it was, except where nothing but the CPU is installed.
    from importlib.util import find_spec

    if find_spec("libtpu") is not None:
        assert run("without", JAX_PLATFORMS="") > 100
