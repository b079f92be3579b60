"""Parts and shards: what stands in the output directory, and when."""

import io as io_module
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_jax import io
from smolvlm_jax.batch import journal
from smolvlm_jax.batch.hosts import shard_of
from smolvlm_jax.batch.job import Shard
from smolvlm_jax.batch.parts import Part, clean_up
from smolvlm_jax.batch.sinks import COLUMNS, open_sink
from smolvlm_jax.errors import InputError

JSONL = open_sink("jsonl")


def row(key, **values) -> dict:
    blank = dict(text=f"answer {key}", error=None, finish_reason="stop", prompt_tokens=3, new_tokens=2, tiles=0, seconds=0.5)
    return {"id": key, **blank, **values}


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# ---- sinks


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_what_is_written_is_read(tmp_path, name):
    if name == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'smolvlm-jax[parquet]'")
    sink = open_sink(name)
    rows = [row("a"), row("b\u2028\n", text="é 🙂"), row("c", text=None, error="no", finish_reason="error")]
    path = tmp_path / f"part-000000{sink.ending}"
    sink.write(path, rows)
    assert list(sink.read(path)) == rows and all(tuple(r) == COLUMNS for r in sink.read(path))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_half_a_surrogate_pair_does_no_harm(tmp_path, name):
    if name == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'smolvlm-jax[parquet]'")
    sink = open_sink(name)
    sink.write(tmp_path / "part", [row("\ud800")])
    (found,) = sink.read(tmp_path / "part")
    assert found["id"] == ("\ud800" if name == "jsonl" else "\\ud800")


def test_a_part_that_cannot_be_written_leaves_nothing(tmp_path):
    def rows():
        yield row("a")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        JSONL.write(tmp_path / "part-000000.jsonl", rows())
    assert not os.listdir(tmp_path)


# ---- parts in progress


def test_a_part_appears_whole_in_the_order_of_its_input(tmp_path):
    part = Part(tmp_path, 3, JSONL)
    for position in (2, 0, 7, 1):
        assert part.add(position, row(position))
    assert not part.add(7, row("again")), "one row for each position"
    assert not list(tmp_path.glob("part-*"))
    part.finish()
    assert os.listdir(tmp_path) == ["part-000003.jsonl"]
    assert [r["id"] for r in JSONL.read(part.path)] == [0, 1, 2, 7]
    assert Part.open(tmp_path, 3, JSONL) is None


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 400))
def test_a_torn_working_file_gives_its_whole_rows(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("torn")
    lines = [json.dumps([position, row(position)]).encode() + b"\n" for position in (1, 0, 2)]
    content = b"".join(lines)[:cut]
    (folder / ".part-000000.elsewhere.9-ab.rows").write_bytes(content)
    part = Part(folder, 0, JSONL)
    whole = content.count(b"\n")
    assert sorted(part.done) == sorted((1, 0, 2)[:whole])
    assert [r["id"] for r in part.taken_over.values()] == [1, 0, 2][:whole]
    for position in range(3):
        part.add(position, row(position))
    part.finish()
    assert os.listdir(folder) == ["part-000000.jsonl"]
    assert list(JSONL.read(part.path)) == [row(position) for position in range(3)]


def test_files_of_the_living_stay_and_those_of_the_dead_go(tmp_path, monkeypatch):
    code = f"""
import sys, time
from pathlib import Path
from smolvlm_jax.batch.sinks import open_sink
from smolvlm_jax.batch.parts import Part
part = Part(Path({str(tmp_path)!r}), 0, open_sink("jsonl"))
part.add(0, {row(0)!r})
print("ready", flush=True)
time.sleep(1000)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "ready\n"
    first = Part(tmp_path, 0, JSONL)
    assert list(first.done) == [0] and len(hidden(tmp_path)) == 2, "its owner is alive"
    first.close()
    other.kill()
    other.communicate()
    monkeypatch.setattr(journal, "unique_name", lambda: f"{io.HOST}.1-second")
    second = Part(tmp_path, 0, JSONL)
    assert list(second.done) == [0] and hidden(tmp_path) == [f".part-000000.{io.HOST}.1-second.rows"]
    second.finish()
    (tmp_path / f".part-000000.{io.HOST}.7-left.rows").write_text("torn")
    (tmp_path / ".part-000000.elsewhere.7-left.rows").write_text("torn")
    (tmp_path / f".part-000000.jsonl.{io.HOST}.7-left.tmp").write_text("torn")
    (tmp_path / ".part-000001.elsewhere.7-left.rows").write_text("torn")
    clean_up(tmp_path, JSONL)
    assert hidden(tmp_path) == [".part-000001.elsewhere.7-left.rows"], "the part of the last one is not whole"


def test_two_runners_finish_one_part(tmp_path):
    parts = [Part(tmp_path, 0, JSONL) for _ in range(2)]
    for position in range(5):
        parts[0].add(position, row(position))
        parts[1].add(4 - position, row(4 - position))
    parts[0].finish()
    assert len(list(JSONL.read(parts[0].path))) == 5
    parts[1].finish()
    assert os.listdir(tmp_path) == ["part-000000.jsonl"]
    assert [r["id"] for r in JSONL.read(parts[1].path)] == list(range(5))


class Failing(io_module.FileIO):
    """A file whose writes take only a part of what they are given, and at times fail after that, as on a disk that is full."""

    pattern: ClassVar[list[str]] = []

    def write(self, data):
        fate = self.pattern.pop() if self.pattern else "whole"
        if fate == "fails":
            raise OSError(28, "No space left on device")
        return super().write(bytes(data)[: max(1, len(data) // 2)] if fate == "half" else data)


@settings(max_examples=40, deadline=None)
@given(fates=st.lists(st.sampled_from(["whole", "half", "fails"]), max_size=40))
def test_a_row_counts_once_it_is_written(tmp_path_factory, fates):
    """Whatever fails on the way: a position has no row and may be written again, or it has its own."""
    folder = tmp_path_factory.mktemp("failing")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            journal, "open", lambda path, mode, **_: (Failing if mode == "w+b" else open)(path, mode[:2]), raising=False
        )
        patched.setattr(Failing, "pattern", list(fates))
        part = Part(folder, 0, JSONL)
        for position in range(12):
            try:
                part.add(position, row(position, text="x" * (7 * position % 50)))
                assert position in part.done
            except OSError as error:
                assert position not in part.done and str(folder) in str(error)
    other = Part(folder, 0, JSONL)  # as another process takes it over, or as this one goes on
    assert sorted(other.done) == sorted(part.done)
    for one in (part, other):
        for position in range(12):
            one.add(position, row(position, text="x" * (7 * position % 50)))
        one.finish()
        assert list(JSONL.read(one.path)) == [row(position, text="x" * (7 * position % 50)) for position in range(12)]


def test_rows_that_were_changed_in_the_working_file_do_not_count(tmp_path):
    part = Part(tmp_path, 0, JSONL)
    for position in range(4):
        part.add(position, row(position))
    part.close()
    (path,) = tmp_path.iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    cut = {name: value for name, value in row(2).items() if name != "tiles"}
    path.write_bytes(
        lines[0] + b"\0" * len(lines[1]) + b"\n" + json.dumps([2, cut]).encode() + b"\n" + b"[true, {}]\n[9]\n" + lines[3]
    )
    part = Part(tmp_path, 0, JSONL)
    assert sorted(part.done) == [0, 3]
    path = next(tmp_path.iterdir())
    path.write_bytes(b"\n" * path.stat().st_size)
    with pytest.raises(OSError, match=r"changed by another program.*rows"):
        part.finish()
    assert not list(tmp_path.glob("part-*"))


def test_working_files_of_another_job_are_left_alone(tmp_path):
    old = Part(tmp_path, 0, JSONL, "a1")
    old.add(0, row("old"))
    old.close()
    new = Part(tmp_path, 0, JSONL, "b2")
    assert not new.done
    new.add(0, row("new"))
    new.finish()
    assert [r["id"] for r in JSONL.read(new.path)] == ["new"] and not hidden(tmp_path)


# ---- shards


@pytest.mark.parametrize(
    ("index", "count", "environment", "want"),
    [
        (None, None, {}, (0, 1)),
        (None, 1, {}, (0, 1)),
        (2, 4, {"JOB_COMPLETION_INDEX": "1"}, (2, 4)),
        (None, 4, {"JOB_COMPLETION_INDEX": "3"}, (3, 4)),
        (None, None, {"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETION_COUNT": "8"}, (3, 8)),
        (None, None, {"SLURM_PROCID": "5", "SLURM_NTASKS": "6"}, (5, 6)),
    ],
)
def test_shards_from_flags_and_launchers(index, count, environment, want):
    assert shard_of(index, count, environment) == want


@pytest.mark.parametrize(
    ("index", "count", "environment", "words"),
    [
        (None, 4, {}, "--shard-index"),
        (1, None, {}, "--num-shards"),
        (4, 4, {}, "not below"),
        (-1, 4, {}, "not below"),
        (None, None, {"JOB_COMPLETION_INDEX": "3"}, "--num-shards"),
        (None, None, {"SLURM_PROCID": "x"}, "SLURM_PROCID"),
    ],
)
def test_half_an_answer_is_a_mistake(index, count, environment, words):
    with pytest.raises(InputError, match=words):
        shard_of(index, count, environment)


def test_an_initialised_jax_is_asked_last(monkeypatch):
    import jax

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    monkeypatch.setattr(jax, "process_count", lambda: 5)
    assert shard_of(None, None, {}) == (3, 5)
    assert shard_of(None, None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) == (1, 2)


def test_a_shard_has_a_size():
    with pytest.raises(InputError, match="shard_size"):
        Shard(0, 1, 0)
