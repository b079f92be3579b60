"""Errors of orbax and tensorstore, which log in threads of their own what they raise again in the waiting thread."""

import functools
import logging
import re
import sys

__all__ = ["reason", "tell_once"]

_SYSTEM = re.compile(r"([A-Z][\w ]*) \[os_error_code")


def reason(error: BaseException) -> str:
    """What an error says, in one line: what the operating system said, where it is quoted."""
    text = str(error).strip() or type(error).__name__
    found = _SYSTEM.search(text)
    return found.group(1) if found else text.splitlines()[0][:300]


def _told(record: logging.LogRecord) -> bool:
    if record.name == "asyncio":
        return "orbax" not in record.getMessage()
    return "orbax" not in record.pathname or (record.exc_info is None and "_SignalingThread" not in str(record.msg))


@functools.cache
def tell_once() -> None:
    """From now on nothing is printed of errors in the threads and event loops of orbax and tensorstore: what they leave behind
    reports until the process ends."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_told)
    before = sys.unraisablehook
    sys.unraisablehook = lambda raised: None if str(raised.exc_value) == "Event loop is closed" else before(raised)
