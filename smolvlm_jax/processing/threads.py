"""Work on several pictures at once."""

import os
from concurrent.futures import ThreadPoolExecutor


def map_threads(function, items, num_threads: int | None = None) -> list:
    """[function(x) for x in items] in threads: Pillow's resize and numpy's copies let go of the interpreter lock."""
    items = list(items)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(num_threads or min(usable, 8), len(items))
    if threads <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
