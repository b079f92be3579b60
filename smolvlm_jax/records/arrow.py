"""pyarrow, where it is installed."""

from typing import Any

from ..errors import MissingExtraError

__all__ = ["import_pyarrow"]


def import_pyarrow() -> Any:
    """pyarrow with its parquet module.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        import pyarrow.parquet

        return pyarrow
    except ImportError as error:
        raise MissingExtraError("Parquet", "parquet") from error
