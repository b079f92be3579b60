"""Files of every kind hold the same records; what cannot be read is an error of the row, or names what is read."""

import bz2
import contextlib
import csv
import datetime
import gzip
import io
import json
import lzma
import os
import sqlite3
import tarfile
import time
from decimal import Decimal
from pathlib import Path

import pytest
from PIL import Image

from smolvlm_jax.errors import ChangedError, InputError, JobError
from smolvlm_jax.records.sources import media, open_source
from smolvlm_jax.train.records import messages_of, open_records

RECORDS = [
    {"id": f"r{n}", "prompt": f"Translate: a… b{n}\t“c”\u2028?", "max_new_tokens": 5 + n, "do_sample": n % 2 == 0}
    for n in range(7)
]


def read(path, **options) -> list:
    source = open_source(path, **options)
    return [source.parse(row.payload) for unit in source.units(3) for row in unit.rows()]


def lines(records=RECORDS) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\r\n" for record in records)


def table(records=RECORDS, delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def archive(folder: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(folder / "a.tar", "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return folder / "a.tar"


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")
MARKS = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff", "utf-32-be": b"\0\0\xfe\xff"}
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_kind_encoding_and_compression_holds_the_same_records(tmp_path, encoding, packer):
    (tmp_path / "plain.jsonl").write_text(lines(), encoding="utf-8", newline="")
    want = read(tmp_path / "plain.jsonl")
    assert [record.error for record in want] == [None] * 7
    texts = {
        "a.jsonl": lines(),
        "lines.json": lines(),
        "array.json": json.dumps(RECORDS, indent=1),
        "a.csv": table(),
        "a.TSV": table(delimiter="\t"),
    }
    for name, text in texts.items():
        path = tmp_path / f"{name}{packer}"
        path.write_bytes(PACKERS[packer](MARKS.get(encoding, b"") + text.encode(encoding)))
        assert read(path) == want, name


def test_compression_with_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="reading .zst needs zstandard: pip install 'smolvlm-jax[zstd]'")
    data = lines().encode()
    whole = b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:200], data[200:]))  # two frames
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.zst").write_bytes(whole)
    assert read(tmp_path / "a.jsonl.zst") == read(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl.zst").write_bytes(whole[:-5])
    with pytest.raises(InputError, match=r"a\.jsonl\.zst cannot be unpacked"):
        read(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("packer", [name for name in PACKERS if name])
def test_what_follows_a_packed_stream_is_read_or_an_error(tmp_path, packer):
    """Files of several streams, with padding between them or not; one of which the second is no stream, cut off or empty."""
    pack, data = PACKERS[packer], lines().encode()
    first, second = pack(data[:200]), pack(data[200:])
    (tmp_path / "a.jsonl").write_bytes(data)
    path = tmp_path / f"a.jsonl{packer}"
    for whole in (first + second, first + bytes(8) + second + bytes(512)):
        path.write_bytes(whole)
        assert read(path) == read(tmp_path / "a.jsonl")
    for broken in (first + b"\1" + second[1:], first + second + b"more", first + second[:-9], first[:-9] + second, b""):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=rf"a\.jsonl{packer} cannot be unpacked"):
            read(path)


def test_an_archive_whose_records_stand_apart_or_that_is_cut_off_is_refused(tmp_path):
    """Packed by kind of file instead of by name, each question would be asked without its picture."""
    texts = {f"{n}.json": b'{"prompt": "What?"}' for n in range(3)}
    path = archive(tmp_path, texts | {f"{n}.jpg": b"x" for n in range(3)})
    with pytest.raises(InputError, match=r"members of one record, '0', stand apart"):
        read(path)
    path = archive(tmp_path, texts)
    path.write_bytes(path.read_bytes()[: 2 * 1024])
    with pytest.raises(InputError, match="cut off at byte 2048"):
        read(path)


@pytest.mark.thorough
def test_an_archive_takes_time_and_memory_that_it_holds(tmp_path):
    """Many members of one record, and a header that would go into memory as a whole."""
    path = archive(tmp_path, {f"0.m{n}": b"x" for n in range(20_000)} | {"1.json": b'{"prompt": "?"}'})
    begin = time.process_time()
    assert [record.id for record in read(path)] == ["0", "1"] and time.process_time() - begin < 20
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("1.json")
        info.pax_headers = {"comment": "x" * 2**21}
        file.addfile(info)
    with pytest.raises(InputError, match=r"no archive that can be read: a header of 2,097,\d+ bytes"):
        read(path)


def test_pipes_and_devices_are_no_input(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", "/dev/null"):
        with pytest.raises(InputError, match="no file and no directory"):
            open_source(path, prompt="?")


def test_names_that_cannot_be_sorted_are_a_full_disk(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")

    def full(*args):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(media.MediaSource, "_sort", full)
    with pytest.raises(JobError, match=r"disk is full.*TMPDIR"):
        open_source(tmp_path, prompt="?")


def test_training_reads_the_same_files(tmp_path):
    rows = [{"prompt": f"{n}…?", "answer": str(n)} for n in range(5)]
    files = {
        "a.jsonl": lines(rows).encode("utf-16"),
        "b.json": json.dumps(rows).encode(),
        "c.csv": table(rows).encode(),
        "d.tsv.gz": gzip.compress(table(rows, "\t").encode("utf-16")),
    }
    want = [messages_of((row, "", "")) for row in rows]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        records = open_records(str(tmp_path / name))
        assert [messages_of(records[n]) for n in range(5)] == want, name
    members = {f"{n}.json": json.dumps(row).encode() for n, row in enumerate(rows)}
    records = open_records(str(archive(tmp_path, members)))
    assert [messages_of(records[n]) for n in range(5)] == want


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b'\xef\xbb\xbfquestion;id\r\n"1; 2";7\r\na,b;8\r\n'),
        ("a.csv", b'"question";"id"\n"1; 2";7\n"a,b";8\n'),
        ("a.csv", b"question\tid\n1; 2\t7\na,b\t8\n"),
        ("a.tsv", b'question,id\n1; 2,7\n"a,b",8\n'),
        ("a.csv", b'question,id\n1; 2,7\n"a,b",8\n'),
    ],
)
def test_a_table_is_separated_by_what_separates_its_names(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    records = read(tmp_path / name)
    assert [(record.id, record.messages[0]["content"][0]["text"]) for record in records] == [("7", "1; 2"), ("8", "a,b")]


def test_text_that_is_not_valid_is_the_error_of_its_line(tmp_path):
    good = b'{"prompt": "a"}\n'
    cases = {
        "a.jsonl": good + b'{"prompt": "caf\xe9"}\n' + good,
        "b.csv": b"prompt\na\ncaf\xe9\na\n",
        "c.jsonl": b"\xff\xfe" + good.decode().encode("utf-16-le") + b"\x00\xd8x\x00\n\x00" + good.decode().encode("utf-16-le"),
        "d.jsonl": good + b'{"prompt": "a", "prompt": "b"}\n' + good,
        "e.csv": b"prompt,id\na,1\na\na,2\n",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        errors = [record.error for record in read(tmp_path / name)]
        assert errors[0] is None and errors[2] is None and ("2 " in errors[1]), (name, errors)
        assert any(words in errors[1] for words in ("not valid UTF-8", "twice", "1 cells")), errors


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.json", b'[{"prompt": "a"}, {"prompt": ]', "not valid JSON"),
        ("a.json", b'[{"prompt": "a"}] x', "not valid JSON"),
        ("a.csv", b"prompt,prompt\na,b\n", "several columns of one name: prompt"),
        ("a.csv", b"frage;nummer\na;b\n", "none of the columns .*question.*document.*; it has frage, nummer:"),
        ("a.csv", b'"question;id"\na\n', "none of the columns .*; it has question;id:"),
        ("a.csv", b"question;id\tx\na;b\n", "none of the columns"),
        ("a.csv", b'prompt\n"a\nb\n', "line 3"),
        ("a.csv", b"", "line of names"),
        ("a.jsonl.gz", gzip.compress(lines().encode())[:-9], "cannot be unpacked"),
        ("a.tar", b"x" * 2000, "no archive"),
        ("a.docx", b"PK", "of a kind that is not read.*jsonl.*csv.*tar.*parquet.*jpg.*mp4.*pdf"),
        ("a.txt", b"Hello", "of a kind that is not read"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=words):
        read(tmp_path / name, prompt="Describe.")


def test_a_later_file_that_cannot_be_read_ends_the_job_in_the_middle(tmp_path):
    (tmp_path / "a.csv").write_text(table())
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(table().encode())[:-9])
    source = open_source(tmp_path)
    rows = []
    with pytest.raises(JobError, match=r"b\.csv\.gz cannot be unpacked.*finished rows are kept"):
        for unit in source.units(3):
            rows += unit.rows()
    assert len(rows) == 7


def test_a_copy_with_the_same_time_and_contents_is_the_same_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines())
    info, source = path.stat(), open_source(path)
    source.describe()  # as at the beginning of a job
    for change, same in ((str, True), (str.swapcase, False)):
        other = tmp_path / "other"
        other.write_text(change(lines()))
        os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
        other.replace(path)
        with contextlib.nullcontext() if same else pytest.raises(ChangedError, match="another file has taken its place"):
            assert len([row for unit in source.units(3) for row in unit.rows()]) == 7


def test_globs_and_names(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"PK")
    (tmp_path / "b.docx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"all that .* matches is of kinds that are not read"):
        open_source(tmp_path / "*", prompt="Describe.")
    assert len(read(tmp_path / "*.docx", name="media", prompt="Describe.")) == 2
    Image.new("RGB", (4, 4)).save(tmp_path / "0af3", "PNG")  # names without an ending are common
    assert [record.id for record in read(tmp_path / "0af3", prompt="Describe.")] == ["0af3"]


def test_webdataset(tmp_path):
    members = {
        "s/0001.json": b'\xef\xbb\xbf{"prompt": "What?", "max_new_tokens": 3, "image": "0001.jpg"}',
        "s/0001.jpg": b"one",
        "s/0002.a.png": b"two a",
        "s/0002.b.png": b"two b",
        "s/0002.prompt": "Größer?".encode(),
        "s/0002.cls": b"7",
        "s/0003.json": b"[",
        "s/0004.txt": b"A caption.",
        "s/0004.mp4": b"video",
        "s/._0004.mp4": b"of a Mac",
        "LICENSE": b"of the data",
        "x/1.json": b'{"image": "other.jpg"}',
        "x/1.jpg": b"one",
    }
    path = archive(tmp_path, members)
    for packed in (tmp_path / "b.tar.gz", tmp_path / "b.tgz"):
        packed.write_bytes(gzip.compress(path.read_bytes()))
    for one in (path, tmp_path / "b.tar.gz", tmp_path / "b.tgz"):
        records = read(one, columns=(("prompt", "txt"),)) if one == path else read(one)
        assert [record.id for record in records] == ["s/0001", "s/0002", 3, "s/0004", 5, 6]
    first, second, third, fourth, fifth, sixth = read(path, prompt="Job's?")
    assert first.messages[0]["content"] == [{"type": "image", "image": b"one"}, {"type": "text", "text": "What?"}]
    assert first.overrides == {"max_new_tokens": 3}
    assert second.messages[0]["content"][:2] == [{"type": "image", "image": b"two a"}, {"type": "image", "image": b"two b"}]
    assert second.messages[0]["content"][2]["text"] == "Größer?"
    assert "record 3, s/0003" in third.error and "not valid JSON" in third.error
    assert fourth.messages[0]["content"] == [{"type": "video", "video": b"video"}, {"type": "text", "text": "Job's?"}]
    assert "LICENSE, has no ending" in fifth.error and "has image in its .json, and a member for it" in sixth.error
    data = bytearray(path.read_bytes())
    data[2 * 512] ^= 0xFF  # the second header
    path.write_bytes(data)
    with pytest.raises(InputError, match="no archive that can be read"):
        read(path)


def test_a_folder_counts_what_it_does_not_read(tmp_path):
    for name in ("IMG_1.JPG", "00001.MTS", "clip.m2ts", "y.asf", "scan.docx", "deep/x.jxl", "deep/z.JXL", "notes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    source = open_source(tmp_path, prompt="Describe.")
    ids = [source.parse(row.payload).id for unit in source.units(9) for row in unit.rows()]
    assert ids == ["00001.MTS", "IMG_1.JPG", "clip.m2ts", "y.asf"]
    assert source.unread == {".docx": 1, ".jxl": 2, "without an ending": 1}
    (tmp_path / "a.jsonl").write_text(lines())
    (tmp_path / "b.parquet").write_text("x")
    assert open_source(tmp_path).unread == {".docx": 1, ".parquet": 1, "no ending": 1}


def test_links_that_lead_nowhere_are_counted(tmp_path):
    """Broken links, links to each other and other things that are no files, beside a picture."""
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    for name, target in (("2.png", "nowhere"), ("3.png", "4.png"), ("4.png", "3.png"), ("5.png", "5.png")):
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "6.png")
    source = open_source(tmp_path, prompt="?")
    assert source.unread == {"no files": 5} and [row.payload for unit in source.units(9) for row in unit.rows()]


@pytest.mark.parametrize("form", ["cells", "cells in quotes over many lines", "one line"])
def test_a_row_of_a_table_that_is_too_large_is_named(tmp_path, monkeypatch, form):
    """All cells of a row are objects of Python, in the memory of the job itself."""
    monkeypatch.setattr("smolvlm_jax.records.sources.tables._MOST_CELLS", 50)
    monkeypatch.setattr("smolvlm_jax.records.sources.tables.MAX_LINE", 500)
    rows, words = {
        "cells": ("," * 51 + "\n", "a row has more than 50 cells"),
        "cells in quotes over many lines": ('"\n",' * 51 + "\n", "a row has more than 50 cells"),
        "one line": ("x" * 501 + "\n", "longer than 500 characters"),
    }[form]
    harmless = "a,b\n" * 40 + '1,"[' + "1," * 40 + '1]"\n'
    (tmp_path / "a.csv").write_text("id,prompt\n" + harmless)
    assert len(read(tmp_path / "a.csv")) == 41
    (tmp_path / "a.csv").write_text("id,prompt\n" + harmless + rows)
    with pytest.raises(InputError, match=rf"a\.csv, line \d+: .*{words}"):
        read(tmp_path / "a.csv")


# ---- tables with types


@pytest.fixture
def parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'smolvlm-jax[parquet]'")
    import pyarrow.parquet

    def write(columns: dict) -> list:
        pyarrow.parquet.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=16)
        return read(tmp_path / "t.parquet", prompt="Job's?")

    return write


def test_whole_floats_are_whole_numbers(parquet, tmp_path):
    records = parquet({"id": [101.0, None, 2.5], "max_new_tokens": [8.0, None, 4.0], "seed": [1.0, 2.0, float("nan")]})
    assert [record.id for record in records[:2]] == [101, 2] and "2.5" in records[2].error
    assert [record.overrides for record in records[:2]] == [{"max_new_tokens": 8, "seed": 1}, {"seed": 2}]
    (tmp_path / "a.jsonl").write_text('{"id": 7.0, "prompt": "a", "max_new_tokens": 8.0, "top_p": 0.5}\n')
    (record,) = read(tmp_path / "a.jsonl")
    assert (record.id, record.overrides) == (7, {"max_new_tokens": 8, "top_p": 0.5})


def test_ids_of_other_types_are_their_text(parquet):
    pa = pytest.importorskip("pyarrow")
    moment = datetime.datetime(2024, 1, 31, 12, 0, 5)
    for values, text in [
        (pa.array([Decimal("12.50")]), "12.50"),
        (pa.array([Decimal("7")]), "7"),
        (pa.array([moment], pa.timestamp("ms")), "2024-01-31 12:00:05.000"),
        (pa.array([1700000000000000001], pa.timestamp("ns")), "2023-11-14 22:13:20.000000001"),
        (pa.array([moment.date()]), "2024-01-31"),
        (pa.array([b"caf\xc3\xa9"], pa.binary()), "café"),
        (pa.array(["x"], pa.large_string()), "x"),
        (pa.array(["x"], pa.string_view()), "x"),
        (pa.array(["x"]).dictionary_encode(), "x"),
    ]:
        (record,) = parquet({"id": values})
        assert (record.id, record.error) == (text, None), values.type


def test_rows_that_do_not_decode_are_errors_of_their_own(parquet, tmp_path):
    pa = pytest.importorskip("pyarrow")
    offsets, data = pa.array([0, 1, 5, 6], pa.int32()).buffers()[1], pa.py_buffer(b"acaf\xe9b")
    bad = pa.Array.from_buffers(pa.string(), 3, [None, offsets, data])
    for columns in ({"id": ["x", "y", "z"], "prompt": bad}, {"id": bad, "prompt": ["x", "y", "z"]}):
        records = parquet(columns)
        assert [record.error is None for record in records] == [True, False, True]
        assert ("prompt" if records[0].id == "x" else "id") + " cannot be read" in records[1].error
    late = parquet({"id": pa.array([2**62, 0], pa.timestamp("us")), "prompt": ["a", "b"]})
    assert "out of range" in late[0].error and late[1].error is None
    maps = pa.array([[("a", b"x")]], pa.map_(pa.string(), pa.binary()))
    assert parquet({"prompt": ["a"], "images": maps})[0].error
    with pytest.raises(InputError, match="several columns of one name: prompt"):
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_arrays([bad, bad], names=["prompt", "prompt"]), tmp_path / "twice.parquet")
        open_source(tmp_path / "twice.parquet")
