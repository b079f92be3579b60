"""An input that changes while a job runs: the job says so in one line and ends, and once the input is back, each record has one
true row."""

import json
import os
import time
from pathlib import Path

import batch_corpus as corpus
import pytest
from batch_double import Double

from smolvlm_jax.batch.job import BatchJob, Shard
from smolvlm_jax.batch.pool import WorkerPool
from smolvlm_jax.batch.sinks import open_sink
from smolvlm_jax.batch.workers import Setup
from smolvlm_jax.checkpoint import resolve
from smolvlm_jax.errors import ChangedError
from smolvlm_jax.records.sources import open_source

COUNT = 60


def write(path: Path, word: str = "own") -> None:
    rows = [{"id": n, "prompt": f"{n} {word}?", "max_new_tokens": 3} for n in range(COUNT)]
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    elif path.suffix == ".csv":
        path.write_text("id,prompt,max_new_tokens\n" + "".join(f"{row['id']},{row['prompt']},3\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def appended(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b'{"id": 999, "prompt": "x"}\n')


def written_over(path: Path) -> None:
    data = path.read_bytes().replace(b"own", b"alien"[:3])
    with open(path, "r+b") as file:
        file.write(data)


def rotated(path: Path) -> None:
    path.rename(path.with_name("before" + path.suffix + ".old"))
    write(path, "new")


def gone(path: Path) -> None:
    path.unlink()


CHANGES = (truncated, appended, written_over, rotated, gone)


def run(path: Path, out: Path, after=lambda count: None) -> dict:
    source = open_source(path)
    source.describe()
    out.mkdir(exist_ok=True)
    with WorkerPool(Setup(str(resolve("tiny")), source.parse), 0) as pool:
        engine = lambda: Double(after=after)
        return BatchJob(source, out, open_sink("jsonl"), Shard(size=8), pool, engine, quiet=True).run()


@pytest.mark.parametrize(
    ("change", "kind"),
    [*((change, ".jsonl") for change in CHANGES), (truncated, ".csv"), (written_over, ".parquet"), (truncated, ".parquet")],
)
def test_a_job_ends_with_the_change_and_goes_on_with_the_old_file(tmp_path, change, kind):
    if kind == ".parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'smolvlm-jax[parquet]'")
    path = tmp_path / f"in{kind}"
    write(path)
    before, info = path.read_bytes(), path.stat()
    run(path, tmp_path / "whole")
    want = corpus.multiset(corpus.rows_of(tmp_path / "whole"))
    with pytest.raises(ChangedError, match=r"in\.(jsonl|csv|parquet)"):
        run(path, tmp_path / "out", lambda count: change(path) if count == 20 else None)
    early = corpus.rows_of(tmp_path / "out")
    assert not corpus.multiset(early) - want, "rows of the file that was not asked about"
    path.write_bytes(before)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    summary = run(path, tmp_path / "out")
    assert summary["complete"] and corpus.multiset(corpus.rows_of(tmp_path / "out")) == want


def test_pictures_of_a_directory_are_checked_when_they_were_read(tmp_path):
    (tmp_path / "in").mkdir()
    names = corpus.pictures(tmp_path / "in", 24)
    victim = tmp_path / "in" / sorted(names)[20]
    data = victim.read_bytes()

    def go(out: Path, after=lambda count: None) -> dict:
        source = open_source(tmp_path / "in", prompt="?")
        out.mkdir(exist_ok=True)
        with WorkerPool(Setup(str(resolve("tiny")), source.parse), 0) as pool:
            return BatchJob(source, out, open_sink("jsonl"), Shard(size=4), pool, lambda: Double(after=after), quiet=True).run()

    go(tmp_path / "whole")
    for name, change in (("a", victim.unlink), ("b", lambda: victim.write_bytes(data[::-1]))):
        with pytest.raises(ChangedError, match=victim.name):
            go(tmp_path / name, lambda count, change=change: change() if count == 3 else None)
        victim.write_bytes(data)
        assert go(tmp_path / name)["complete"]
        assert corpus.multiset(corpus.rows_of(tmp_path / name)) == corpus.multiset(corpus.rows_of(tmp_path / "whole"))


@pytest.mark.thorough
def test_a_running_job_whose_file_is_truncated_and_restored(tmp_path):
    """The command itself: one line, exit code 1, and the whole answer once the file is there again."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out"
    with open(path, "w") as file:
        for n in range(2000):
            file.write(json.dumps({"id": n, "prompt": f"{n}?", "max_new_tokens": 8, "ignore_eos": True}) + "\n")
    data = path.read_bytes()
    flags = ("--shard-size", "50", "--workers", "1", "--quiet", "--slots", "8", "--ring-lengths", "64")
    process = corpus.start(path, out, *flags)
    deadline = time.monotonic() + 100
    while not (out / "part-000002.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    with open(path, "r+b") as file:
        file.truncate(len(data) // 2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.count("\n") == 1 and "in.jsonl has changed" in said, said
    assert not [part for part in out.glob("part-*") if not part.stat().st_size]
    refused = corpus.start(path, out, *flags)
    _, said = refused.communicate(timeout=60)
    assert refused.returncode == 2 and f"in.jsonl has shrunk from {len(data):,} to {len(data) // 2:,} bytes" in said, said
    path.write_bytes(data)
    again = corpus.start(path, out, *flags)
    _, said = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert [row["id"] for row in corpus.rows_of(out)] == list(range(2000))
