"""Documents beside the rows: what a docling checkpoint wrote of the pages of a file, joined in order.

They are made from the parts once all of them exist, by the host that finishes last. They are no part of the job's state:
an existing document is kept and a missing one is made, whichever run or host made the rows.
"""

import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ..documents import FORMS, Page, write_document
from ..errors import first_few
from ..io import remove_dead, whole_file
from ..storage import AnyPath
from .manifest import DOCUMENTS
from .sinks import Sink

__all__ = ["write_documents"]

_PAGE = re.compile(r"(.*\.pdf)#([1-9][0-9]{0,8})", re.IGNORECASE | re.DOTALL)
_PLAIN = " !\"#$&'()*+,;<=>?@[]^`{|}"  # what may stand in the name of a file beside letters, digits and _.-~
_LONGEST = 180  # bytes of a name


class _Row(NamedTuple):
    name: str
    page: Page


def write_documents(folder: AnyPath, sink: Sink, parts: Iterable[AnyPath], form: str) -> dict[str, Any]:
    """Make the documents that are not there yet.

    Args:
        folder: of the output.
        sink: reads a part.
        parts: all parts of the job, in their order.
        form: one of FORMS.

    Returns:
        As JSON: the form, numbers of documents that are there and of those written now, of pages and of pages that are
        missing, and remarks on pages that stand in their documents as they are, of those written now.
    """
    place, names = folder / DOCUMENTS, _Names()
    counts = dict.fromkeys(("documents", "written", "pages", "missing_pages"), 0)
    remarks: list[str] = []
    if isinstance(place, Path) and place.is_dir():
        remove_dead(list(place.rglob(".*.tmp")))
    for name, rows in itertools.groupby(_rows(sink, parts), key=lambda row: row.name):
        pages = _counted((row.page for row in rows), counts)
        target = place / f"{names.of(name)}{FORMS[form]}"
        counts["documents"] += 1
        if target.exists():
            for _ in pages:
                pass
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as file:
            text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="\n", write_through=True)
            try:
                remarks += write_document(text, form, name, pages)
            finally:
                text.detach()
        counts["written"] += 1
    return {"form": form, **counts, "remarks": first_few(remarks)}


def _rows(sink: Sink, parts: Iterable[AnyPath]) -> Iterator[_Row]:
    for part in parts:
        for row in sink.read(part):
            name, number = str(row["id"]), 0
            if found := _PAGE.fullmatch(name):
                name, number = found[1], int(found[2])
            yield _Row(name, Page(number, row["text"], row["error"] or ""))


def _counted(pages: Iterator[Page], counts: dict[str, int]) -> Iterator[Page]:
    for page in pages:
        counts["missing_pages" if page.text is None else "pages"] += 1
        yield page


class _Names:
    """Names of files for documents, no two alike. Records may have any ids, and the same one."""

    def __init__(self):
        self._taken: set[bytes] = set()

    def of(self, name: str) -> str:
        """A relative path, each part of which is a plain file name."""
        plain = "/".join(map(_file_name, name.split("/")))
        for number in itertools.count(1):
            found = plain if number == 1 else f"{plain}~{number}"
            key = hashlib.blake2b(found.lower().encode(), digest_size=12).digest()  # some file systems know no capitals
            if key not in self._taken:
                self._taken.add(key)
                return found
        raise AssertionError


def _file_name(part: str) -> str:
    name = "".join(c if c.isalnum() else quote(c, _PLAIN, errors="surrogatepass") for c in part) or "%"
    name = "%2E" + name[1:] if name.startswith(".") else name
    if len(name.encode()) <= _LONGEST:
        return name
    return f"{name[: _LONGEST // 4]}~{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"
