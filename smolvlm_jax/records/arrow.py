"""pyarrow, where it is installed."""

import os
from typing import IO, Any

from ..errors import import_extra

__all__ = ["checked_pages", "damage_of", "import_pyarrow", "is_empty", "open_parquet"]


def import_pyarrow() -> Any:
    """pyarrow with its parquet module.

    Raises:
        MissingExtraError: if it is not installed.
    """
    import_extra("pyarrow.parquet", "Parquet", "parquet")
    return import_extra("pyarrow", "Parquet", "parquet")


def open_parquet(file: str | os.PathLike | IO[bytes], **options: Any) -> Any:
    """A pyarrow.parquet.ParquetFile, whose pages are checked where the file has checksums for them, which is optional.

    Args:
        file: A path, or an opened file.
        **options: Of ParquetFile.

    Raises:
        MissingExtraError: as `import_pyarrow`.
    """
    parquet = import_pyarrow().parquet
    return parquet.ParquetFile(file, pre_buffer=False, page_checksum_verification=True, **options)


def checked_pages() -> Any:
    """The same for readers of pyarrow.dataset: its ParquetFragmentScanOptions."""
    dataset = import_extra("pyarrow.dataset", "Parquet", "parquet")
    return dataset.ParquetFragmentScanOptions(page_checksum_verification=True)


def is_empty(path: str | os.PathLike) -> bool:
    """Whether a Parquet file that can be opened has no rows."""
    pyarrow = import_pyarrow()
    try:
        with open_parquet(path) as file:
            return file.metadata.num_rows == 0
    except (pyarrow.ArrowException, OSError):
        return False  # which the reader of its rows reports


def damage_of(path: str | os.PathLike) -> str | None:
    """Which row group of a Parquet file cannot be read, and why, in words; None if all of them can."""
    pyarrow = import_pyarrow()
    try:
        with open_parquet(path) as file:
            for group in range(file.metadata.num_row_groups):
                try:
                    for _ in file.iter_batches(row_groups=[group], use_threads=False):
                        pass
                except (pyarrow.ArrowException, OSError) as error:
                    return f"row group {group} cannot be read: {' '.join(str(error).split())}"
    except (pyarrow.ArrowException, OSError) as error:
        return " ".join(str(error).split())
    return None
