"""The forms of a document. Pages are read, written and released one after the other."""

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import IO, Any

from ..errors import InputError, import_extra
from .merging import Merged
from .pages import Page, body_of, read_page

__all__ = ["require_docling", "write_document"]

_PAGE_OF_HTML = re.compile(r"(.*<body>\n?)(.*?)(\n?</body>.*)", re.DOTALL)


def require_docling() -> None:
    """Raises MissingExtraError where docling-core is not installed."""
    import_extra("docling_core.types.doc", "documents of DocTags", "documents")


def write_document(file: IO[str], form: str, name: str, pages: Iterable[Page]) -> list[str]:
    """Write the document of a file's pages.

    Args:
        file: to write to.
        form: "markdown", "html", "json" or "doctags".
        name: of the document.
        pages: in their order.

    Returns:
        A remark for each page whose tags could not be read, and that stands in the document as it is.

    Raises:
        InputError: there is no such form.
        MissingExtraError: docling-core is not installed.
    """
    if form not in _WRITERS:
        raise InputError(f"no form of documents {form!r:.80}; it is one of {', '.join(_WRITERS)}")
    remarks = []
    with _WRITERS[form](file) as writer:
        for page in pages:
            document, wrong = read_page(page, name, form)
            if wrong is not None:
                remarks.append(f"{page.named(name)} is in its document as it was written: {wrong}")
            writer.add(page, name, document)
        writer.end()
    return remarks


class _Writer(contextlib.AbstractContextManager, ABC):
    def __init__(self, file: IO[str]):
        self._file, self._begun = file, False

    def __exit__(self, *exc) -> None:
        return None

    @abstractmethod
    def add(self, page: Page, name: str, document: Any) -> None: ...

    @abstractmethod
    def end(self) -> None: ...

    def _joined(self, text: str, between: str) -> None:
        self._file.write(between * self._begun + text)
        self._begun = True


class _Markdown(_Writer):
    def add(self, page, name, document):
        if text := document.export_to_markdown():
            self._joined(text, "\n\n")

    def end(self):
        self._file.write("\n" * self._begun)


class _Html(_Writer):
    """The bodies of the pages in the frame of the first."""

    _foot = ""

    def add(self, page, name, document):
        found = _PAGE_OF_HTML.fullmatch(document.export_to_html())
        assert found is not None, "docling-core writes a body"
        head, body, self._foot = found.groups()
        self._joined(body if self._begun else head + body, "\n")

    def end(self):
        self._file.write(self._foot + "\n" * self._begun)


class _Json(_Writer):
    def __enter__(self):
        self._merged = Merged()
        return self

    def __exit__(self, *exc):
        self._merged.close()

    def add(self, page, name, document):
        found = document.export_to_dict()
        self._merged.add({**found, "pages": {}} if page.text is None else found, page.number or 1)

    def end(self):
        self._merged.write(self._file)


class _DocTags(_Writer):
    """What the checkpoint wrote; docling-core reads it by `DocTagsDocument.from_multipage_doctags_and_images`."""

    def add(self, page, name, document):
        body = f"<text>{page.gap(name)}</text>" if page.text is None else body_of(page.text)
        self._joined(body if self._begun else f"<doctag>{body}", "\n<page_break>\n")

    def end(self):
        self._file.write("</doctag>\n" if self._begun else "")


_WRITERS: dict[str, type[_Writer]] = {"markdown": _Markdown, "html": _Html, "json": _Json, "doctags": _DocTags}
