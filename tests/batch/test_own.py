"""The user's own columns in the rows of answers: which there are, under which names, with which types."""

import datetime
import decimal
import json
import math

import batch_corpus as corpus
import pytest
from pdf_files import lines, pdf

from smolvlm_jax.batch import own
from smolvlm_jax.batch.own import Own, plain
from smolvlm_jax.batch.sinks import COLUMNS
from smolvlm_jax.errors import InputError
from smolvlm_jax.records.record import own_columns, record_from


def write(path, records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


RECORDS = [
    {"id": "a", "prompt": "1?", "answer": "1", "url": "https://x/a", "meta": {"tags": ["p", None]}, "score": 0.5, "n": 3},
    {"id": "b", "prompt": "2?", "url": None, "score": math.nan, "n": 2**70, "half": "\ud800"},
    {"id": "c", "images": ["nowhere.png"], "prompt": "?", "url": "https://x/c", "n": "three"},
    "{",
]


def test_columns_that_the_job_does_not_read_are_in_the_rows(command, tmp_path):
    source = write(tmp_path / "in.jsonl", RECORDS)
    code, summary, said = command(source, tmp_path / "out", "--max-error-rate", "1")
    assert code == 0 and "copied to their rows: meta, n, score, url" in said, said
    rows = corpus.rows_of(tmp_path / "out")
    kept = [{name: value for name, value in row.items() if name not in COLUMNS} for row in rows]
    assert kept[0] == {name: RECORDS[0][name] for name in ("answer", "url", "meta", "score", "n")}
    assert kept[1] == {"url": None, "score": None, "n": 2**70, "half": "\ud800"}
    assert rows[2]["error"] and kept[2] == {"url": "https://x/c", "n": "three"} and kept[3] == {}
    assert [tuple(row)[: len(COLUMNS)] for row in rows] == [COLUMNS] * 4
    assert summary["error_kinds"] and sum(summary["error_kinds"].values()) == 2
    for line in (tmp_path / "out" / "part-000000.jsonl").read_bytes().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_keep_names_columns_whether_they_are_read_or_not(command, tmp_path):
    source = write(tmp_path / "in.jsonl", RECORDS)
    assert command(source, tmp_path / "a", "--keep", "id,url,prompt", "--max-error-rate", "1")[0] == 0
    rows = corpus.rows_of(tmp_path / "a")
    assert [{k: v for k, v in row.items() if k not in COLUMNS} for row in rows[:2]] == [
        {"url": "https://x/a", "prompt": "1?"},
        {"url": None, "prompt": "2?"},
    ]
    assert command(source, tmp_path / "b", "--keep", "none", "--max-error-rate", "1")[0] == 0
    assert {tuple(row) for row in corpus.rows_of(tmp_path / "b")} == {COLUMNS}
    code, _, said = command(source, tmp_path / "b", "--max-error-rate", "1")
    assert code == 2 and "keep was [], is 'all'" in said
    code, _, said = command(source, tmp_path / "c", "--keep", "scor")
    assert code == 2 and "--keep scor: no such column; did you mean score" in said and not (tmp_path / "c").exists()


@pytest.mark.parametrize("flags", [(), ("--keep", "text"), ("--logprobs", "mean")])
def test_a_column_with_a_name_of_the_answers_is_refused_before_anything_is_written(command, tmp_path, flags, monkeypatch):
    monkeypatch.setattr(own, "_RECORDS", 2)
    name = "min_logprob" if "--logprobs" in flags else "text"
    source = write(tmp_path / "in.jsonl", [{"prompt": "1?", name: "mine"}])
    code, _, said = command(source, tmp_path / "out", *flags)
    assert code == 2 and f"a column '{name}', which the rows of answers have too" in said and not (tmp_path / "out").exists()
    for mended in (("--column", f"unused={name}"), ("--keep", "none")):
        assert command(source, tmp_path / mended[0], *(flags if "--keep" not in flags else ()), *mended)[0] == 0
    # A record that comes later is an error of its own.
    source = write(tmp_path / "late.jsonl", [*[{"prompt": "1?"}] * 2, {"id": "x", "prompt": "1?", name: "mine"}])
    kept = flags if "--keep" not in flags else ()
    assert command(source, tmp_path / "late", *kept, "--max-error-rate", "1")[0] == 0
    assert f"a column '{name}'" in corpus.rows_of(tmp_path / "late")[2]["error"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "?", "image_url": "https://x/1"}, "the column 'image_url' looks like one: --column image=image_url"),
        ({"prompt": "?", "photo": "/data/1"}, "the column 'photo' looks like one"),
        (
            {"prompt": "?", "file": "cat.jpg", "k": 1},
            "none of the first 1 records can be read: nothing reads the column 'file'",
        ),
    ],
)
def test_input_that_looks_like_pictures_and_has_none_is_refused(command, tmp_path, record, words):
    source = write(tmp_path / "in.jsonl", [record])
    code, _, said = command(source, tmp_path / "out")
    assert code == 2 and words in said and ", ".join(record) in said and not (tmp_path / "out").exists(), said


def test_ordinary_columns_are_not_taken_for_pictures(command, tmp_path):
    own = {"image_id": "17", "photo_credit": "AFP/Getty", "url": "https://x/page", "caption": "an image of /a"}
    assert command(write(tmp_path / "in.jsonl", [{"prompt": "?", **own}]), tmp_path / "out")[0] == 0
    (row,) = corpus.rows_of(tmp_path / "out")
    assert own.items() <= row.items()


def test_parquet_of_parquet_has_the_same_types_and_values(command, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'smolvlm-jax[parquet]'")
    from pyarrow import parquet

    when = datetime.datetime(2024, 1, 31, 12, 0, 5, 123456)
    own = {
        "i8": pa.array([1, None, -3], pa.int8()),
        "u64": pa.array([2**64 - 1, 0, None], pa.uint64()),
        "f32": pa.array([0.1, math.inf, None], pa.float32()),
        "b": pa.array([True, None, False]),
        "s": pa.array(["x", None, ""], pa.large_string()),
        "day": pa.array([when.date(), None, when.date()]),
        "at": pa.array([when, None, when], pa.timestamp("us")),
        "utc": pa.array([when, None, when], pa.timestamp("ns", "UTC")),
        "berlin": pa.array([when, None, when], pa.timestamp("ms", "Europe/Berlin")),
        "clock": pa.array([when.time(), None, when.time()], pa.time64("us")),
        "money": pa.array([decimal.Decimal("1.20"), None, decimal.Decimal("-3.00")], pa.decimal128(10, 2)),
        "list": pa.array([[1.5, None], None, []], pa.list_(pa.float64())),
        "struct": pa.array(
            [{"a": 1, "b": ["x"]}, None, {"a": None, "b": []}], pa.struct({"a": pa.int16(), "b": pa.list_(pa.string())})
        ),
        "kind": pa.array(["x", None, "x"]).dictionary_encode(),
    }
    table = pa.table({"id": ["a", "b", "c"], "prompt": ["1?", "2?", "3?"], **own})
    parquet.write_table(table, tmp_path / "in.parquet")
    code, summary, said = command(tmp_path / "in.parquet", tmp_path / "out", "--format", "parquet")
    assert code == 0 and summary["errors"] == 0, said
    found = parquet.read_table(tmp_path / "out" / "part-000000.parquet")
    assert found.column_names == [*COLUMNS, *own]
    for name, array in own.items():
        want = array.dictionary_decode() if name == "kind" else array
        assert found[name].combine_chunks().equals(want), (name, found[name], want)
    again = command(tmp_path / "in.parquet", tmp_path / "out", "--format", "parquet")
    assert again[0] == 0 and again[1]["new_records"] == 0
    assert command(tmp_path / "in.parquet", tmp_path / "lines", "--keep", "money,at,kind")[0] == 0
    row = corpus.rows_of(tmp_path / "lines")[0]
    assert (row["money"], row["at"], row["kind"]) == ("1.20", "2024-01-31 12:00:05.123456", "x")


def test_parquet_of_lines_has_one_schema_for_all_parts(command, tmp_path, monkeypatch):
    monkeypatch.setattr(own, "_RECORDS", 4)
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'smolvlm-jax[parquet]'")
    from pyarrow import parquet

    plain = {"prompt": "?", "n": 1, "x": 1, "yes": True, "s": "a", "mixed": 1, "deep": {"k": [1]}}
    first = [{**plain, "x": 0.5}, {**plain, "mixed": "b"}]
    odd = [{**plain, "n": 1.5, "yes": "no", "late": [1]}, {**plain, "n": 2**70, "s": 7, "x": math.nan}]
    source = write(tmp_path / "in.jsonl", [*first, *[plain] * 2, *odd])
    assert command(source, tmp_path / "out", "--format", "parquet", "--shard-size", "4")[0] == 0
    names = {
        "n": "int64",
        "x": "double",
        "yes": "bool",
        "s": "string",
        "mixed": "string",
        "deep": "string",
        "other_columns": "string",
    }
    parts = [parquet.read_table(tmp_path / "out" / f"part-00000{n}.parquet") for n in range(2)]
    assert parts[0].schema == parts[1].schema
    assert {name: str(parts[0].schema.field(name).type) for name in parts[0].column_names[len(COLUMNS) :]} == names
    rows = [part.to_pylist() for part in parts]
    assert [(row["mixed"], row["deep"], row["x"]) for row in rows[0][:2]] == [
        ("1", '{"k": [1]}', 0.5),
        ("b", '{"k": [1]}', 1.0),
    ]
    assert {row["other_columns"] for row in rows[0]} == {None}
    late, large = rows[1]
    assert (late["n"], late["yes"]) == (None, None) and json.loads(late["other_columns"]) == {
        "late": [1],
        "n": 1.5,
        "yes": "no",
    }
    assert (
        (large["n"], large["s"]) == (None, "7")
        and json.loads(large["other_columns"]) == {"n": 2**70}
        and math.isnan(large["x"])
    )


def test_what_a_job_reads_is_not_its_users_own():
    record = {"id": 1, "prompt": "?", "image": "a.png", "seed": 3, "max_tokens": 2, "answer": "x", "label": 1, "unused": 2}
    assert own_columns(record) == ("answer", "label", "unused")
    assert own_columns(record, (("id", "label"), ("unused", "answer"))) == ("unused",)
    body = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}, "label": 1}
    assert own_columns(body) == ("label",) and own_columns({"url": "u"}) == ("url",)
    assert record_from({"prompt": 5, "label": 1}, 1).given == {"prompt": 5, "label": 1} and record_from([], 1).given == {}
    with pytest.raises(InputError, match=r"'image' holds bytes"):
        Own(("image",)).of({"image": b"x"})
    assert plain("x", [datetime.date(2024, 1, 31), decimal.Decimal("1.20")]) == ["2024-01-31", "1.20"]


def test_a_job_answers_the_pages_of_a_document_in_one_row(command, tmp_path):
    pytest.importorskip("pypdfium2", reason="needs pypdfium2: pip install 'smolvlm-jax[documents]'")
    (tmp_path / "report.pdf").write_bytes(pdf([lines("one"), lines("two")]))
    source = write(tmp_path / "in.jsonl", [{"id": "r", "prompt": "?", "document": "report.pdf", "year": 2024}])
    code, _, said = command(source, tmp_path / "out", "--no-image-splitting", "--gallery")
    (row,) = corpus.rows_of(tmp_path / "out")
    assert code == 0 and row["tiles"] == 2 and row["year"] == 2024 and "document" not in row, said
    assert (tmp_path / "out" / "_gallery.html").read_text().count("data:image/jpeg") == 2
