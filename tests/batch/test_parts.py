"""Parts, manifests and shards: what stands in the output directory, and when."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_jax import io
from smolvlm_jax.batch import parts
from smolvlm_jax.batch.hosts import shard_of
from smolvlm_jax.batch.job import Shard
from smolvlm_jax.batch.manifest import MANIFEST, agree, differences, model_digest
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
    assert [r["id"] for r in part.taken_over] == [1, 0, 2][:whole]
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
part.flush()
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


# ---- manifests

FACTS = {"input": {"files": {"a.jsonl": 10}}, "prompt": "What?", "sampling": {"seed": 0, "top_k": 0}, "shard_size": 1000}


def test_a_restart_agrees_and_another_job_is_told_every_difference(tmp_path):
    agree(tmp_path, FACTS, False, print)
    agree(tmp_path, FACTS, False, print)
    other = {**FACTS, "prompt": "Why?", "sampling": {"seed": 1, "top_k": 0}}
    with pytest.raises(InputError) as caught:
        agree(tmp_path, other, False, print)
    words = ("prompt was 'What?', is 'Why?'", "sampling.seed was 0, is 1", "--force")
    assert all(w in str(caught.value) for w in words) and "top_k" not in str(caught.value)
    assert hidden(tmp_path) == []


def test_force_moves_the_other_output_aside_and_loses_nothing(tmp_path):
    agree(tmp_path, FACTS, False, print)
    for name in ("part-000000.jsonl", ".part-000001.h.1-a.rows", "_summary-0-of-1.json", "notes.txt"):
        (tmp_path / name).write_text(name)
    said = []
    agree(tmp_path, {**FACTS, "prompt": "Why?"}, True, said.append)
    aside = tmp_path / "_replaced-1"
    assert str(aside) in said[0]
    assert sorted(os.listdir(tmp_path)) == [MANIFEST, "_replaced-1", "notes.txt"]
    assert sorted(os.listdir(aside)) == [".part-000001.h.1-a.rows", MANIFEST, "_summary-0-of-1.json", "part-000000.jsonl"]
    assert json.loads((tmp_path / MANIFEST).read_text())["prompt"] == "Why?"
    agree(tmp_path, {**FACTS, "prompt": "Why?"}, True, said.append)
    assert len(said) == 1, "the same job again has nothing to move"


def test_parts_without_a_manifest_are_somebody_elses(tmp_path):
    (tmp_path / "part-000000.jsonl").write_text("?")
    with pytest.raises(InputError, match=r"part-000000\.jsonl"):
        agree(tmp_path, FACTS, False, print)


def test_racing_starts_agree(tmp_path):
    """Eight processes with --force and one set of facts over another job's output: one moves it, all go on."""
    agree(tmp_path, {**FACTS, "prompt": "Old?"}, False, print)
    (tmp_path / "part-000000.jsonl").write_text("old")
    code = f"""
import sys, time
from pathlib import Path
from smolvlm_jax.batch.manifest import agree
sys.stdin.read()
agree(Path({str(tmp_path)!r}), {FACTS!r}, True, print)
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
