"""Convert a checkpoint of the 2.2B's shape (random float32 weights, 9 GB) both ways: time and peak memory, against `cp`.

    python benchmarks/convert.py [--directory DIR] [--dtype float32] [--keep]

Prints, for each direction, the seconds and the peak resident memory of a fresh process that converts, and the seconds of
`cp` of the same bytes followed by `sync`, measured right before it. The bounds: 2.5 times `cp`, and 1.0 GB. Needs 30 GB of
free disk and looks for them first.
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

NEEDED = 30 * 10**9
MEMORY = 1.0  # GB above the interpreter
RATIO = 2.5
SHARD = 5 * 10**9

TEXT = dict(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=64,
    vocab_size=49280,
    max_position_embeddings=8192,
    rope_theta=130000.0,
    rms_norm_eps=1e-5,
    pad_token_id=2,
)
VISION = dict(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14
)


def make_source(directory: Path, dtype: str) -> None:
    """A Hugging Face directory of random weights, one tensor in memory at a time."""
    from smolvlm_jax.config import SmolVLMConfig
    from smolvlm_jax.convert.leaves import Leaf
    from smolvlm_jax.convert.opened import parameter_shapes
    from smolvlm_jax.convert.to_hf import write_hf

    config = SmolVLMConfig(VISION, TEXT, scale_factor=3, image_token_id=49190, dtype=dtype)
    rng = np.random.default_rng(0)

    class Random(Leaf):
        def __init__(self, path, shape):
            self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)

        def borrow(self):
            return rng.random(self.shape, np.float32) - np.float32(0.5)

    config.save_pretrained(directory)
    write_hf(directory, {path: Random(path, shape) for path, shape in parameter_shapes(config).items()}, max_shard_bytes=SHARD)


def copy(source: Path, target: Path) -> float:
    """Seconds of `cp -r` followed by `sync`."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()
    return time.perf_counter() - start


def child(code: str) -> tuple[float, float]:
    """Seconds and peak resident GB of a fresh interpreter that runs `code`, imports included."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"the conversion failed with status {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss / 1e6 * 1.024


def run(name: str, source: Path, target: Path, to: str, floor: float) -> bool:
    copied = target.with_name("copy")
    cp = copy(source, copied)
    shutil.rmtree(copied)
    call = f"convert({str(source)!r}, {str(target)!r}, to={to!r}, max_shard_size={SHARD}, quiet=True)"
    seconds, peak = child(f"from smolvlm_jax.convert.conversion import convert; {call}")
    nbytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    above = peak - floor
    print(
        f"{name}: {seconds:.1f} s, cp + sync {cp:.1f} s, ratio {seconds / cp:.2f} (bound {RATIO}); "
        f"peak memory {peak:.2f} GB, {above:.2f} GB above the interpreter (bound {MEMORY}); wrote {nbytes / 1e9:.2f} GB",
        flush=True,
    )
    return seconds <= RATIO * cp and above <= MEMORY


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=None, help="where to work (default: a temporary directory)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="convert-benchmark-", dir=args.directory))
    try:
        free = shutil.disk_usage(work).free
        if free < NEEDED:
            print(f"{work} has {free / 1e9:.1f} GB free, this needs {NEEDED / 1e9:.0f}: pass --directory", file=sys.stderr)
            return 2
        _, floor = child("pass")
        start = time.perf_counter()
        child(
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import convert as benchmark; "
            f"from pathlib import Path; benchmark.make_source(Path({str(work / 'hf')!r}), {args.dtype!r})"
        )
        print(f"made the source in {time.perf_counter() - start:.0f} s; a bare interpreter takes {floor:.2f} GB", flush=True)
        ok = run("hf -> orbax", work / "hf", work / "orbax", "orbax", floor)
        ok &= run("orbax -> hf", work / "orbax", work / "back", "hf", floor)
        names = sorted(path.name for path in (work / "hf").iterdir() if "safetensors" in path.name)
        _, different, failed = filecmp.cmpfiles(work / "hf", work / "back", names, shallow=False)
        print(f"the weights came back {'different: ' + ', '.join(different + failed) if different + failed else 'bit-equal'}")
        return 0 if ok and not different and not failed else 1
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
