"""How often Python looks for unreachable objects while a model is read and its programs are traced."""

import contextlib
import gc
import threading
from collections.abc import Iterator

__all__ = ["rare_collections"]

# Thresholds as of `gc.set_threshold`: new objects before a collection, and collections before one of older objects.
_RARE = (50_000, 20, 20)
_lock = threading.Lock()
_users = 0
_before: tuple[int, int, int] = gc.get_threshold()


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Look for unreachable objects less often while the block runs: imports and tracing make hundreds of thousands of objects
    that stay, and by default a start spends 0.5 s of processor time on looking through them.

    The thresholds are those of the whole process. They are put back when the last of the blocks ends, which may lie inside each
    other and in several threads, unless somebody else has changed them meanwhile. A process that collects rarely by its own
    choice is left alone.
    """
    global _users, _before
    with _lock:
        if not _users:
            _before = gc.get_threshold()
            if 0 < _before[0] < _RARE[0]:
                gc.set_threshold(*_RARE)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users and gc.get_threshold() == _RARE:
                gc.set_threshold(*_before)
