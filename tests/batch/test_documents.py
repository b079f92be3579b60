"""Documents beside the rows of a job."""

import json
import sys
from pathlib import Path

import batch_corpus as corpus
import convert_pages
import pytest
from docling_checkpoint import PAGE, write_checkpoint
from pdf_files import ENCRYPT, PICTURE, lines, pdf, table
from PIL import Image

from smolvlm_jax.batch import BatchConfig, PictureOptions, run_batch
from smolvlm_jax.batch.documents import write_documents
from smolvlm_jax.batch.manifest import Manifest
from smolvlm_jax.batch.sinks import COLUMNS, open_sink
from smolvlm_jax.cli import main
from smolvlm_jax.errors import InputError, MissingExtraError

pytest.importorskip("docling_core", reason="needs docling-core: pip install 'smolvlm-jax[documents]'")
pytest.importorskip("pypdfium2", reason="needs pypdfium2: pip install 'smolvlm-jax[documents]'")
ASK = "Convert this page to docling."
FAST = dict(slots=(8,), ring_lengths=(256,), workers=0, pictures=PictureOptions(do_image_splitting=False))


def rows(*found: tuple) -> list[dict]:
    texts = ({"id": id, "text": text, "error": None if text is not None else f"no {id}"} for id, text in found)
    return [{**dict.fromkeys(COLUMNS, 0), **row} for row in texts]


def made(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder / "documents")): p.read_text() for p in (folder / "documents").rglob("*") if p.is_file()}


def text(words: str) -> str:
    return f"<doctag><text>{words}</text></doctag>"


def test_pages_are_joined_by_file_across_parts(tmp_path):
    sink, parts = open_sink("jsonl"), [tmp_path / f"part-00000{n}.jsonl" for n in range(2)]
    sink.write(parts[0], rows(("deep/a.pdf#1", text("one")), ("deep/a.pdf#2", None)))
    sink.write(parts[1], rows(("deep/a.pdf#3", text("three")), ("b.png", text("b")), ("c.pdf", None), (7, "torn")))
    found = write_documents(tmp_path, sink, parts, "markdown")
    assert {key: found[key] for key in ("documents", "written", "pages", "missing_pages")} == dict(
        documents=4, written=4, pages=4, missing_pages=2
    )
    assert found["remarks"] == ["7 is in its document as it was written: 'torn' stands where no text is read"]
    assert made(tmp_path) == {
        "deep/a.pdf.md": "one\n\n[page 2 of deep/a.pdf is missing: no deep/a.pdf#2]\n\nthree\n",
        "b.png.md": "b\n",
        "c.pdf.md": "[c.pdf is missing: no c.pdf]\n",
        "7.md": "```\ntorn\n```\n",
    }
    (tmp_path / "documents/b.png.md").unlink()
    (tmp_path / "documents/deep/a.pdf.md").write_text("kept")
    again = write_documents(tmp_path, sink, parts, "markdown")
    assert again == {**found, "written": 1, "remarks": []} and made(tmp_path)["deep/a.pdf.md"] == "kept"


def test_any_ids_are_names_of_files_of_their_own(tmp_path):
    ids = [
        "../up",
        "/root",
        "a//b",
        "",
        ".",
        "..",
        ".hidden",
        "x" * 3000,
        "a\0b\n",
        "ü/é.png",
        "twice",
        "Twice",
        "twice",
        "\ud800",
        "%",
    ]
    part = tmp_path / "part-000000.jsonl"
    open_sink("jsonl").write(part, rows(*((key, text("words")) for key in ids)))
    assert write_documents(tmp_path, open_sink("jsonl"), [part], "html")["documents"] == len(ids)
    found = made(tmp_path)
    assert len(found) == len(ids) and {"ü/é.png.html", "twice.html", "Twice~2.html", "twice~3.html"} <= set(found)
    assert not [name for name in found if name.startswith((".", "_"))] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.thorough
def test_mistakes_are_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(pdf([lines("a")]))
    flags = ["batch", str(tmp_path / "a.pdf"), str(tmp_path / "out"), "--model", "tiny", "--prompt", ASK]
    assert main([*flags, "--document", "markdown"]) == 2
    assert "tiny writes none: it has no <doctag>" in capsys.readouterr().err
    assert main([*flags, "--document", "pdf"]) == 2
    assert "'pdf' is none of markdown, html, json, doctags" in capsys.readouterr().err
    model = write_checkpoint(tmp_path / "docling")
    config = dict(input=tmp_path / "a.pdf", output=tmp_path / "out", prompt=ASK, model=model, document="json")
    with pytest.raises(InputError, match="--no-keep-special-tokens leaves out"):
        run_batch(BatchConfig(**config, keep_special_tokens=False))
    monkeypatch.setitem(sys.modules, "docling_core.types.doc", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'smolvlm-jax\[documents\]'$"):
        run_batch(BatchConfig(**config))
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_pages_in_and_a_document_out(tmp_path):
    """A PDF of 40 pages, one of them damaged; other files beside it; stopped, on two hosts, and in another form afterwards."""
    model = write_checkpoint(tmp_path / "docling")
    (tmp_path / "in").mkdir()
    contents = [lines(*(f"Line {n}" for n in range(30))), table(), PICTURE]
    (tmp_path / "in/report.pdf").write_bytes(pdf([contents[n % 3] for n in range(40)], damaged=16))
    (tmp_path / "in/locked.pdf").write_bytes(pdf(contents, trailer=ENCRYPT))
    Image.new("RGB", (60, 40), "white").save(tmp_path / "in/scan.png")
    said: list[str] = []
    config = dict(input=tmp_path / "in", output=tmp_path / "out", model=model, prompt=ASK, shard_size=9, num_shards=2, **FAST)
    first = run_batch(BatchConfig(**config, shard_index=0, document="markdown"), said.append)
    assert first["documents"] is None and not (tmp_path / "out/documents").exists()
    assert said[-1] == "documents are made by the host that finishes last, once all parts are there: 2 are not"
    second = run_batch(BatchConfig(**config, shard_index=1, document="markdown"))
    assert second["documents"] == {
        "form": "markdown",
        "documents": 3,
        "written": 3,
        "pages": 40,
        "missing_pages": 2,
        "remarks": [],
    }
    answers = corpus.rows_of(tmp_path / "out")
    assert len(answers) == 42 and {row["text"] for row in answers} == {PAGE, None}
    pages = made(tmp_path / "out")["report.pdf.md"].rstrip("\n").split("\n\n")
    assert len(pages) == 40 and pages.count("## Big") == 39 and pages[16].startswith("[page 17 of report.pdf is missing: ")
    assert "is encrypted" in made(tmp_path / "out")["locked.pdf.md"] and made(tmp_path / "out")["scan.png.md"] == "## Big\n"
    (tmp_path / "out/documents/scan.png.md").unlink()
    again = run_batch(BatchConfig(**config, shard_index=0, document="markdown"))
    assert again["new_records"] == 0 and again["documents"]["written"] == 1
    other = run_batch(BatchConfig(**config, shard_index=1, document="json"))
    assert other["new_records"] == 0 and other["documents"]["written"] == 3
    found = json.loads(made(tmp_path / "out")["report.pdf.json"])
    assert len(found["pages"]) == 39 and "17" not in found["pages"] and len(found["texts"]) == 40
    Manifest(tmp_path / "out", {"another": "job"}).agree(True, said.append)  # --force
    assert not (tmp_path / "out/documents").exists() and len(list((tmp_path / "out/_replaced-1/documents").iterdir())) == 6


@pytest.mark.thorough
def test_with_the_published_tokenizer(tmp_path, published):
    """Its markup is of special tokens, which stay in the text."""
    model = write_checkpoint(tmp_path / "docling", published / "granite-docling-258M")
    (tmp_path / "a.pdf").write_bytes(pdf([lines("a"), table()]))
    names = [str(tmp_path / "a.pdf"), str(tmp_path / "out"), "--model", str(model), "--form", "doctags", "--dpi", "72"]
    assert convert_pages.main(names)["documents"]["pages"] == 2
    assert [row["text"] for row in corpus.rows_of(tmp_path / "out")] == [PAGE] * 2
    body = PAGE.removeprefix("<doctag>").removesuffix("</doctag>")
    assert made(tmp_path / "out") == {"a.pdf.doctags": f"<doctag>{body}\n<page_break>\n{body}</doctag>\n"}
