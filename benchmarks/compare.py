"""Two checkouts side by side on the CPU: how many times as fast as the old one the new one is, row by row.

    python benchmarks/compare.py --old DIR --new DIR [--runs 5] [--rows speed batch] [--one-core]

Each checkout has an environment of its own in which it is installed: DIR/.venv, or the interpreter given by --old-python and
--new-python. Both get the same random weights in the shape of the 256M. The cases of `speed.py` are measured by this checkout's
`speed.py` in one process for each side; the sides take turns, `--runs` times after a round of warm-up, and one sleeps while
the other works. The workload of `batch.py` is run by each checkout's own `batch.py`, in turns, `--runs` times. The ratios
are of medians; above 1 the new checkout is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from multiprocessing.connection import Listener
from pathlib import Path

import speed

HERE = Path(__file__).resolve().parent


class Side:
    """A checkout: its interpreter, and the process that runs the cases of `speed.py` in it."""

    def __init__(self, directory: Path, python: Path | None):
        self.directory = directory.resolve()
        self.python = str(python or self.directory / ".venv" / "bin" / "python")

    def start(self, scratch: Path, *, checkpoint: Path, steps: int) -> None:
        address = str(scratch / f"{abs(hash(self.directory))}.socket")
        with Listener(address) as listener:
            words = ["--serve", address, "--checkpoint", checkpoint, "--steps", str(steps)]
            self.process = subprocess.Popen([self.python, HERE / "speed.py", *words], cwd=self.directory)
            self.pipe = listener.accept()
        self.about = self.pipe.recv()

    def ask(self, *request):
        self.pipe.send(request)
        return self.pipe.recv()

    def stop(self) -> None:
        self.pipe.close()
        self.process.wait()

    def run_batch(self, folder: Path, words: list[str]) -> dict:
        """One run of the checkout's `batch.py`, its own side alone."""
        script = self.directory / "benchmarks" / "batch.py"
        subprocess.run([self.python, script, *words, "--side", "ours", "--folder", folder], cwd=self.directory, check=True)
        return json.loads((folder / "ours.json").read_text())


def report(name: str, old: list[float], new: list[float]) -> None:
    """One row: medians in seconds and their ratio."""
    before, after = statistics.median(old), statistics.median(new)
    print(f"{name:<28} old {before:9.4f} s  new {after:9.4f} s  {before / after:6.3f} ×", flush=True)


def compare_speed(sides: list[Side], scratch: Path, *, checkpoint: Path, options) -> None:
    for side in sides:
        side.start(scratch, checkpoint=checkpoint, steps=options.steps)
    print("; ".join(f"{side.directory}: {side.about}" for side in sides), flush=True)
    for case in speed.CASES:
        if any(str(case).startswith(word) for word in options.only):
            for side in sides:
                side.ask("prepare", case)
            rounds = [[side.ask("time", case) for side in sides] for _ in range(options.runs + 1)]
            report(str(case), *zip(*rounds[1:], strict=True))
    for side in sides:
        side.stop()


def compare_batch(sides: list[Side], scratch: Path, *, options) -> None:
    rounds = [[side.run_batch(scratch, ["--records", str(options.records)]) for side in sides] for _ in range(options.runs)]
    for key in ("seconds", "decode_seconds"):
        report(f"batch, {key.replace('_', ' ')}", *zip(*[[run[key] for run in runs] for runs in rounds], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("old", "new"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR", help=f"the {name} checkout")
        parser.add_argument(
            f"--{name}-python", type=Path, metavar="FILE", help="its interpreter (default: DIR/.venv/bin/python)"
        )
    parser.add_argument("--rows", nargs="+", default=["speed", "batch"], choices=("speed", "batch"))
    parser.add_argument("--runs", type=int, default=5, help="times that a row is measured on each side (default: 5)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="cases of speed.py whose name begins so")
    parser.add_argument("--steps", type=int, default=12, help="tokens decoded in a round of speed.py (default: 12)")
    parser.add_argument("--records", type=int, default=200, help="records of batch.py's workload (default: 200)")
    parser.add_argument("--one-core", action="store_true", help="one core; speed.py then counts the processor's seconds")
    options = parser.parse_args()
    if options.one_core:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the children inherit it
    os.environ["JAX_PLATFORMS"] = "cpu"
    sides = [Side(options.old, options.old_python), Side(options.new, options.new_python)]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        weights = scratch / "hf"
        make = f"import speed; speed.make_checkpoint({str(weights)!r})"
        subprocess.run([sides[1].python, "-c", make], cwd=HERE, check=True)
        if "speed" in options.rows:
            compare_speed(sides, scratch, checkpoint=weights, options=options)
        if "batch" in options.rows:
            compare_batch(sides, scratch, options=options)


if __name__ == "__main__":
    main()
