"""Memory is bounded by the largest tensor, not by the checkpoint. benchmarks/convert.py measures the same on 9 GB."""

import os
import subprocess
import sys
from pathlib import Path

import convert_helpers as helpers
import numpy as np
import pytest

from smolvlm_jax.config import SmolVLMConfig, SmolVLMTextConfig, SmolVLMVisionConfig
from smolvlm_jax.convert.leaves import Leaf
from smolvlm_jax.convert.opened import parameter_shapes
from smolvlm_jax.convert.to_hf import write_hf

CONVERT = """
import sys
from smolvlm_jax.convert.conversion import convert
convert(sys.argv[1], sys.argv[2], quiet=True)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


class Ones(Leaf):
    def __init__(self, path, shape):
        self.path, self.shape, self.dtype = path, shape, np.dtype(np.float32)

    def read(self, region=None, dtype=None):
        return np.ones(self.shape if region is None else [r.stop - r.start for r in region], dtype or self.dtype)


def make(directory: Path, layers: int) -> Path:
    """A checkpoint of `layers` text layers of 67 MB each; its largest tensors have 17 MB."""
    text = SmolVLMTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16, vocab_size=160, head_dim=64
    )
    config = SmolVLMConfig(SmolVLMVisionConfig(**helpers.VISION), text, scale_factor=2, image_token_id=150)
    config.save_pretrained(directory)
    write_hf(directory, {path: Ones(path, shape) for path, shape in parameter_shapes(config).items()})
    return directory


def peak(source: Path, target: Path) -> float:
    """Peak resident MB of a fresh process that converts; as it sees it itself, because `ru_maxrss` starts at its parent's."""
    command = [sys.executable, "-c", CONVERT, source, target]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout) / 1024


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_six_times_the_weights_take_no_more_memory(tmp_path):
    peaks = {}
    for layers in (1, 6):
        source = make(tmp_path / f"hf-{layers}", layers)
        orbax = peaks["orbax", layers] = peak(source, tmp_path / f"orbax-{layers}")
        back = peaks["hf", layers] = peak(tmp_path / f"orbax-{layers}", tmp_path / f"back-{layers}")
        assert max(orbax, back) < 450
    # five layers more are 335 MB more weights
    for kind in ("orbax", "hf"):
        assert peaks[kind, 6] - peaks[kind, 1] < 100, peaks
    assert helpers.bit_equal(helpers.weights(tmp_path / "hf-6"), helpers.weights(tmp_path / "back-6"))
