"""Progress bars."""

from typing import Any

__all__ = ["byte_bar"]


def byte_bar(label: str, total: int, *, quiet: bool) -> Any:
    """A tqdm bar that counts bytes: on a terminal, not in a log, and not if `quiet`."""
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=quiet or None)
