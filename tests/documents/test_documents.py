"""DocTags to documents: what docling-core makes of them, page by page, with nothing lost."""

import io
import json
import sys

import pytest

from smolvlm_jax.documents import FORMS, Page, write_document
from smolvlm_jax.errors import InputError, MissingExtraError

types = pytest.importorskip("docling_core.types.doc", reason="needs docling-core: pip install 'smolvlm-jax[documents]'")
from docling_core.types.doc.document import DocTagsDocument

# What granite-docling writes of a page, by hand.
LOC = "<loc_11><loc_22><loc_333><loc_444>"
RICH = f"""<doctag><page_header>{LOC}A running head</page_header>
<title>{LOC}On pages</title>
<section_header_level_1>{LOC}1. Tables & <pictures></section_header_level_1>
<text>{LOC}With P < 0.05, and p > 3, a_b is
noted.</text>
<otsl>{LOC}<ched>Year<ched>Sum<nl><fcel>2024<fcel>17.5<nl><fcel>2025<ecel><nl><caption>{LOC}Table 1: sums</caption></otsl>
<picture>{LOC}<bar_chart><caption>{LOC}Figure 1: bars</caption></picture>
<unordered_list><list_item>{LOC}first</list_item>
<list_item>{LOC}second</list_item>
</unordered_list>
<ordered_list><list_item>{LOC}third</list_item>
</ordered_list>
<code>{LOC}<_Python_>print("x")
y = 1</code>
<formula>{LOC}E = mc^2</formula>
<footnote>{LOC}See there.</footnote>
<page_footer>{LOC}12</page_footer>
</doctag>""".replace(" & <pictures>", " & pictures")
PLAIN = f"<doctag><text>{LOC}Another page.</text>\n</doctag>"
PAGES = [RICH, PLAIN, RICH]


def written(form: str, pages: list, name: str = "report.pdf") -> tuple[str, list[str]]:
    file = io.StringIO()
    found = [Page(n + 1, *((None, "torn") if text is None else (text,))) for n, text in enumerate(pages)]
    remarks = write_document(file, form, name, found)
    return file.getvalue(), remarks


def whole(pages: list[str], name: str = "report.pdf"):
    tags = DocTagsDocument.from_doctags_and_image_pairs(pages, None)
    return types.DoclingDocument.load_from_doctags(tags, document_name=name)


def test_each_form_is_docling_cores_own_of_all_pages_at_once():
    found, together = {form: written(form, PAGES) for form in FORMS}, whole(PAGES)
    assert not any(remarks for _, remarks in found.values())
    assert found["markdown"][0] == together.export_to_markdown() + "\n"
    assert found["html"][0].replace("\n</div>\n<div class='page'>", "") == together.export_to_html() + "\n"
    document = json.loads(found["json"][0])
    assert document == json.loads(json.dumps(together.export_to_dict()))
    assert types.DoclingDocument.model_validate(document).export_to_markdown() == together.export_to_markdown()
    again = DocTagsDocument.from_multipage_doctags_and_images(found["doctags"][0], None)
    assert types.DoclingDocument.load_from_doctags(again, document_name="report.pdf") == together
    for words in (
        "# On pages",
        "Figure 1: bars",
        "Table 1: sums",
        "<!-- image -->",
        "1. third",
        "$$E = mc^2$$",
        "a\\_b",
    ):
        assert words in found["markdown"][0], words
    assert "running head" in found["json"][0] and "running head" not in found["markdown"][0]


def test_a_missing_page_is_a_gap_with_its_name():
    for form in FORMS:
        text, remarks = written(form, [PLAIN, None, PLAIN])
        assert "[page 2 of report.pdf is missing: torn]" in text and text.count("Another page.") in (2, 4) and not remarks
    pages = json.loads(written("json", [PLAIN, None, PLAIN])[0])["pages"]
    assert {key: page["page_no"] for key, page in pages.items()} == {"1": 1, "3": 3}
    file = io.StringIO()
    write_document(file, "markdown", "locked.pdf", [Page(0, None, "it is encrypted")])
    assert file.getvalue() == "[locked.pdf is missing: it is encrypted]\n"


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ("<doctag><text>half an answ", "<text> has no end"),
        ("<doctag><text>a</text>", "<doctag> has no end"),
        ("<text>a</title>", "</title> does not end"),
        ("</text>", "</text> does not end"),
        ("<text>a</text> between <text>b</text>", "'between' stands where no text is read"),
        ("No tags at all.", "'No tags at all' stands where"),
        ("<nothing>a</nothing>", "'nothing a' stands where"),
        ("<picture><smiles>CCO</smiles></picture>", "'CCO' stands where"),
        ("<code><div class='x'>b</div></code>", "'div class x' stands where"),
        ("<list_item>alone</list_item>", "'alone' stands where"),
        ("<text>" * 3000, "has no end"),
        ("<text>a</text>" + "\n " * 20000 + "b", "'b' stands where"),
    ],
)
def test_tags_that_cannot_be_read_leave_the_text_as_it_is(tags, why):
    for form in FORMS:
        text, (remark,) = written(form, [PLAIN, tags, PLAIN])
        assert why in remark and remark.startswith("page 2 of report.pdf is in its document as it was written: ")
        assert text.count("Another page.") in (2, 4)
    assert f"\n{tags}\n" in written("markdown", [PLAIN, tags])[0]
    (code,) = json.loads(written("json", [tags])[0])["texts"]
    assert code["text"] == tags and code["label"] == "code"


def test_what_markdown_has_no_form_for():
    region = "<key_value_region><key_0>Name<link_1></key_0><value_1>Bob</value_1></key_value_region>"
    text, (remark,) = written("markdown", [region])
    assert region in text and "no form for key-value regions" in remark
    assert written("json", [region])[1] == [] and "Bob" in written("html", [region])[0]


def test_an_empty_answer_is_an_empty_page():
    for form in FORMS:
        text, remarks = written(form, ["", "<doctag></doctag>", PLAIN])
        assert not remarks and "Another page." in text
    assert list(json.loads(written("json", ["", PLAIN])[0])["pages"]) == ["1", "2"]


def test_no_form_and_no_extra(monkeypatch):
    with pytest.raises(InputError, match="no form of documents 'pdf'; it is one of markdown, html, json, doctags"):
        written("pdf", [])
    monkeypatch.setitem(sys.modules, "docling_core.types.doc", None)
    with pytest.raises(MissingExtraError, match=r"^documents of DocTags needs .*pip install 'smolvlm-jax\[documents\]'$"):
        written("markdown", [PLAIN])
