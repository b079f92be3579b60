"""Pages of PDFs that are objects in a store."""

import numpy as np
import pytest
from pdf_files import lines, pdf

pytest.importorskip("pypdfium2", reason="needs pypdfium2: pip install 'smolvlm-jax[documents]'")
pytest.importorskip("docling_core", reason="needs docling-core: pip install 'smolvlm-jax[documents]'")

from smolvlm_jax.batch.documents import write_documents
from smolvlm_jax.batch.sinks import COLUMNS, open_sink
from smolvlm_jax.processing.fetch import load_image
from smolvlm_jax.records.sources import open_source

pytestmark = [pytest.mark.network, pytest.mark.thorough]


def test_pages_are_drawn_as_from_a_file(bucket, tmp_path):
    data = pdf([lines(str(number)) for number in range(3)], damaged=1)
    (bucket / "deep" / "a.pdf").write_bytes(data)
    (bucket / "torn.pdf").write_bytes(data[:100])
    (tmp_path / "a.pdf").write_bytes(data)

    def read(path) -> dict:
        source = open_source(str(path), prompt="?")
        records = [source.parse(row.payload) for unit in source.units(9) for row in unit.rows()]
        return {record.id: record.messages[0]["content"][0]["image"] for record in records}

    found, local = read(bucket), read(tmp_path / "a.pdf")
    assert list(found) == ["deep/a.pdf#1", "deep/a.pdf#2", "deep/a.pdf#3", "torn.pdf"]
    for number in (1, 3):
        assert np.array_equal(load_image(found[f"deep/a.pdf#{number}"]), load_image(local[f"a.pdf#{number}"]))
    for name, words in (("deep/a.pdf#2", "page 2 of .* is damaged"), ("torn.pdf", "torn.pdf' cannot be read")):
        with pytest.raises(OSError, match=words):
            load_image(found[name])


def test_documents_are_objects(bucket):
    row = dict.fromkeys(COLUMNS, 0) | {"id": "deep/a.pdf#1", "text": "<doctag><text>Words</text></doctag>", "error": None}
    part = bucket / "part-000000.jsonl"
    open_sink("jsonl").write(part, [row])
    assert write_documents(bucket, open_sink("jsonl"), [part], "markdown")["written"] == 1
    assert (bucket / "documents/deep/a.pdf.md").read_bytes() == b"Words\n"
    assert write_documents(bucket, open_sink("jsonl"), [part], "markdown")["written"] == 0
