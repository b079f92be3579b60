"""Pages of PDFs as records: each of them once, whatever is wrong with some."""

import re
import sys

import numpy as np
import pytest
from pdf_files import DAMAGES, ENCRYPT, PICTURE, lines, pdf, table
from PIL import Image
from tiers import fast_first

from smolvlm_jax.errors import ChangedError, InputError, MediaError, MissingExtraError
from smolvlm_jax.processing.fetch import image_size, load_image
from smolvlm_jax.processing.limits import MediaLimits
from smolvlm_jax.processing.pdf import MAX_PAGES, PdfPage
from smolvlm_jax.processing.pdf_count import PageCounter
from smolvlm_jax.records.sources import open_source

pytest.importorskip("pypdfium2", reason="needs pypdfium2: pip install 'smolvlm-jax[documents]'")
PAGES = [lines("One", "and more"), table(), PICTURE, b""]


def records(path, **options) -> list:
    source = open_source(path, prompt="Convert this page to docling.", **options)
    return [source.parse(row.payload) for unit in source.units(3) for row in unit.rows()]


def read(record):
    """The picture of a record's page, or what is wrong with it."""
    item = record.messages[0]["content"][0]
    try:
        return load_image(item.get("image", item.get("path")))
    except MediaError as error:
        return str(error)


def test_a_folder_of_pdfs_and_pictures(tmp_path):
    (tmp_path / "deep").mkdir()
    files = {
        "a.pdf": pdf(PAGES, damaged=1),
        "B.PDF": pdf(PAGES[:1]),
        "deep/locked.pdf": pdf(PAGES, trailer=ENCRYPT),
        "deep/torn.pdf": pdf(PAGES)[:300],
        "empty.pdf": b"",
        "none.pdf": pdf([]),
        "picture.pdf": b"\x89PNG",
        "many.pdf": pdf(PAGES).replace(b"/Count 4", b"/Count 900000", 1),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    Image.new("RGB", (8, 6)).save(tmp_path / "c.png")
    (tmp_path / "notes.txt").write_text("x")
    found = {record.id: read(record) for record in records(tmp_path)}
    names = ["B.PDF#1", "a.pdf#1", "a.pdf#2", "a.pdf#3", "a.pdf#4", "c.png", "deep/locked.pdf", "deep/torn.pdf"]
    assert list(found) == [*names, "empty.pdf", "many.pdf", "none.pdf", "picture.pdf"]
    errors = {name: error for name, error in found.items() if isinstance(error, str)}
    assert all("\n" not in error and name.rpartition("#")[0] in error for name, error in errors.items())
    for name, words in {
        "a.pdf#2": "page 2 of '.*a.pdf' is damaged",
        "deep/locked.pdf": "is encrypted, and needs a password",
        "deep/torn.pdf": "torn.pdf' cannot be read",
        "empty.pdf": "empty.pdf' cannot be read",
        "many.pdf": f"has 900,000 pages; it needs 1 to {MAX_PAGES:,}",
        "none.pdf": "none.pdf' (has 0 pages|cannot be read)",
        "picture.pdf": "picture.pdf' cannot be read",
    }.items():
        assert re.search(words, errors.pop(name)), name
    assert not errors
    assert open_source(tmp_path, prompt="?").unread == {".txt": 1}
    assert found["a.pdf#1"].size == (1224, 1584) and np.ptp(found["a.pdf#1"]) == 255
    assert np.ptp(found["a.pdf#4"]) == 0  # a blank page is one


@pytest.mark.parametrize("how", fast_first(1, DAMAGES))
def test_a_damaged_page_is_an_error_and_no_blank_page(tmp_path, how):
    long = lines(*(f"Line {number} of a page of text, {number * 7919}" for number in range(30)))
    (tmp_path / "a.pdf").write_bytes(pdf([long] * 3, damaged=1, how=how))
    first, second, third = map(read, records(tmp_path / "a.pdf"))
    assert np.array_equal(first, third) and np.ptp(first) == 255
    assert second.startswith(f"page 2 of '{tmp_path}/a.pdf' is damaged: ")


def test_resolution_and_its_bounds(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf(PAGES, size=(72, 144)))
    page = PdfPage(str(path), 1)
    for dpi, size in ((72, (72, 144)), (100, (100, 200)), (36.5, (37, 73))):
        limits = MediaLimits(pdf_dpi=dpi)
        assert load_image(page, limits).size == size and image_size(page, limits) == size[::-1]
    for read_page in (load_image, image_size):
        with pytest.raises(MediaError, match=r"page 1 of .* has 144×288 pixels at 144 dpi, and the limit is 41471"):
            read_page(page, MediaLimits(max_pixels=144 * 288 - 1))
        with pytest.raises(MediaError, match="local files are switched off"):
            read_page(page, MediaLimits(files=False))
        with pytest.raises(MediaError, match="has 4 pages, so there is no page 5"):
            read_page(PdfPage(str(path), 5))
        with pytest.raises(MediaError, match=r"could not be read when its pages were counted, and now has 4: start afresh"):
            read_page(PdfPage(str(path), 0))


@pytest.mark.thorough
def test_a_file_that_ends_the_counting_process_has_no_pages(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf(PAGES))
    with PageCounter() as counter:
        assert counter(str(tmp_path / "a.pdf")) == 4
        counter._child.kill()
        assert counter(str(tmp_path / "a.pdf")) == 0
        assert counter(str(tmp_path / "a.pdf")) == 4
        assert counter(str(tmp_path / "nowhere.pdf")) == 0


@pytest.mark.thorough
def test_pages_belong_to_the_file_that_was_found(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf(PAGES))
    source, other = (open_source(path, prompt="?") for _ in range(2))
    assert source.describe() == other.describe() and source.describe()["count"] == 4
    rows = [row for unit in source.units(3) for row in unit.rows()]
    source.check(rows[0].payload)
    path.write_bytes(pdf(PAGES[:1]))
    with pytest.raises(ChangedError, match=r"a\.pdf"):
        source.check(rows[1].payload)
    assert source.parse.identify(rows[1].payload) == "a.pdf#2"


def test_without_the_extra_one_line_names_it(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(pdf(PAGES))
    Image.new("RGB", (8, 6)).save(tmp_path / "c.png")
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(MissingExtraError, match=r"^reading PDF files needs .*pip install 'smolvlm-jax\[documents\]'$"):
        open_source(tmp_path, prompt="?")
    assert len(records(tmp_path / "c.png")) == 1  # pictures alone want nothing
    with pytest.raises(InputError, match="needs a question"):
        open_source(tmp_path / "a.pdf")
