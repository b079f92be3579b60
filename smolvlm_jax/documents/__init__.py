"""DocTags to documents, by docling-core (the extra `documents`): what a docling checkpoint wrote of the pages of a file becomes
Markdown, HTML, the JSON of a DoclingDocument, or one text of DocTags.

    from smolvlm_jax.documents import Page, write_document

    with open("report.md", "w", encoding="utf-8") as file:
        remarks = write_document(file, "markdown", "report.pdf", [Page(1, "<doctag><text>Hello</text></doctag>")])

pages.py      a page's tags to its DoclingDocument, or its text as it is where the tags cannot be read
forms.py      documents page by page, in memory that does not grow with them; merging.py: their JSON
"""

from ..lazy import lazy_exports
from .pages import Page

FORMS = {"markdown": ".md", "html": ".html", "json": ".json", "doctags": ".doctags"}  # and the endings of their files
_lazy, __getattr__ = lazy_exports(__name__, {"documents.forms": ("write_document",)})
__all__ = ["FORMS", "Page", *_lazy]
