"""The JSON of several DoclingDocuments, in order, joined to that of one document. `DoclingDocument.concatenate` does the same
with all of them in memory."""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterable
from typing import IO, Any

__all__ = ["Merged"]

_ITEM = re.compile(r"#/(\w+)/(\d+)")


class Merged(contextlib.ExitStack):
    """A document that grows. Its items are kept in temporary files, one for each kind, until it is written.

    A context manager, whose end removes the files.
    """

    def __init__(self):
        super().__init__()
        self._frame: dict[str, Any] = {}  # what is alike in all documents; of what grows the text before it and behind it
        self._items: dict[str, IO[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, document: dict[str, Any], number: int) -> None:
        """Add a document.

        Args:
            document: of one page or of none, as `DoclingDocument.export_to_dict` gives it.
            number: of the page in the whole.
        """
        before = dict(self._counts)
        for kind, value in document.items():
            if kind == "body":
                head = json.dumps({name: item for name, item in value.items() if name != "children"})[:-1]
                self._keep(kind, f'{head}, "children": [', "]}", (_moved(child, before, number) for child in value["children"]))
            elif kind == "pages":
                pages = ({**page, "page_no": number} for page in value.values())
                self._keep(kind, "{", "}", pages, prefix=f'"{number}": ')
            elif isinstance(value, list):
                self._keep(kind, "[", "]", (_moved(item, before, number) for item in value))
            else:
                self._frame.setdefault(kind, value)

    def write(self, file: IO[str]) -> None:
        """Write the whole."""
        for place, (kind, value) in enumerate(self._frame.items()):
            file.write(f"{', ' if place else '{'}{json.dumps(kind)}: ")
            if kind not in self._items:
                file.write(json.dumps(value))
                continue
            opening, closing = value
            file.write(opening)
            self._items[kind].seek(0)
            for number, line in enumerate(self._items[kind]):
                file.write(", " * bool(number) + line.rstrip("\n"))
            file.write(closing)
        file.write("}\n")

    def _keep(self, kind: str, opening: str, closing: str, items: Iterable[Any], prefix: str = "") -> None:
        if kind not in self._items:
            self._frame[kind] = (opening, closing)
            file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (open until all is written)
            self._items[kind] = self.enter_context(file)
        for item in items:
            self._items[kind].write(f"{prefix}{json.dumps(item)}\n")
            self._counts[kind] = self._counts.get(kind, 0) + 1


def _moved(value: Any, counts: dict[str, int], number: int) -> Any:
    """A part of a document with its references moved behind so many items of each kind, and its places on page `number`."""
    if isinstance(value, list):
        return [_moved(item, counts, number) for item in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for name, item in value.items():
        if name in ("$ref", "self_ref") and (found := _ITEM.fullmatch(item)):
            item = f"#/{found[1]}/{int(found[2]) + counts.get(found[1], 0)}"
        elif name == "page_no":
            item = number
        out[name] = _moved(item, counts, number)
    return out
