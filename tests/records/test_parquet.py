"""Parquet as a source: rows across groups, columns, damaged and very large rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from units import everything

from smolvlm_jax.errors import InputError
from smolvlm_jax.records.sources import open_source


@pytest.fixture
def parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'smolvlm-jax[parquet]'")
    import pyarrow as pa
    import pyarrow.parquet

    def write(name: str, rows: list[dict], **options) -> Path:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name, **options)
        return tmp_path / name

    return write


def test_parquet_rows_across_row_groups_and_units(parquet):
    rows = [{"id": f"r{n}", "image": bytes([n]), "prompt": None if n % 2 else f"Own {n}?", "junk": "x"} for n in range(50)]
    path = parquet("a.parquet", rows, row_group_size=8)
    for size in (1, 5, 8, 20, 100):
        units = everything(open_source(path, prompt="Job's?"), size)
        assert [len(unit) for unit in units] == [min(size, 50 - start) for start in range(0, 50, size)]
        records = [record for unit in units for record in unit]
        assert [record.id for record in records] == [row["id"] for row in rows]
        for n, record in enumerate(records):
            assert record.messages[0]["content"] == [
                {"type": "image", "image": bytes([n])},
                {"type": "text", "text": "Job's?" if n % 2 else f"Own {n}?"},
            ]


def test_parquet_messages_structs_and_columns(parquet, tmp_path):
    messages = [{"role": "user", "content": [{"type": "image", "path": "a.png", "text": None}, {"type": "text", "text": "?"}]}]
    rows = [{"messages": json.dumps(messages)}, {"messages": json.dumps(messages)}]
    for path in (parquet("json.parquet", rows), parquet("nested.parquet", [{"messages": messages}] * 2)):
        for number, record in enumerate(r for unit in everything(open_source(path), 10) for r in unit):
            assert record.id == number + 1
            assert record.messages[0]["content"][0] == {"type": "image", "path": str(tmp_path / "a.png")}
    path = parquet("hf.parquet", [{"key": 5, "jpg": {"bytes": None, "path": "a.png"}}])
    source = open_source(path, prompt="What?", columns=(("id", "key"), ("image", "jpg")))
    (record,) = everything(source, 10)[0]
    assert record.id == 5 and record.messages[0]["content"][0] == {"type": "image", "image": str(tmp_path / "a.png")}
    with pytest.raises(InputError, match=r"no column 'png'.*key, jpg"):
        open_source(path, columns=(("image", "png"),))
    with pytest.raises(InputError, match="--column"):
        open_source(path)


def test_a_damaged_row_group_is_error_rows(parquet):
    noise = np.random.default_rng(0)
    rows = [{"prompt": noise.bytes(40).hex()} for _ in range(30)]
    path = parquet("a.parquet", rows, row_group_size=10, compression="snappy", use_dictionary=False)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle - 150 : middle + 150] = bytes(300)
    path.write_bytes(content)
    records = [r for unit in everything(open_source(path), 30) for r in unit]
    assert len(records) == 30 and [record.id for record in records] == list(range(1, 31))
    assert records[0].error is None and any(record.error and "cannot be read" in record.error for record in records)


@pytest.mark.parametrize("damage", [b"\x01", b"x"])
def test_a_flipped_byte_of_a_parquet_page_is_named(parquet, damage):
    """Unpacked bytes have no redundancy: without the checksum another text would be answered."""
    rows = [{"prompt": f"number {n} of them?"} for n in range(30)]
    options = {"row_group_size": 10, "compression": "none", "use_dictionary": False}
    path = parquet("a.parquet", rows, write_page_checksum=True, **options)
    content = path.read_bytes()
    for checked in (True, False):
        if not checked:
            content = parquet("a.parquet", rows, **options).read_bytes()
        place = content.index(b"number 14") + 7
        path.write_bytes(content[:place] + damage + content[place + 1 :])
        records = [r for unit in everything(open_source(path), 30) for r in unit]
        wrong = [n for n, record in enumerate(records) if record.error]
        assert wrong == (list(range(10, 20)) if checked else []), records
        if checked:
            assert "row group 1 of" in records[10].error and "a.parquet" in records[10].error
    assert len(records) == 30  # a file without checksums is read


def test_a_row_that_is_too_large_is_its_own_error(parquet, monkeypatch):
    monkeypatch.setattr("smolvlm_jax.records.sources.parquet._LARGE", 10_000)
    monkeypatch.setattr("smolvlm_jax.records.sources.parquet.MAX_LINE", 50_000)
    path = parquet("a.parquet", [{"prompt": "x" * (90_000 if n == 7 else 900)} for n in range(40)])
    records = [r for unit in everything(open_source(path), 25) for r in unit]
    assert [n for n, record in enumerate(records) if record.error] == [7] and "50,000 bytes" in records[7].error


def test_a_row_of_millions_of_values_is_its_own_error(parquet, monkeypatch):
    """In Arrow an empty list takes four bytes, and in Python 56: in the memory of the job itself."""
    monkeypatch.setattr("smolvlm_jax.records.sources.parquet._MOST_VALUES", 100)
    deep = {"a": [[[1]] * 30, []], "b": {"c": [1, 2]}}
    for large in ([[]] * 101, [[[1] * 30] * 4], [{"x": [1] * 51}] * 2, [None] * 101):
        rows = [{"prompt": "?", "mine": large if n == 3 else [], "other": deep} for n in range(9)]
        records = [r for unit in everything(open_source(parquet("a.parquet", rows)), 9) for r in unit]
        assert [n for n, record in enumerate(records) if record.error] == [3], large
        assert records[3].error == "row 4 cannot be read: it has more than 100 values in lists"


def test_rows_that_are_too_large_on_average_are_not_decoded(parquet):
    """A kilobyte of a file, which Arrow decodes to gigabytes."""
    pa = pytest.importorskip("pyarrow")
    columns = {"prompt": ["?", "?"], "mine": pa.ListArray.from_arrays(pa.array([0, 1, 10**7], pa.int32()), pa.nulls(10**7))}
    path = parquet("a.parquet", [{"prompt": "?"}])
    pa.parquet.write_table(pa.table(columns), path)
    for options, right in (({}, False), ({"columns": (("unused", "mine"),)}, True)):
        records = [r for unit in everything(open_source(path, **options), 9) for r in unit]
        assert [record.error is None for record in records] == [right, right]
    assert path.stat().st_size < 2000
    (tail,) = {record.error for record in [r for unit in everything(open_source(path), 9) for r in unit][1:]}
    assert "row group 0 of" in tail and "mine.list.element has 10,000,000 values in 2 rows" in tail


# ---- files that come or go
