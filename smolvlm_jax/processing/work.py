"""What decoding a video may cost: packets and pixels, which do not depend on how busy the machine is."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import MediaError

__all__ = ["LimitError", "RefusedError", "Work"]

# Thirty-eight hours at sixty frames a second. What is remembered of each packet takes some 30 bytes.
_MAX_PACKETS = 2**23
_REPORT_SECONDS = 0.2


class RefusedError(MediaError):
    """A video that holds nothing to see, or is damaged: another library, which is older, would find out more slowly."""


class LimitError(RefusedError):
    """A video that exceeds a limit."""


@dataclass
class Work:
    """Counts what is read and decoded of one video.

    Attributes:
        max_pixels: largest width × height of a frame.
        max_decoded_pixels: largest sum of width × height over all frames decoded, those on the way to a chosen one included.
        report: called now and then while there is progress.
    """

    max_pixels: int
    max_decoded_pixels: int
    report: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._packets = self._pixels = 0
        self._reported = time.monotonic()

    def packet(self) -> None:
        """A packet was read. Raises LimitError if that is one too many."""
        self._packets += 1
        if self._packets > _MAX_PACKETS:
            raise LimitError(f"it has more than {_MAX_PACKETS} packets to read")
        now = time.monotonic()
        if now - self._reported > _REPORT_SECONDS:
            self._reported = now
            self.report()

    def frame(self, width: int, height: int) -> None:
        """A frame of this size is, or is going to be, decoded. Raises LimitError if it is too large, or one too many."""
        if width * height > self.max_pixels:
            raise LimitError(f"frames of {width}×{height} pixels are above the limit of {self.max_pixels}")
        self._pixels += width * height
        if self._pixels > self.max_decoded_pixels:
            raise LimitError(
                f"its frames take more than {self.max_decoded_pixels} pixels to decode; choose fewer frames, or raise "
                "--max-decoded-pixels (MediaLimits.max_decoded_pixels)"
            )
