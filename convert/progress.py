"""How far a conversion or a comparison is, in bytes."""

import time

from ..progress import Figures, Progress

__all__ = ["ByteCount"]


class ByteCount:
    """Shows how many of a job's bytes are done, from now until the progress tells of something else.

    Args:
        progress: where it is shown.
        doing: in words, such as "converting".
        total: bytes of the job.
    """

    def __init__(self, progress: Progress, doing: str, total: int):
        self._done, self._total, self._begin = 0, total, time.monotonic()
        progress.tell(doing)
        progress.follow(self._figures)

    def update(self, count: int) -> None:
        """So many more bytes are done."""
        self._done += count

    def _figures(self) -> Figures:
        words = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        if not 0 < self._done < self._total:
            return Figures(words=words if self._done < self._total else "")
        left = (time.monotonic() - self._begin) * (self._total - self._done) / self._done
        return Figures(self._done / self._total, left, words)
