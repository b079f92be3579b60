"""Manifests: whose rows stand in an output directory, and what becomes of those of another job."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from smolvlm_jax.batch.manifest import MANIFEST, Manifest, differences
from smolvlm_jax.batch.sinks import open_sink
from smolvlm_jax.errors import InputError, JobError

JSONL = open_sink("jsonl")


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


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


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"files": {"a": 5}, "contents": "x"}, {"files": {"a": 5000}, "contents": "y"}, "a has grown from 5 to 5,000 bytes"),
        ({"files": {"a": 5}, "contents": "x"}, {"files": {"b": 5}, "contents": "x"}, "a is called b now"),
        ({"files": {"a": 5}, "contents": "x"}, {"files": {"a": 5, "b": 1}, "contents": "y"}, "b is new"),
        ({"files": {"a": 5, "b": 1}, "contents": "x"}, {"files": {"a": 5}, "contents": "y"}, "b is gone"),
        ({"files": {"a": 5}, "contents": "x"}, {"files": {"a": 5}, "contents": "y"}, "the same sizes and hold something else"),
        ({"count": 3, "bytes": 9}, {"count": 4, "bytes": 9}, "it had 3 files or pages, and has 4"),
    ],
)
def test_a_changed_input_is_told_in_words(old, new, said):
    (found,) = differences({"input": {"source": "s", **old}}, {"input": {"source": "s", **new}})
    assert found.startswith("the input has changed: ") and said in found
    assert differences({"input": old}, {"input": old}) == []
