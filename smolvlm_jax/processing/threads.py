"""Work on several pictures at once."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_threads(function: Callable[[_Item], _Result], items: Iterable[_Item], num_threads: int | None = None) -> list[_Result]:
    """[function(x) for x in items], in threads: Pillow's resize and numpy's copies release the interpreter lock.

    Args:
        function: what to do with each item.
        items: the items.
        num_threads: how many at once; None takes the processors this process may use, at most 8.
    """
    items = list(items)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(num_threads or min(usable, 8), len(items))
    if threads <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
