"""The DocTags of a page to its DoclingDocument, with nothing lost on the way.

docling-core reads what it knows and drops the rest without a word: text outside of elements, elements without an end, tags in
the wrong order. So the tags are checked before, and the words after it. A page that fails is kept as its text.
"""

import functools
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import import_extra

__all__ = ["Page", "body_of", "read_page"]

# Elements, which have a beginning and an end. Whatever else is a tag stands alone.
_ELEMENTS = (
    "doctag|document|title|text|paragraph|caption|footnote|formula|code|picture|chart|otsl|document_index|page_header|page_footer|"
    r"section_header_level_\d|list_item|ordered_list|unordered_list|inline|group|form|references|smiles|key_value_region|"
    r"key_\d+|value_\d+|checkbox_selected|checkbox_unselected"
)
_ALONE = r"loc_\d+|page_break|nl|fcel|ecel|lcel|ucel|xcel|ched|rhed|srow|link_\d+|_[^<>]*_"
_END = re.compile(rf"<(/?)({_ELEMENTS})>")
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Page:
    """What became of a page.

    Attributes:
        number: from 1; 0 for a file without pages, such as a picture, and for one that could not be opened.
        text: DocTags; None for a page that is missing.
        why: of a missing page.
    """

    number: int
    text: str | None
    why: str = ""

    def named(self, name: str) -> str:
        """The page in words.

        Args:
            name: of the document.

        Returns:
            Such as "page 3 of report.pdf".
        """
        return f"page {self.number} of {name}" if self.number else name

    def gap(self, name: str) -> str:
        """What stands in the place of a missing page.

        Args:
            name: of the document.

        Returns:
            A line with the page and the reason.
        """
        return f"[{self.named(name)} is missing: {self.why or 'it has no answer'}]"


def body_of(tags: str) -> str:
    """DocTags without the tag around them, and without page breaks, since they are those of one page."""
    body = tags.strip()
    for name in ("doctag", "document"):
        body = body.removeprefix(f"<{name}>").removesuffix(f"</{name}>")
    return body.replace("<page_break>", "\n").strip()


def read_page(page: Page, name: str, form: str = "json") -> tuple[Any, str | None]:
    """The DoclingDocument of a page.

    Args:
        page: the page.
        name: of the document.
        form: that it will be written in. Markdown has no place for some elements.

    Returns:
        (the document, what is wrong with the tags or None). If the tags are wrong the document is the text as it is, as code.
        A missing page is a text that names it; the document has no page then.

    Raises:
        MissingExtraError: docling-core is not installed.
    """
    types = import_extra("docling_core.types.doc", "documents of DocTags", "documents")
    if page.text is None:
        document = types.DoclingDocument(name=name)
        document.add_text(label=types.DocItemLabel.TEXT, text=page.gap(name))
        return document, None
    body = body_of(page.text)
    wrong = _unbalanced(page.text)
    if wrong is None:
        document = _load(f"<doctag>{body}</doctag>", name)
        wrong = _lost(body, document) or _no_place(document, form)
    if wrong is not None:
        document = _load("", name)
        document.add_code(text=page.text)
    return document, wrong


def _load(tags: str, name: str) -> Any:
    document = import_extra("docling_core.types.doc.document", "documents of DocTags", "documents")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pages = document.DocTagsDocument.from_doctags_and_image_pairs([tags], None)
        return document.DoclingDocument.load_from_doctags(pages, document_name=name)


def _unbalanced(tags: str) -> str | None:
    """Which tag has no counterpart, in words."""
    opened: list[str] = []
    for found in _END.finditer(tags):
        end, name = found.groups()
        if not end:
            opened.append(name)
        elif not opened or opened.pop() != name:
            return f"</{name}> does not end what stands before it"
    return f"<{opened[-1]}> has no end" if opened else None


def _lost(body: str, document: Any) -> str | None:
    """Which words docling-core has dropped."""
    text = _known_tags().sub(" ", body)
    lost = Counter(_WORD.findall(text)) - Counter(
        word for held in _texts(document.export_to_dict()) for word in _WORD.findall(held)
    )
    return f"{' '.join(list(lost)[:5])!r:.80} stands where no text is read" if lost else None


def _no_place(document: Any, form: str) -> str | None:
    """What docling-core leaves out of a form, and says so in it."""
    left_out = form == "markdown" and (document.key_value_items or document.form_items)
    return "Markdown has no form for key-value regions" if left_out else None


@functools.cache
def _known_tags() -> re.Pattern[str]:
    """The tags that are no text: elements, tags that stand alone, and classes of pictures."""
    labels = import_extra("docling_core.types.doc.labels", "documents of DocTags", "documents")
    classes = [re.escape(label.value) for label in labels.PictureClassificationLabel]
    classes += ["line", "dot_line", "vbar_categorical", "hbar_categorical"]  # of the first checkpoints
    return re.compile(rf"</?({_ELEMENTS}|{_ALONE}|{'|'.join(classes)})>")


def _texts(value: Any) -> Iterator[str]:
    """All texts of a DoclingDocument as a dictionary."""
    if isinstance(value, dict):
        if isinstance(value.get("text"), str):
            yield value["text"]
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
