"""pyarrow, where it is installed."""

from typing import Any

from ..errors import import_extra

__all__ = ["import_pyarrow"]


def import_pyarrow() -> Any:
    """pyarrow with its parquet module.

    Raises:
        MissingExtraError: if it is not installed.
    """
    import_extra("pyarrow.parquet", "Parquet", "parquet")
    return import_extra("pyarrow", "Parquet", "parquet")
