"""Progress bars: on a terminal, not in a log, never when asked to be quiet."""

import sys

__all__ = ["Progress"]


class Progress:
    """A bar that counts bytes; a context manager. Silent if `quiet`, or if standard error is no terminal."""

    def __init__(self, label: str, total: int, quiet: bool = False):
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1000)

    def add(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc) -> None:
        if self._bar is not None:
            self._bar.close()
