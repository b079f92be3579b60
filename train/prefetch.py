"""Read ahead in a thread."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["prefetch"]


def prefetch(make: Callable[[int], Any], start: int, stop: int, depth: int = 4) -> Generator[Any, None, None]:
    """Yield make(start), …, make(stop - 1), computed up to `depth` ahead in one thread.

    An error in the thread is raised here; leaving early ends the thread after the call that it is in.
    """
    ahead: deque[Future] = deque()
    with ThreadPoolExecutor(1) as thread:
        try:
            for index in range(start, stop):
                ahead.append(thread.submit(make, index))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)
