"""Counting the pages of PDF files in a child process, which a damaged file may crash or hang."""

import contextlib
import os

from ..child import AVAILABLE, Child, parent
from ..errors import MediaError
from ..storage import is_store
from .fetch import open_pdf
from .limits import MediaLimits
from .pdf import page_count, require_pdfium

__all__ = ["PageCounter", "serve"]

_SECONDS = 60


class PageCounter(contextlib.AbstractContextManager):
    """Counts pages. The child is started with the first file, and replaced when a file ends it.

    Raises:
        MissingExtraError: where the first file is counted, pypdfium2 is not installed.
    """

    def __init__(self):
        self._child: Child | None = None

    def __call__(self, path: str) -> int:
        """The number of pages of a PDF file; 0 if it cannot be opened, or not within a minute."""
        require_pdfium()
        if not AVAILABLE:
            return _count(path)
        child = self._child or Child(__name__, quiet=True).begin(None)
        self._child = None
        try:
            child.send(path, _SECONDS)
            count = child.receive(_SECONDS)
        except (OSError, EOFError):  # a TimeoutError is an OSError too
            child.end()
            return 0
        self._child = child
        return int(count)

    def __exit__(self, *exc) -> None:
        if self._child is not None:
            self._child.end()


def serve() -> None:
    """In the child: answer each path with its number of pages."""
    channel = parent()
    channel.receive()
    channel.send(None)
    with contextlib.suppress(ConnectionError):
        for path in channel.messages():
            channel.send(_count(path))


def _count(path: str) -> int:
    size = 2**63 if is_store(path) else os.path.getsize(path)
    with contextlib.suppress(MediaError), open_pdf(path, MediaLimits(max_video_bytes=size)) as file:
        return page_count(file, path)
    return 0
