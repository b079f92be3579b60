"""Errors of orbax and tensorstore, which both report in threads of their own what they raise again where it is waited for."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["reason", "told_once"]

_SYSTEM = re.compile(r"([A-Z][\w ]*) \[os_error_code")


def reason(error: BaseException) -> str:
    """What an error says, in one line: what the operating system said, where it is quoted."""
    text = str(error).strip() or type(error).__name__
    found = _SYSTEM.search(text)
    return found.group(1) if found else text.splitlines()[0][:300]


def _told(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or (record.exc_info is None and "_SignalingThread" not in str(record.msg))


@contextmanager
def told_once() -> Iterator[None]:
    """Within the block nothing is printed of errors in the threads of orbax and tensorstore, nor of their event loops."""
    log, before = logging.getLogger("absl"), sys.unraisablehook
    log.addFilter(_told)
    sys.unraisablehook = lambda raised: None if str(raised.exc_value) == "Event loop is closed" else before(raised)
    try:
        yield
    finally:
        sys.unraisablehook = before
        log.removeFilter(_told)
