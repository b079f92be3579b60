"""Eight fake devices, float32 on the CPU, and the tiny reference checkpoints."""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

# Before jax is imported anywhere: sharding is tested on eight devices that one CPU pretends to be.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compiled programs are kept for the processes that tests start, and for nobody afterwards.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="smolvlm-jax-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import numpy as np
import pytest
from object_stores import bucket, front, front_of, impatient  # noqa: F401 (fixtures)

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def golden() -> dict:
    """Answers of transformers 5.23 for the tiny models: figures."""
    return json.loads((DATA / "model" / "golden.json").read_text())


@pytest.fixture(scope="session")
def golden_arrays() -> dict[str, np.ndarray]:
    """Answers of transformers 5.23 for the tiny models: arrays."""
    with np.load(DATA / "model" / "arrays.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def published() -> Path:
    """Published config and tokenizer files, where the checkout has them beside it."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the published files (../shared/data) are not here")
    return path


class Tiny:
    """One of the tiny reference checkpoints and the inputs its golden answers were made with."""

    def __init__(self, name: str):
        from smolvlm_jax import load

        self.name = name
        self.size, self.tokens = {"A": (32, 16), "B": (39, 9), "C": (32, 4)}[name]
        self.directory = DATA / f"tiny_{name}"
        self.model, self.params = load(self.directory)
        self.variables = {"params": self.params}
        image = [150] * self.tokens
        self.ids = np.array([[1, 5, *image, 7, *image, 9, 11]])
        self.pixels = pixels(1, 2, self.size)
        # Two rows: the one above, and a left-padded one whose first picture is all zero, which is padding.
        self.batch_ids = np.array([self.ids[0].tolist(), [2] * (self.tokens + 1) + [1, 5, *image, 9, 11]])
        self.batch_mask = (self.batch_ids != 2).astype(np.int64)
        self.batch_mask[0] = 1
        zero = np.zeros((3, self.size, self.size), np.float32)
        self.batch_pixels = np.stack([self.pixels[0], np.stack([zero, self.pixels[0, 0] * np.float32(0.5)])])
        self.batch_positions = np.where(self.batch_mask == 0, 1, self.batch_mask.cumsum(-1) - 1)

    def apply(self, **inputs):
        return self.model.apply(self.variables, **inputs)


def pixels(batch: int, images: int, size: int) -> np.ndarray:
    """Test pixels from an integer formula: float32 (batch, images, 3, size, size) in [-1, 1)."""
    k = np.arange(batch * images * 3 * size * size, dtype=np.int64)
    values = ((k * 48271 + 11) % 65521).astype(np.float64) / 32760.0 - 1
    return values.astype(np.float32).reshape(batch, images, 3, size, size)


_tiny: dict[str, Tiny] = {}


@pytest.fixture(params=["A", "B", "C"])
def tiny(request) -> Tiny:
    return _tiny.setdefault(request.param, Tiny(request.param)) if request.param not in _tiny else _tiny[request.param]


@pytest.fixture
def tiny_a() -> Tiny:
    if "A" not in _tiny:
        _tiny["A"] = Tiny("A")
    return _tiny["A"]
