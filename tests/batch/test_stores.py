"""Batch jobs whose input, pictures and output are in an object store, with an engine that needs no time."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import batch_corpus as corpus
import batch_double as double
import pytest

from smolvlm_jax.batch import journal
from smolvlm_jax.batch.bucket import claimed
from smolvlm_jax.batch.manifest import Manifest
from smolvlm_jax.batch.parts import Part
from smolvlm_jax.batch.sinks import open_sink
from smolvlm_jax.cli import main
from smolvlm_jax.errors import ChangedError, InputError, JobError, UnreachableError
from smolvlm_jax.records.sources import open_source
from smolvlm_jax.storage import StorePath, upload_tree

pytestmark = pytest.mark.network


@pytest.fixture
def records(bucket, tmp_path) -> tuple[Path, StorePath]:
    """(a local folder of 40 records with pictures, a place in the bucket that holds the same)."""
    local = tmp_path / "local"
    (local / "sub").mkdir(parents=True)
    names = corpus.pictures(local / "sub", 6)
    lines = []
    for number in range(40):
        name = "sub/nowhere.png" if number % 10 == 7 else f"sub/{names[number % 6]}"
        item = [{"type": "image", "path": name}] if number % 2 else []
        lines.append(json.dumps({"id": number, "messages": corpus.chat(f"{number}?", *item), "max_new_tokens": 1 + number % 5}))
    (local / "records.jsonl").write_text("\n".join(lines) + "\n")
    upload_tree(local, bucket / "in")
    return local, bucket / "in"


def rows(out, folder="") -> dict:
    return corpus.multiset(corpus.rows_of(out), folder)


def test_rows_are_those_of_a_job_on_files(front, records, bucket, tmp_path):
    local, stored = records
    double.run(local / "records.jsonl", tmp_path / "out")
    front.forget()
    summary = double.run(f"{stored}/records.jsonl", bucket / "out")
    assert summary["complete"] and summary["records"] == 40 and summary["errors"] == 4
    assert rows(bucket / "out", stored) == rows(tmp_path / "out", local)
    pictures = [key for method, key in front.log if method == "GET" and key.endswith((".png", ".jpg"))]
    assert len(pictures) == 20, "a picture is one request"
    assert [entry.name for entry in (bucket / "out").entries()] == [f"part-{n:06d}.jsonl" for n in range(4)]
    front.forget()
    assert double.run(f"{stored}/records.jsonl", bucket / "out")["new_records"] == 0


@pytest.mark.thorough
def test_globs_and_directories(front, records, bucket, tmp_path):
    local, stored = records
    front.page = 3
    named = {path.name for path in (local / "sub").iterdir()}
    for name in ("in/.hidden.png", "in/_part.jsonl", "in/more.jsonl", "in/notes.odt", "in/sub/deep/er/x.png"):
        (bucket / name).write_bytes(b'{"id": "more", "prompt": "?"}\n')

    def ids(path, **given):
        source = open_source(path, **given)
        return [source.parse(row.payload).id for unit in source.units(9) for row in unit.rows()]

    assert ids(f"{stored}/sub/*.*", prompt="?") == sorted(named)
    assert ids(f"{stored}/**/*.png", prompt="?") == sorted(
        {f"sub/{name}" for name in named if name.endswith(".png")} | {"sub/deep/er/x.png"}
    )
    assert ids(f"{stored}/sub", prompt="?") == sorted({*named, "deep/er/x.png"})
    assert len(ids(str(stored), name="jsonl")) == 41 and ids(f"{stored}/mo*.jsonl") == ["more"]
    source = open_source(str(stored), "jsonl")
    assert dict(source.unread) == {".odt": 1}
    (bucket / "in/late.jsonl").touch()
    assert source.added() == ["late.jsonl"]
    absent = {f"{stored}/no.jsonl": "no input", f"{stored}/*.csv": "no file that ends with", f"{bucket}/no/*": "no directory"}
    for path, words in absent.items():
        with pytest.raises(InputError, match=words):
            open_source(path, prompt="?", name="csv" if "csv" in path else None)


@pytest.mark.thorough
def test_parquet_is_read_by_ranges(front, bucket, tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet", reason="reads Parquet: pip install 'smolvlm-jax[parquet]'")
    import pyarrow as pa

    table = pa.table(
        {"id": range(100), "prompt": [f"{n}?" for n in range(100)], "ballast": [os.urandom(50_000) for _ in range(100)]}
    )
    pyarrow.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    upload_tree(tmp_path, bucket)
    source = open_source(f"{bucket}/a.parquet", columns=(("unused", "ballast"),))
    front.forget()
    found = [source.parse(row.payload).id for unit in source.units(20) for row in (unit.rows() if unit.index == 3 else ())]
    assert found == list(range(60, 80)) and front.sent < 1_000_000
    (bucket / "a.parquet").write_bytes(b"other")
    with pytest.raises(ChangedError, match="has changed"):
        list(source.units(20))


# A job of its own process: the input, the output, this shard, how many there are.
_JOB = """
import sys
from smolvlm_jax.storage import place
import batch_double as double
source, out, index, count = sys.argv[1:]
double.run(source, place(out), double.Double(pause=0.08), double.Shard(int(index), int(count), 10))
"""


@pytest.mark.thorough
def test_forty_records_survive_kill_9(front, records, bucket, tmp_path):
    local, stored = records
    double.run(local / "records.jsonl", tmp_path / "out")
    path = os.pathsep.join(str(Path(__file__).parents[1] / name) for name in ("batch", "storage"))

    def start(index: int) -> subprocess.Popen:
        command = [sys.executable, "-c", _JOB, f"{stored}/records.jsonl", f"{bucket}/out", str(index), "2"]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"})

    killed, twin, other = start(0), start(0), start(1)
    for process in (killed, twin):
        deadline = time.monotonic() + 60
        while not list((bucket / "out").glob(".part-*.rows")) and not list((bucket / "out").glob("part-*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert other.wait(120) == 0
    again = start(0)
    assert again.wait(120) == 0
    text = lambda out: sorted((row["id"], row["text"]) for row in corpus.rows_of(out))
    assert [row["id"] for row in corpus.rows_of(bucket / "out")] == list(range(40))
    assert text(bucket / "out") == text(tmp_path / "out")
    assert not list((bucket / "out").glob(".*"))


def row(key) -> dict:
    blank = dict(text="x", error=None, finish_reason="stop", prompt_tokens=3, new_tokens=2, tiles=0, seconds=0.5)
    return {"id": key, **blank}


def test_rows_of_a_killed_process_are_taken_over(bucket, monkeypatch):
    monkeypatch.setattr(journal, "_LEAST_SECONDS", 0.0)
    sink, first = open_sink("jsonl"), Part(bucket, 0, open_sink("jsonl"), "key")
    for position in range(5):
        first.add(position, row(position))
        first._journal._sender.join()
    del first  # what has not been put is gone with its process
    second = Part(bucket, 0, sink, "key")
    assert sorted(second.taken_over) == [0, 1, 2, 3, 4] and not Part(bucket, 0, sink, "other").taken_over
    second.add(5, row(5))
    second.close()
    third = Part(bucket, 0, sink, "key")
    assert sorted(third.taken_over) == [0, 1, 2, 3, 4, 5]
    third.finish()
    assert [row["id"] for row in sink.read(bucket / "part-000000.jsonl")] == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in bucket.iterdir()] == ["part-000000.jsonl"]
    assert Part.open(bucket, 0, sink, "key") is None


def test_force_and_a_job_that_is_replaced(bucket, monkeypatch):
    said: list[str] = []
    old, sink = Manifest(bucket / "out", {"job": 1}), open_sink("jsonl")
    old.agree(False, said.append)
    late, finished = Part(bucket / "out", 0, sink, old.key), Part(bucket / "out", 1, sink, old.key)
    for part in (late, finished):
        part.add(0, row("old"))
    with old.held(finished.path):
        finished.finish()
    with pytest.raises(InputError, match="holds the output of another job: job was 1, is 2"):
        Manifest(bucket / "out", {"job": 2}).agree(False, said.append)

    new = [Manifest(bucket / "out", {"job": 2}) for _ in range(3)]  # of three hosts at once, one replaces it
    with ThreadPool(3) as pool:
        pool.map(lambda manifest: manifest.agree(True, said.append), new)
    assert len(said) == 1 and said[0].endswith("_replaced-1")
    assert (bucket / "out/_replaced-1/part-000001.jsonl").is_file() and not (bucket / "out/part-000001.jsonl").exists()
    assert not list((bucket / "out").glob("_replacing-*"))

    with pytest.raises(JobError, match="was replaced while this job ran"), old.held(late.path):
        pass
    late.finish()  # as if it had been replaced just before the put, and killed just after it
    part = Part.open(bucket / "out", 0, sink, new[0].key)
    assert part is not None, "a part of a job that was replaced does not count"
    part.add(0, row("new"))
    with new[0].held(part.path):
        part.finish()
    assert [row["id"] for row in sink.read(bucket / "out/part-000000.jsonl")] == ["new"]
    assert Part.open(bucket / "out", 0, sink, new[0].key) is None


def test_a_late_part_is_withdrawn(bucket):
    old = Manifest(bucket, {"job": 1})
    old.agree(False, print)
    part = Part(bucket, 3, open_sink("jsonl"), old.key)
    with pytest.raises(JobError, match="was replaced"), old.held(part.path):
        Manifest(bucket, {"job": 2}).agree(True, print)
        part.finish()
    assert not part.path.exists()


@pytest.mark.thorough
def test_a_claim_of_a_process_that_was_killed_is_passed_on(bucket, monkeypatch):
    for name, seconds in (("_DEAD", 1.0), ("_RENEWED", 0.2)):
        monkeypatch.setattr(f"smolvlm_jax.batch.bucket.{name}", seconds)
    with claimed(bucket, b"what") as ours:
        assert ours
        (name,) = (path.name for path in bucket.iterdir())
        waiting = ThreadPool(1).apply_async(lambda: claimed(bucket, b"what").__enter__())
        time.sleep(1.5)
        assert not waiting.ready(), "its owner lives"
    assert waiting.get(10) is False
    (bucket / name).write_bytes(b"of the dead 0")
    with claimed(bucket, b"what") as ours:
        assert ours
    assert not list(bucket.iterdir())


@pytest.mark.parametrize(
    ("source", "out", "words"),
    [
        (
            "{bucket}/in/records.jsonl",
            "{kind}://no-such-bucket/out",
            "OUTPUT ({kind}://no-such-bucket/out) cannot be used: no such bucket",
        ),
        ("{kind}://no-such-bucket/x.jsonl", "{bucket}/out", "no input '{kind}://no-such-bucket/x.jsonl'"),
        ("{bucket}/in/no.jsonl", "{bucket}/out", "no input"),
        (
            "{kind}://locked/x.jsonl",
            "{bucket}/out",
            "the input {kind}://locked/x.jsonl cannot be read: the store denies access",
        ),
        (
            "{bucket}/in/records.jsonl",
            "{kind}://locked/out",
            "OUTPUT ({kind}://locked/out) cannot be used: the store denies access",
        ),
        ("{bucket}/in", "{bucket}/in", "so answers would be input"),
        ("{bucket}/in/records.jsonl", "az://x/out", "'az://x/out' names no bucket"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(source, out, words, front, records, bucket, capsys):
    front.denied.add("locked")
    given = {"bucket": bucket, "kind": front.kind}
    assert main(["batch", source.format(**given), out.format(**given), "--model", "tiny", "--quiet"]) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and said.count("\n") == 1 and words.format(**given) in said, said


def test_a_picture_that_vanishes_and_one_that_changes(front, records, bucket):
    _, stored = records
    name = sorted(path.name for path in (stored / "sub").iterdir())[3]
    with double.batch(f"{stored}/records.jsonl", bucket / "out") as job:
        (stored / "sub" / name).unlink()
        summary = job.run()
    assert summary["complete"] and summary["records"] == 40 and summary["errors"] > 4
    errors = [row["error"] for row in corpus.rows_of(bucket / "out") if row["error"] and name in row["error"]]
    assert errors and all(f"no picture at '{stored}/sub/{name}'" in error for error in errors)
    with double.batch(f"{stored}/records.jsonl", bucket / "more") as job:
        (stored / "records.jsonl").write_bytes((stored / "records.jsonl").read_bytes() + b"\n")
        with pytest.raises(ChangedError, match=r"has changed: it had \d+ bytes when the job began"):
            job.run()
    assert not list((bucket / "more").glob("part-*3*"))


@pytest.mark.thorough
def test_a_store_that_is_away_for_some_seconds_costs_nothing_but_them(front, records, bucket):
    _, stored = records
    after = lambda count: front.down(2.0) if count == 15 else None
    summary = double.run(f"{stored}/records.jsonl", bucket / "out", double.Double(0.02, after))
    assert summary["complete"] and summary["records"] == 40 and summary["errors"] == 4


def test_a_store_that_stays_away_ends_the_job_and_makes_no_rows_of_it(front, records, bucket, monkeypatch):
    _, stored = records

    def away(*_):
        raise UnreachableError(f"{stored}: the store does not answer")

    with double.batch(f"{stored}/records.jsonl", bucket / "out") as job, monkeypatch.context() as patched:
        patched.setattr("smolvlm_jax.processing.fetch.read_object", away)
        with pytest.raises(JobError, match="the store does not answer; what is finished is kept"):
            job.run()
    assert double.run(f"{stored}/records.jsonl", bucket / "out")["errors"] == 4


@pytest.mark.thorough
@pytest.mark.parametrize("front", ["s3"], indirect=True)  # gcp-storage-emulator has no pages of its own
def test_more_than_a_page_of_pictures(front, bucket):
    with ThreadPool(16) as pool:
        pool.map(lambda number: (bucket / f"in/{number:05d}.png").touch(), range(1100))
    front.forget()
    source = open_source(f"{bucket}/in", prompt="?")
    assert source.describe()["count"] == 1100 and sum(1 for unit in source.units(100) for _ in unit.rows()) == 1100
    assert len(front.log) < 12
