"""PDF files that a conversation names as one picture each, and the pages that replace them when it is prepared."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import MediaError
from .fetch import open_pdf
from .limits import MediaLimits, describe_source
from .parts import SOURCES
from .pdf import PdfPage, page_count

__all__ = ["PdfFile", "with_pages"]


class PdfFile:
    """All pages of a PDF file. No dataclass: in messages those are mappings.

    Args:
        source: path of the file.
    """

    __slots__ = ("source",)

    def __init__(self, source: str):
        self.source = source

    def __str__(self) -> str:
        return f"the PDF {describe_source(self.source)}"


def with_pages(messages: Sequence[Mapping[str, Any]], limits: MediaLimits) -> list[dict[str, Any]]:
    """A conversation with an item for each page in the place of every item that holds a PdfFile. Files are opened, not drawn.

    Args:
        messages: in the chat format.
        limits: what may be read; max_frames bounds the number of pages of a file.

    Raises:
        MediaError: a file cannot be read, or has more pages.
        MissingExtraError: there is one, and nothing that reads it.
    """
    return [_expanded(message, limits) for message in messages]


def _expanded(message: Mapping[str, Any], limits: MediaLimits) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, (list, tuple)) or not any(_file(item) for item in content):
        return dict(message)
    items: list[Any] = []
    for item in content:
        file = _file(item)
        items += [item] if file is None else [{"type": "image", "image": page} for page in _pages(file, limits)]
    return {**message, "content": items}


def _file(item: Any) -> PdfFile | None:
    if not isinstance(item, Mapping) or item.get("type") != "image":
        return None
    return next((item[key] for key in SOURCES["image"] if isinstance(item.get(key), PdfFile)), None)


def _pages(file: PdfFile, limits: MediaLimits) -> list[PdfPage]:
    with open_pdf(file.source, limits) as opened:
        count = page_count(opened, file.source)
    if count > limits.max_frames:
        raise MediaError(f"{file} has {count:,} pages, above the limit of {limits.max_frames:,} (max_frames)")
    return [PdfPage(file.source, number) for number in range(1, count + 1)]
