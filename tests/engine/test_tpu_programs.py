"""What the TPU compiler makes of the engine's programs, on a slice that is not there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler: pip install 'smolvlm-jax[test]' on x86-64 Linux"
)


def compile_for_tpu(*arguments: str) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    child = subprocess.run(
        [sys.executable, Path(__file__).parent / "tpu_programs.py", *arguments],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


# Columns and slots of four chips: the engine's default rings for the 256M, and what else the figures in docs/design.md are for.
RINGS = [pytest.param(*ring, marks=pytest.mark.thorough) for ring in (("256", "1024"), ("2048", "256"))]
MORE_RINGS = [("256", "256"), ("1024", "312"), ("2048", "156"), ("4096", "76"), ("8192", "36")]


@pytest.mark.parametrize(("ring", "slots"), [*RINGS, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE_RINGS)])
def test_a_decode_step_reads_weights_and_cache_and_little_else(ring, slots):
    """The 256M in bf16 on v5e:2x2. Written naively it would touch 8 times as much."""
    figures = compile_for_tpu("SmolVLM-256M-Instruct", "v5e:2x2", ring, slots, "step")
    assert figures["bytes_accessed"] <= 2.5 * (figures["weights"] + figures["cache"]), figures
    assert figures["aliased"] >= figures["ring"], "the cache is updated in place"
    assert figures["temporaries"] <= 120e6, "the embedding table, laid out for the lookup, and no copy of the cache"
    assert figures["kernels"] == 30, "a kernel for each layer"
    assert not any(figures["collectives"].values()), "decoding needs no word from the other chips"


@pytest.mark.slow
@pytest.mark.parametrize(("program", "collectives"), [
    (("decode", "1024", "1"), 1),  # all chips stop together
    (("insert", "512", "1024"), 0),
    (("prefill", "1024"), 2),
    (("encode", "32"), 1),  # every chip may want any tile
])  # fmt: skip
def test_the_engines_programs_compile(program, collectives):
    figures = compile_for_tpu("SmolVLM-256M-Instruct", "v5e:2x2", "1024", "256", *program)
    assert sum(figures["collectives"].values()) <= collectives, figures
    if program[0] in ("decode", "insert"):
        assert figures["aliased"] >= figures["ring"], figures


@pytest.mark.slow
@pytest.mark.parametrize(("size", "topology", "ring", "slots"), [
    ("SmolVLM-500M-Instruct", "v5e:2x2", "1024", "128"),
    ("SmolVLM-Instruct", "v5e:2x2", "512", "16"),
    ("SmolVLM-256M-Instruct", "v5p:2x2x1", "1024", "256"),
    ("SmolVLM-256M-Instruct", "v6e:2x2", "256", "1024"),
])  # fmt: skip
def test_other_sizes_and_chips_decode_by_the_kernel_too(size, topology, ring, slots):
    figures = compile_for_tpu(size, topology, ring, slots, "step")
    assert figures["bytes_accessed"] <= 2.5 * (figures["weights"] + figures["cache"]), figures
    assert figures["aliased"] >= figures["ring"] and figures["kernels"] >= 24, figures
