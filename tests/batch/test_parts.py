"""Parts, manifests and shards: what stands in the output directory, and when."""

import io as io_module
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_jax import io
from smolvlm_jax.batch import parts
from smolvlm_jax.batch.hosts import shard_of
from smolvlm_jax.batch.job import Shard
from smolvlm_jax.batch.manifest import MANIFEST, Manifest, differences, model_digest
from smolvlm_jax.batch.parts import Part, clean_up
from smolvlm_jax.batch.sinks import COLUMNS, open_sink
from smolvlm_jax.errors import InputError, JobError

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
    monkeypatch.setattr(parts, "unique_name", lambda: f"{io.HOST}.1-second")
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
            parts, "open", lambda path, mode, **_: (Failing if mode == "w+b" else open)(path, mode[:2]), raising=False
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


# ---- manifests

FACTS = {"input": {"files": {"a.jsonl": 10}}, "prompt": "What?", "sampling": {"seed": 0, "top_k": 0}, "shard_size": 1000}


def test_a_restart_agrees_and_another_job_is_told_every_difference(tmp_path):
    Manifest(tmp_path, FACTS).agree(False, print)
    Manifest(tmp_path, FACTS).agree(False, print)
    other = {**FACTS, "prompt": "Why?", "sampling": {"seed": 1, "top_k": 0}}
    with pytest.raises(InputError) as caught:
        Manifest(tmp_path, other).agree(False, print)
    words = ("prompt was 'What?', is 'Why?'", "sampling.seed was 0, is 1", "--force")
    assert all(w in str(caught.value) for w in words) and "top_k" not in str(caught.value)
    assert hidden(tmp_path) == []


def test_force_moves_the_other_output_aside_and_loses_nothing(tmp_path):
    Manifest(tmp_path, FACTS).agree(False, print)
    for name in ("part-000000.jsonl", ".part-000001.h.1-a.rows", "_summary-0-of-1.json", "notes.txt"):
        (tmp_path / name).write_text(name)
    said = []
    Manifest(tmp_path, {**FACTS, "prompt": "Why?"}).agree(True, said.append)
    aside = tmp_path / "_replaced-1"
    assert str(aside) in said[0]
    assert sorted(os.listdir(tmp_path)) == [MANIFEST, "_replaced-1", "notes.txt"]
    assert sorted(os.listdir(aside)) == [".part-000001.h.1-a.rows", MANIFEST, "_summary-0-of-1.json", "part-000000.jsonl"]
    assert json.loads((tmp_path / MANIFEST).read_text())["prompt"] == "Why?"
    Manifest(tmp_path, {**FACTS, "prompt": "Why?"}).agree(True, said.append)
    assert len(said) == 1, "the same job again has nothing to move"


def test_parts_without_a_manifest_are_somebody_elses(tmp_path):
    (tmp_path / "part-000000.jsonl").write_text("?")
    with pytest.raises(InputError, match=r"part-000000\.jsonl"):
        Manifest(tmp_path, FACTS).agree(False, print)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"7", b'"x"', b'{"a":', b"\xff\xfe", b"\0" * 300, b"[" * 10**5]
)
def test_a_worthless_manifest_is_replaced_unless_there_are_rows(tmp_path, content):
    job, said = Manifest(tmp_path, FACTS), []
    job.path.write_bytes(content)
    job.agree(False, said.append)
    assert json.loads(job.path.read_text())["prompt"] == "What?" and len(said) == 1
    assert (tmp_path / "_replaced-1" / MANIFEST).read_bytes() == content
    job.path.write_bytes(content)
    (tmp_path / "part-000000.jsonl").write_text("?")
    with pytest.raises(InputError, match=r"empty or damaged.*--force"):
        job.agree(False, said.append)
    job.agree(True, said.append)
    assert (tmp_path / "_replaced-2" / "part-000000.jsonl").exists() and not list(tmp_path.glob("part-*"))


@pytest.mark.parametrize(
    "content", ['{"format": 1}', '{"format": {"a": 1}, "input": 3}', '{"format": 99, "more": [1, {"a": null}]}']
)
def test_a_manifest_of_another_kind_is_another_job(tmp_path, content):
    job = Manifest(tmp_path, FACTS)
    job.path.write_text(content)
    with pytest.raises(InputError, match="prompt was None, is 'What\\?'") as caught:
        job.agree(False, print)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_leads_nowhere_is_named(tmp_path):
    job = Manifest(tmp_path, FACTS)
    job.path.symlink_to("nowhere.json")
    with pytest.raises(InputError, match="link to a file that does not exist"):
        job.agree(True, print)
    with pytest.raises(InputError, match="cannot be one"):
        (tmp_path / "file").write_text("")
        Manifest(tmp_path / "file" / "out", FACTS).agree(False, print)


@pytest.mark.parametrize("killed_after", range(4))
def test_a_killed_force_loses_nothing_and_locks_nobody_out(tmp_path, monkeypatch, killed_after):
    """Killed after so many files were moved: the next one with --force brings the rest to them, at once."""
    old = Manifest(tmp_path, {**FACTS, "prompt": "Old?"})
    old.agree(False, print)
    names = ["part-000000.jsonl", "part-000001.jsonl", "part-000002.jsonl"]
    for name in names:
        (tmp_path / name).write_text(name)
    moved, rename = [], Path.rename

    def dies(path, target):
        if len(moved) == killed_after:
            raise KeyboardInterrupt
        moved.append(rename(path, target))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", dies)
        Manifest(tmp_path, FACTS).agree(True, print)
    old.agree(False, print)
    Manifest(tmp_path, FACTS).agree(True, print)
    assert sorted(path.name for path in (tmp_path / "_replaced-1").iterdir()) == [MANIFEST, *names]
    assert sorted(os.listdir(tmp_path)) == [MANIFEST, "_replaced-1"]


def test_a_job_notices_that_its_directory_belongs_to_another_one(tmp_path):
    mine, other = Manifest(tmp_path, FACTS), Manifest(tmp_path, {**FACTS, "prompt": "Why?"})
    mine.agree(False, print)
    with mine.held():
        mine.check()
    other.agree(True, print)
    for step in (mine.check, mine.held().__enter__):
        with pytest.raises(JobError, match=r"replaced while this job ran \(prompt was 'What\?', is 'Why\?'\)"):
            step()
    mine.path.write_text("{")
    with pytest.raises(JobError, match="gone or empty"):
        mine.check()
    mine.path.unlink()
    with pytest.raises(JobError, match="gone or empty"):
        mine.check()
    mine.agree(False, print)
    mine.check()


def test_rows_stay_with_the_manifest_that_they_were_made_under(tmp_path):
    """Whoever puts another manifest beside them, they are not taken for that job's."""
    mine, other = Manifest(tmp_path / "mine", FACTS), Manifest(tmp_path / "other", {**FACTS, "prompt": "Why?"})
    for job in (mine, other):
        job.agree(False, print)
        with job.held():
            (job.path.parent / "part-000000.jsonl").write_text(job.facts["prompt"])
        job.agree(False, print)
    mine.path.write_bytes(other.path.read_bytes())
    moved = Manifest(tmp_path / "mine", {**FACTS, "prompt": "Why?"})
    with pytest.raises(InputError, match="rows of another manifest"):
        moved.agree(False, print)
    moved.agree(True, print)
    assert not list((tmp_path / "mine").glob("part-*"))
    assert (tmp_path / "mine" / "_replaced-1" / "part-000000.jsonl").read_text() == "What?"
    moved.agree(False, print)


def test_nobody_replaces_a_manifest_that_is_held(tmp_path):
    mine, other = Manifest(tmp_path, FACTS), Manifest(tmp_path, {**FACTS, "prompt": "Why?"})
    mine.agree(False, print)
    thread = threading.Thread(target=other.agree, args=(True, lambda line: None))
    with mine.held():
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive() and json.loads(mine.path.read_text())["prompt"] == "What?"
    thread.join(timeout=10)
    assert json.loads(mine.path.read_text())["prompt"] == "Why?"


def test_racing_starts_agree(tmp_path):
    """Eight processes with --force and one set of facts over another job's output: one moves it, all go on."""
    Manifest(tmp_path, {**FACTS, "prompt": "Old?"}).agree(False, print)
    (tmp_path / "part-000000.jsonl").write_text("old")
    code = f"""
import sys, time
from pathlib import Path
from smolvlm_jax.batch.manifest import Manifest
sys.stdin.read()
Manifest(Path({str(tmp_path)!r}), {FACTS!r}).agree(True, print)
"""
    start = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(8)]
    said = [process.communicate()[0] for process in start]
    assert [process.returncode for process in start] == [0] * 8
    assert sum(b"moved" in out for out in said) == 1
    assert sorted(os.listdir(tmp_path)) == [MANIFEST, "_replaced-1"]
    assert json.loads((tmp_path / MANIFEST).read_text())["prompt"] == "What?"


def test_differences_name_keys_on_either_side():
    assert differences({"a": 1, "b": {"c": 1}}, {"b": {"c": 2, "d": 3}}) == [
        "a was 1, is None",
        "b.c was 1, is 2",
        "b.d was None, is 3",
    ]
    assert differences({"a": [1, float("nan")]}, {"a": (1, float("nan"))}) == []


def test_the_models_digest_sees_every_file(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(5 * 2**20))
    digests = {model_digest(tmp_path)}
    for small in (2**30, 2**20):  # as a small file, then as a large one
        monkeypatch.setattr("smolvlm_jax.batch.manifest._SMALL", small)
        digests = {model_digest(tmp_path)}
        for name, place in (("config.json", 0), ("model.safetensors", 5), ("model.safetensors", 5 * 2**20 - 3)):
            with open(tmp_path / name, "r+b") as file:
                file.seek(place)
                byte = file.read(1)
                file.seek(place)
                file.write(bytes([byte[0] ^ 1]))
            digests.add(model_digest(tmp_path))
        assert len(digests) == 4
    (tmp_path / "model.safetensors").rename(tmp_path / "m.safetensors")
    assert model_digest(tmp_path) not in digests


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
