"""Pages of PDF files as pictures, by PDFium (the extra `documents`). No file is opened here, see fetch.py.

A file is opened anew for each page, since PDFium keeps what it has read of an open one: memory does not grow with the pages.
"""

import contextlib
import io
import math
import threading
from collections.abc import Iterator
from typing import IO, Any

from PIL import Image

from ..errors import MediaError, import_extra
from .limits import MediaLimits, describe_source
from .pdf_streams import damage_of

__all__ = ["MAX_PAGES", "PdfPage", "page_count", "page_size", "render", "require_pdfium"]

# Of a file. PDFium believes what the file says, which may be a million pages where there is none.
MAX_PAGES = 2**16
_POINTS = 72  # of an inch
_PASSWORD = 4  # PDFium's code for a file that needs one
_lock = threading.Lock()  # PDFium works in one thread at a time


class PdfPage:
    """One page of a PDF file, which is a picture. No dataclass: in messages those are mappings.

    Args:
        source: path of the file.
        number: of the page, counted from 1; 0 for a file whose pages cannot be counted, which is an error wherever it is read.
    """

    __slots__ = ("number", "source")

    def __init__(self, source: Any, number: int):
        self.source, self.number = source, number

    def __str__(self) -> str:
        return f"page {self.number} of {describe_source(self.source)}"


def require_pdfium() -> Any:
    """The module pypdfium2. Raises MissingExtraError."""
    return import_extra("pypdfium2", "reading PDF files", "documents")


def page_count(file: IO[bytes], source: Any) -> int:
    """The number of pages of a PDF file.

    Args:
        file: opened, at its beginning.
        source: what a message calls it.

    Raises:
        MediaError: it cannot be opened, is encrypted, or has no pages or too many.
    """
    with _lock, _opened(file, source) as document:
        return len(document)


def page_size(file: IO[bytes], page: PdfPage, limits: MediaLimits) -> tuple[int, int]:
    """(height, width) in pixels of a page at `limits.pdf_dpi`. Arguments and errors as of `render`."""
    with _lock, _opened(file, page.source) as document:
        return _size(_loaded(document, page), page, limits)


def render(file: IO[bytes], page: PdfPage, limits: MediaLimits) -> Image.Image:
    """The picture of a page, RGB, on white, with its annotations and the values of its forms.

    Args:
        file: the PDF file, opened, at its beginning.
        page: which page.
        limits: `pdf_dpi` is the resolution, `max_pixels` bounds the picture.

    Raises:
        MediaError: the file or the page cannot be read, has nothing on it, is damaged, or has too many pixels.
    """
    pdfium = require_pdfium()
    with _lock, _opened(file, page.source) as document:
        loaded = _loaded(document, page)
        _size(loaded, page, limits)
        if damage := damage_of(_alone(pdfium, document, page)):
            raise MediaError(f"{page} is damaged: {damage}")
        # An array of Python's own: PDFium's is freed with the page.
        return loaded.render(scale=limits.pdf_dpi / _POINTS, rev_byteorder=True, limit_image_cache=True).to_pil().copy()


@contextlib.contextmanager
def _opened(file: IO[bytes], source: Any) -> Iterator[Any]:
    """An opened document, with its forms. What PDFium refuses within the block is a MediaError."""
    pdfium = require_pdfium()
    try:
        with contextlib.closing(pdfium.PdfDocument(file)) as document:
            document.init_forms()
            count = len(document)
            if not 0 < count <= MAX_PAGES:
                raise MediaError(f"the PDF {describe_source(source)} has {count:,} pages; it needs 1 to {MAX_PAGES:,}")
            yield document
    except pdfium.PdfiumError as error:
        locked = error.err_code == _PASSWORD
        why = "is encrypted, and needs a password: decrypt it first" if locked else f"cannot be read: {error}"
        raise MediaError(f"the PDF {describe_source(source)} {why}") from error


def _loaded(document: Any, page: PdfPage) -> Any:
    if not page.number:
        raise MediaError(
            f"the PDF {describe_source(page.source)} could not be read when its pages were counted, and now has "
            f"{len(document)}: start afresh (--force)"
        )
    if not 0 < page.number <= len(document):
        raise MediaError(f"the PDF {describe_source(page.source)} has {len(document)} pages, so there is no page {page.number}")
    try:
        return document[page.number - 1]
    except RuntimeError as error:  # PDFium says no more
        raise MediaError(f"{page} is damaged: it cannot be loaded") from error


def _size(loaded: Any, page: PdfPage, limits: MediaLimits) -> tuple[int, int]:
    width, height = (math.ceil(side * limits.pdf_dpi / _POINTS) for side in loaded.get_size())
    if not 0 < width * height <= limits.max_pixels:
        raise MediaError(
            f"{page} has {width}×{height} pixels at {limits.pdf_dpi:g} dpi, and the limit is {limits.max_pixels}: lower "
            "pdf_dpi, or raise max_pixels if that is meant"
        )
    return height, width


def _alone(pdfium: Any, document: Any, page: PdfPage) -> bytes:
    """The page and whatever it consists of as a document of its own, as PDFium writes it; streams are copied as they are.
    Empty where PDFium can draw a page and not copy it."""
    with contextlib.closing(pdfium.PdfDocument.new()) as copy, contextlib.suppress(pdfium.PdfiumError):
        copy.import_pages(document, [page.number - 1])
        out = io.BytesIO()
        copy.save(out)
        return out.getvalue()
    return b""
