"""The destination is absent or whole: killed, full disk, two at once, --force."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import convert_helpers as helpers
import pytest

from smolvlm_jax import checkpoint
from smolvlm_jax.checkpoint import load
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.directories import check_free_space, whole_directory
from smolvlm_jax.errors import CheckpointError


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return helpers.make(tmp_path_factory.mktemp("original") / "hf")


def silent(line: str) -> None:
    pass


def test_appears_whole_and_leaves_nothing_beside_it(tmp_path):
    with whole_directory(tmp_path / "deep" / "out") as target:
        (target / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "file").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), CheckpointError("said")])
def test_an_exception_removes_what_was_written(tmp_path, error):
    with pytest.raises(type(error)), whole_directory(tmp_path / "out") as target:
        (target / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_is_untouched_without_force(original, tmp_path):
    out = tmp_path / "out"
    convert(original, out, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(CheckpointError, match="exists: choose another name"):
        convert(original, out, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    convert(original, out, dtype="float16", force=True, quiet=True)
    assert "float16" in (out / "manifest.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out_replaced-1"]
    assert {path.stat().st_mtime_ns for path in (tmp_path / "out_replaced-1").rglob("*")} == set(before.values())


def test_force_keeps_the_weights_that_it_replaces(original, tmp_path):
    """SOURCE and DEST in the wrong order: the weights of PyTorch, which may be the only ones, stay, and it is said where."""
    orbax, only = tmp_path / "orbax", tmp_path / "only"
    convert(original, orbax, dtype="bfloat16", quiet=True)
    shutil.copytree(original, only)
    before = {path.name: path.read_bytes() for path in only.iterdir()}
    for number in (1, 2):
        said = []
        convert(orbax, only, force=True, quiet=True, notify=said.append)
        assert f"the old {only} is kept as {only}_replaced-{number}" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "only_replaced-1").iterdir()} == before
    assert helpers.call("verify", orbax, only, "--quiet") == 0
    checkpoint.save_hf(orbax, *load(only), companions=only, force=True)
    assert (tmp_path / "orbax_replaced-1" / "params").is_dir()


def test_force_does_not_replace_what_is_no_checkpoint(original, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        convert(original, home, force=True, quiet=True)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        convert(original, home / "thesis.txt", force=True, quiet=True)
    assert (home / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    convert(original, tmp_path / "empty", force=True, quiet=True)
    load(tmp_path / "empty")


def test_force_keeps_the_old_one_when_the_new_one_fails(original, tmp_path):
    out = tmp_path / "out"
    convert(original, out, quiet=True)
    with pytest.raises(RuntimeError), whole_directory(out, force=True):
        raise RuntimeError
    load(out)


def test_two_at_once_and_what_a_dead_one_left(tmp_path):
    """A second writer is refused while the first one lives; what a killed one left is removed, with a message."""
    script = (
        "import sys, time; from pathlib import Path; from smolvlm_jax.directories import whole_directory\n"
        "with whole_directory(Path(sys.argv[1])) as target:\n"
        "    (target / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, tmp_path / "out"], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"ready\n"
    with pytest.raises(CheckpointError, match="another process is writing"), whole_directory(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.part" / "half").exists()
    writer.kill()
    writer.wait()
    assert (tmp_path / ".out.part" / "half").exists()
    said = []
    with whole_directory(tmp_path / "out", notify=said.append) as target:
        assert list(target.iterdir()) == []
    assert len(said) == 1
    assert "interrupted run" in said[0]
    assert "starting over" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_between_the_two_renames(original, tmp_path):
    """The only moment at which an existing destination is absent: the next run puts the old one back."""
    out = tmp_path / "out"
    convert(original, out, quiet=True)
    out.rename(tmp_path / ".out.old")
    (tmp_path / ".out.part").mkdir()
    said = []
    with pytest.raises(CheckpointError, match="exists"):
        convert(original, out, quiet=True, notify=said.append)
    assert any("put back" in line for line in said)
    load(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.thorough
@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_killed_at_any_moment(original, tmp_path, to):
    """Kill -9 at random moments of the writing, five for each direction: the destination is absent or whole, every time."""
    source, out = original, tmp_path / "out"
    if to == "hf":
        source = tmp_path / "source"
        convert(original, source, quiet=True)
    # The imports take a second and the writing a tenth of it, so the child prints a line when it starts to write.
    script = (
        "import sys; from smolvlm_jax.convert import conversion, opened\n"
        "really = opened.open_checkpoint\n"
        "def opening(*args, **kwargs):\n"
        "    found = really(*args, **kwargs); print('writing', flush=True); return found\n"
        "conversion.open_checkpoint = opening\n"
        "conversion.convert(sys.argv[1], sys.argv[2], to=sys.argv[3], quiet=True); print('done', flush=True)"
    )
    rng, absent, took = random.Random(f"{to} 2"), 0, None
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", script, source, out, to], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        assert process.stdout.readline() == b"writing\n"
        start = time.monotonic()
        if attempt == 0:  # undisturbed: how long the writing takes
            assert process.stdout.readline() == b"done\n"
            took = time.monotonic() - start
            process.wait()
        else:
            time.sleep(took * rng.random())
            process.send_signal(signal.SIGKILL)
            process.wait()
        if out.exists():
            load(out)
            assert helpers.call("verify", original, out, "--quiet") == 0
            shutil.rmtree(out)
        else:
            absent += 1
    assert absent >= 1, "every attempt finished before it was killed: the test killed nothing"
    convert(source, out, to=to, quiet=True, notify=silent)
    assert helpers.call("verify", original, out, "--quiet") == 0
    assert not (tmp_path / ".out.part").exists()


@pytest.mark.parametrize("kind", ["before", "no space", "quota"])
def test_a_full_disk_is_a_clear_error(original, tmp_path, monkeypatch, kind):
    import smolvlm_jax.convert.to_hf as to_hf

    out = tmp_path / "out"
    if kind == "before":
        usage = shutil._ntuple_diskusage(10**12, 10**12 - 5, 5)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    else:
        number = errno.ENOSPC if kind == "no space" else errno.EDQUOT

        def full(*args):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(to_hf.HFWriter, "_write", staticmethod(full))
    with pytest.raises(CheckpointError, match="the disk is full"):
        convert(original, out, to="hf", quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_disk_that_fills_up(original, tmp_path, to, monkeypatch):
    """On a real file system of 300 KB, if the process may mount one."""
    import smolvlm_jax.convert.conversion as conversion

    monkeypatch.setattr(conversion, "check_room", lambda directory, needed: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system needs privileges that this test run does not have")
    try:
        with pytest.raises(CheckpointError, match="the disk is full"):
            convert(original, disk / "out", to=to, quiet=True)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_free_space_is_asked_of_the_nearest_parent(tmp_path):
    check_free_space(tmp_path / "a" / "b" / "c", 1)
    with pytest.raises(CheckpointError, match=r"needs 1,000,000,000\.00 GB"):
        check_free_space(tmp_path / "a" / "b" / "c", 10**18)


def test_a_directory_that_cannot_be_written(original, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write|not a checkpoint"):
        convert(original, tmp_path / "file" / "out", quiet=True)


@pytest.mark.thorough
@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_sigterm_removes_what_was_written(original, tmp_path, to):
    script = (
        "import sys, time; from smolvlm_jax.convert import leaves\n"
        "read = leaves.TorchLeaf.borrow\n"
        "def borrow(self): print('reading', flush=True); time.sleep(0.2); return read(self)\n"
        "leaves.TorchLeaf.borrow = borrow\n"
        "from smolvlm_jax.cli import main; sys.exit(main(['convert', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", script, original, tmp_path / "out", "--to", to]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    for _ in range(5):
        assert process.stdout.readline() == b"reading\n"
    process.terminate()
    process.terminate()  # the same stop, as `timeout` sends it
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from pathlib import Path
import smolvlm_jax.directories as directories
from smolvlm_jax import checkpoint
really, count = {target}, 0
def killed(*args):
    global count
    count += 1
    if count == {calls}:
        os.kill(os.getpid(), 9)
    return really(*args)
{target} = killed
model, params = checkpoint.load(sys.argv[1])
getattr(checkpoint, sys.argv[2])(sys.argv[3], model, params, companions=sys.argv[1], force=True)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["save", "save_hf"])
@pytest.mark.parametrize(("target", "calls"), [("directories._sync", 1), ("Path.rename", 2)])
def test_saving_is_killed(original, tmp_path, how, target, calls):
    """Before the files are on the disk, and among the renames that replace the old directory: what is there is whole, and the
    next one loses nothing."""
    out = tmp_path / "out"
    shutil.copytree(original, out)
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(target=target, calls=calls), original, how, out],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert helpers.call("verify", original, out, "--quiet") == 0
    model, params = load(original)
    {"save": checkpoint.save, "save_hf": checkpoint.save_hf}[how](out, model, params, companions=original, force=True)
    assert helpers.call("verify", original, out, "--quiet") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", *(f"out_replaced-{n}" for n in range(1, calls + 1))]


REPLACING = """
import os, sys
from pathlib import Path
import smolvlm_jax.directories as directories

def replace(out, stop, exchange):
    calls = 0
    def counted(really):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == stop:
                os.kill(os.getpid(), 9)
            return really(*args)
        return call
    Path.rename = counted(Path.rename)
    directories._exchange = counted(directories._exchange if exchange else lambda one, other: False)
    with directories.whole_directory(out, force=True, notify=lambda line: None) as target:
        (target / "config.json").write_text("new")
    os._exit(0)

for stop in range(1, 20):
    out = Path(sys.argv[1]) / str(stop) / "out"
    out.mkdir(parents=True)
    (out / "config.json").write_text("old")
    child = os.fork()
    if child == 0:
        replace(out, stop, sys.argv[2] == "exchange")
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_killed_at_any_step_of_a_replacement(tmp_path, how):
    """The old one or the new one is there, and the old one is never lost; also where two directories cannot be exchanged."""
    subprocess.run([sys.executable, "-c", REPLACING, tmp_path, how], check=True)
    homes = sorted(tmp_path.iterdir(), key=lambda home: int(home.name))
    assert len(homes) == {"exchange": 4, "renames": 7}[how]
    for home in homes:
        out = home / "out"
        if how == "exchange" or out.exists():
            assert (out / "config.json").read_text() in ("old", "new")
        with whole_directory(out, force=True, notify=silent) as target:
            (target / "config.json").write_text("newest")
        assert (out / "config.json").read_text() == "newest"
        kept = [path for path in home.iterdir() if path != out]
        assert "old" in {(path / "config.json").read_text() for path in kept}
        assert all(path.name.startswith("out_replaced-") for path in kept)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_else_under_the_temporary_name(tmp_path, kind):
    (tmp_path / "elsewhere").mkdir()
    part = tmp_path / ".out.part"
    part.write_text("") if kind == "file" else part.symlink_to("elsewhere")
    said = []
    with (
        pytest.raises(CheckpointError, match=r"\.out\.part is in the way"),
        whole_directory(tmp_path / "out", notify=said.append),
    ):
        pass
    assert not said and os.path.lexists(part)


def test_an_adapter_is_replaced_by_its_own_run(tmp_path):
    """As that of a finished run which is started again."""
    out = tmp_path / "adapter"
    for content in ("old", "new"):
        with whole_directory(out, force=True, own=True) as target:
            (target / "adapter_config.json").write_text(content)
    assert (out / "adapter_config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]
