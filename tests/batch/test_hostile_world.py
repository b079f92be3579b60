"""Jobs, each a process of its own, from which the world takes things away. In the end every record has its one true row: that
of a job that nobody disturbed."""

import json
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import batch_corpus as corpus
import pytest

from smolvlm_jax.batch.manifest import MANIFEST

pytestmark = pytest.mark.thorough

RECORDS = 48
FLAGS = (
    "--model",
    "tiny",
    "--workers",
    "1",
    "--slots",
    "4",
    "--ring-lengths",
    "64",
    "--max-error-rate",
    "0.2",
)
SIZE = ("--shard-size", "16")
COMMAND = "import sys; from smolvlm_jax.cli import main; sys.exit(main(sys.argv[1:]))"


def run(source: Path, out: Path, *flags: str, patch: str = "", **options) -> subprocess.CompletedProcess:
    """A job to its end. patch: code that its process runs first."""
    command = [sys.executable, "-c", patch + "\n" + COMMAND, "batch", str(source), str(out), *FLAGS]
    command += flags if "--shard-size" in flags else (*SIZE, *flags)
    options = {"env": corpus.environment(), "capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run(command, **options)


def rows(out: Path) -> list[dict]:
    return [{**row, "seconds": None} for row in corpus.rows_of(out)]


def one_line(done, *words: str) -> None:
    """Ended for a reason that it gives in one line, with the exit code after which the command may be run again."""
    text = done.stderr.strip()
    assert done.returncode == 1 and text.startswith("smolvlm-jax: ") and "\n" not in text, text
    assert all(word in text for word in words), text


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, list[dict]]:
    """(the records, the rows of an undisturbed job)."""
    folder = tmp_path_factory.mktemp("world")
    source = folder / "records.jsonl"

    def line(n: int) -> str:
        if n % 12 == 5:
            return '{"id": 5, "prompt": ' if n % 24 == 5 else json.dumps({"id": n, "prompt": "?", "temperature": 1e-60})
        own = {"do_sample": True, "temperature": 2.0} if n % 4 == 1 else {}
        return json.dumps({"id": n, "prompt": f"{n} and 7: which number is larger?", "max_new_tokens": 12, **own})

    source.write_text("".join(line(n) + "\n" for n in range(RECORDS)))
    done = run(source, folder / "undisturbed")
    assert done.returncode == 0, done.stderr
    found = rows(folder / "undisturbed")
    assert len(found) == RECORDS and sum(row["error"] is not None for row in found) == 4
    return source, found


def test_force_beside_a_running_job(world, tmp_path):
    """The first job is halted in the middle, and goes on while the second one works in the directory that was its own."""
    source, truth = world
    out = tmp_path / "out"
    first = corpus.start(source, out, *FLAGS, *SIZE, "--quiet", "--seed", "1", "--ignore-eos")
    assert corpus.kill_after(first, out, 3, signal.SIGSTOP)
    old = (out / MANIFEST).read_bytes()
    second = corpus.start(source, out, *FLAGS, *SIZE, "--force")
    deadline = time.monotonic() + 60
    while not (out / "_replaced-1" / MANIFEST).exists():
        assert time.monotonic() < deadline and second.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 1 and said.count("\n") == 1 and "was replaced while this job ran" in said, said
    assert "sampling.seed was 1, is 0" in said or "sampling." in said
    _, said = second.communicate(timeout=60)
    assert second.returncode == 0 and "_replaced-1" in said, said
    assert rows(out) == truth
    assert (out / "_replaced-1" / MANIFEST).read_bytes() == old
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def limit_files(size: int):
    """A full disk: the system refuses to let a file of the process grow beyond so many bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# The size that a file may have, the format of the output, and the file that is too large for it.
FULL = [(300, "jsonl", MANIFEST), (2000, "jsonl", ".rows"), (2000, "parquet", ".parquet")]


@pytest.mark.parametrize(("size", "format", "place"), FULL)
def test_disk_full(world, tmp_path, size, format, place):
    source, truth = world
    out = tmp_path / "out"
    flags = ("--format", format, "--shard-size", "16" if format == "jsonl" else "8", "--quiet")
    if format == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'smolvlm-jax[parquet]'")
    one_line(run(source, out, *flags, preexec_fn=limit_files(size)), "File too large", place)
    kept = corpus.finished_rows(out)
    assert (kept > 0) == (place != MANIFEST)
    done = run(source, out, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and corpus.summary_of(out)["new_records"] == RECORDS - kept
    if format == "jsonl":
        assert rows(out) == truth
    else:
        import pyarrow.parquet

        found = pyarrow.parquet.read_table(out).to_pylist()
        assert [{**row, "seconds": None} for row in found] == [
            {**row, "id": str(row["id"]), "other_columns": None} for row in truth
        ]
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_disk_full_at_the_summary(world, tmp_path):
    source, truth = world
    out = tmp_path / "out"
    assert run(source, out).returncode == 0
    (summary,) = out.glob("_summary-*")
    summary.unlink()
    one_line(run(source, out, "--quiet", preexec_fn=limit_files(300)), "File too large", summary.name)
    assert not summary.exists() and rows(out) == truth
    assert run(source, out).returncode == 0 and summary.exists() and rows(out) == truth


# Python imports this in every process that finds it: workers of a job are killed before they have started, the first so many.
KILLED = """
import os, sys
if any("batch.workers" in argument for argument in sys.orig_argv):
    with open({log!r}, "a+") as file:
        file.write("x")
        file.flush()
        if file.tell() <= {count}:
            os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("count", "ends"), [(2, False), (10**6, True)])
def test_workers_killed_while_they_start(world, tmp_path, count, ends):
    source, truth = world
    out, log = tmp_path / "out", tmp_path / "log"
    environment = corpus.environment(tmp_path / "plugins")
    (tmp_path / "plugins" / "sitecustomize.py").write_text(KILLED.format(log=str(log), count=count))
    done = run(source, out, "--quiet", env=environment)
    if ends:
        one_line(done, "worker", "3 times in a row", "signal 9")
        assert len(log.read_text()) == 3
        done = run(source, out)
    assert done.returncode == 0 and rows(out) == truth, done.stderr


# As if the permission were gone: a test may run as somebody who has all of them.
DENIED = """
import builtins, io, os
def denied(real):
    def guarded(path, *args, **options):
        named = isinstance(path, (str, os.PathLike)) and {place!r} in os.fspath(path)
        if named and ({mode!r} == "any" or set("wax+") & set(str(args))):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, *args, **options)
    return guarded
builtins.open = io.open = denied(io.open)
"""


@pytest.mark.parametrize(
    ("place", "mode", "code"),
    [("records.jsonl", "any", 2), (".part-000001", "w", 1), (".part-", "w", 1), ("_manifest", "w", 2)],
)
def test_without_permission(world, tmp_path, place, mode, code):
    """An input that cannot be opened; an output that cannot be written, from the start and in the middle."""
    source, truth = world
    out = tmp_path / "out"
    done = run(source, out, "--quiet", patch=DENIED.format(place=place, mode=mode))
    text = done.stderr.strip()
    assert done.returncode == code and text.startswith("smolvlm-jax: ") and "\n" not in text, text
    assert "Permission denied" in text and place in text
    assert run(source, out).returncode == 0 and rows(out) == truth


def test_without_a_current_directory(world, tmp_path):
    source, _ = world
    gone = tmp_path / "gone"
    gone.mkdir()
    for arguments in (". out --prompt ?", f"{source} out", f"records.jsonl {tmp_path / 'out'}"):
        command = f"cd {gone} && rmdir {gone} && {sys.executable} -m smolvlm_jax batch --model tiny {arguments}"
        done = subprocess.run(["sh", "-c", command], env=corpus.environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "current directory" in done.stderr, done.stderr
        gone.mkdir()


def test_files_that_are_added_while_the_job_runs(world, tmp_path):
    source, truth = world
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "records.jsonl").write_bytes(source.read_bytes())
    first = corpus.start(folder, out, *FLAGS, *SIZE)
    assert corpus.kill_after(first, out, 3, signal.SIGSTOP)
    (folder / "late.jsonl").write_text('{"prompt": "?"}\n')
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 0 and "added to the input" in said and "late.jsonl" in said, said
    assert corpus.summary_of(out)["added_files"] == ["late.jsonl"] and rows(out) == truth


STREAMS = ["<&- >&- 2>&-", ">/dev/full 2>/dev/full", "2>&-", ">&-", "<&-", "2>/dev/full", ">/dev/full"]


@pytest.mark.parametrize("streams", STREAMS)
def test_standard_streams_that_lead_nowhere(world, tmp_path, streams):
    source, truth = world
    out = tmp_path / "out"
    command = shlex.join([sys.executable, "-m", "smolvlm_jax", "batch", str(source), str(out), *FLAGS, *SIZE])
    done = subprocess.run(["sh", "-c", f"{command} {streams}"], env=corpus.environment(), capture_output=True, timeout=120)
    assert done.returncode == 0 and rows(out) == truth
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


FAILING = """
import jax
from smolvlm_jax.engine.compiled import Programs
get, count = Programs.get, 0
def failing(self, *key):
    global count
    count += key[0] == {kind!r}
    if count > {after}:
        raise jax.errors.JaxRuntimeError({message!r})
    return get(self, *key)
Programs.get = failing
"""
MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes.\nBufferAssignment: …"


@pytest.mark.parametrize(
    ("kind", "after", "message", "words"),
    [
        ("decode", 8, MEMORY, ("the device is out of memory", "--slots", "--ring-lengths")),
        ("prefill", 3, "INTERNAL: the chip is gone", ("INTERNAL: the chip is gone",)),
        ("ring", 0, MEMORY, ("the device is out of memory",)),
    ],
)
def test_the_device_fails_in_the_middle(world, tmp_path, kind, after, message, words):
    source, truth = world
    out = tmp_path / "out"
    one_line(run(source, out, "--quiet", patch=FAILING.format(kind=kind, after=after, message=message)), *words)
    kept = corpus.finished_rows(out)
    assert (kept > 0) == (after > 0)
    done = run(source, out)
    assert done.returncode == 0 and corpus.summary_of(out)["new_records"] == RECORDS - kept
    assert rows(out) == truth
