"""Steps of a run: whole ones carry checksums, damaged ones are set aside, and one run at a time has the directory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiers import fast_first

from smolvlm_jax.checkpoint import load
from smolvlm_jax.convert.file_sums import NAME, damaged_files
from smolvlm_jax.errors import CheckpointError, StorageError
from smolvlm_jax.train.checkpoints import Checkpoints
from smolvlm_jax.train.claim import only_run
from smolvlm_jax.train.metrics import Log, read_metrics
from smolvlm_jax.train.pipeline import check_position
from smolvlm_jax.train.progress import Display
from smolvlm_jax.train.state import TrainState


def state(step: int) -> TrainState:
    return TrainState(jnp.int32(step), {"a": jnp.arange(5000.0) + step}, (jnp.ones(7),), jnp.int32(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Steps 5, 10 and 15, the second of them the best."""
    directory = tmp_path_factory.mktemp("run")
    with Checkpoints(directory, keep=3) as checkpoints:
        for step in (5, 10, 15):
            checkpoints.save(step, state(step), [{"samples": step}], {"exact_match": float(step == 10)})
    return directory


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def restored(directory: Path) -> int | None:
    """The step that a run goes on from; its state is whole."""
    with Checkpoints(directory, keep=3) as checkpoints:
        found = checkpoints.restore(state(0))
        if found is None:
            return None
        step = int(found[0].step)
        assert np.array_equal(found[0].params["a"], np.arange(5000.0) + step) and found[1] == [{"samples": step}]
        return step


def files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_whole_run_goes_on_from_its_newest_step_in_silence(run, capsys):
    assert restored(run) == 15 and capsys.readouterr().err == ""
    assert all(damaged_files(run / "checkpoints" / str(step)) == [] for step in (5, 10, 15))
    assert restored(run.with_name("empty")) is None


@pytest.mark.parametrize("damage", fast_first(1, ["flip", "truncate", "delete"]))
def test_a_damaged_file_of_the_newest_step_is_named_and_the_one_before_is_taken(run, damage, capsys):
    names = [path.relative_to(run / "checkpoints" / "15") for path in files(run / "checkpoints" / "15") if path.stat().st_size]
    names = [name for name in names if name.parent != Path(".")]  # orbax's own notes follow
    assert len(names) >= 8
    for name in names:
        copy = Path(shutil.copytree(run, run.with_name("copy")))
        path = copy / "checkpoints" / "15" / name
        {"flip": flip, "truncate": lambda p: os.truncate(p, p.stat().st_size // 2), "delete": Path.unlink}[damage](path)
        assert restored(copy) == 10, name
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "step 15 is damaged" in err and str(name) in err and "whole one is of step 10" in err
        assert (copy / "checkpoints" / "15.damaged").is_dir()
        if name == names[0]:
            with Checkpoints(copy, keep=3) as checkpoints:
                checkpoints.save(15, state(15), [{"samples": 15}])
            assert restored(copy) == 15, "the step can be written again"
        shutil.rmtree(copy)


def test_a_step_that_was_never_completed_is_none(run, capsys):
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        for damage in (Path.unlink, lambda path: path.write_text("")):
            copy = Path(shutil.copytree(run, run.with_name("copy")))
            damage(copy / "checkpoints" / "15" / name)
            step, err = restored(copy), capsys.readouterr().err
            assert (step, err.count("\n")) in ((15, 0), (10, 1)), (name, err)
            shutil.rmtree(copy)
    (run / "checkpoints" / "99").mkdir()
    assert restored(run) == 15 and "step 99 is damaged" in capsys.readouterr().err


# What a step's directory may become -> words of the reason that is given.
def rename(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "15")
    (checkpoints / "5").rename(checkpoints / "15")


def without_sums(change, missing_ok: bool = False):
    """A change that no checksum tells."""

    def changed(checkpoints: Path) -> None:
        for step in checkpoints.iterdir():
            (step / NAME).unlink(missing_ok)
        change(checkpoints)

    return changed


def write(name: str, text: str):
    return lambda checkpoints: (checkpoints / "15" / name).write_text(text)


def put_file(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "15")
    (checkpoints / "15").write_text("a file")


def put_link(checkpoints: Path, target: str) -> None:
    shutil.rmtree(checkpoints / "15")
    (checkpoints / "15").symlink_to(target)


MALFORMED = {
    "renamed": (rename, "it was written as step 5"),
    "renamed, no checksums": (without_sums(rename), "it is the state of step 5"),
    "a link to another step": (lambda c: put_link(c, "5"), "it was written as step 5"),
    "a link to nothing": (lambda c: put_link(c, "nowhere"), "it is no directory"),
    "a file": (put_file, "it is no directory"),
    "named with zeros": (lambda c: (c / "15").rename(c / "015"), "no step has this name"),
    "named beyond all steps": (lambda c: (c / "15").rename(c / "99999999999999999999"), "no step has this name"),
    "no files in the list": (write(NAME, '{"files": {}}'), "lists no files"),
    "a list that is none": (write(NAME, "[]"), "is not a list of checksums"),
    "a time that is none": (write("_CHECKPOINT_METADATA", '{"commit_timestamp_nsecs": "x"}'), "never completed"),
    "a time beyond time": (write("_CHECKPOINT_METADATA", '{"commit_timestamp_nsecs": 1e300}'), "never completed"),
    "no positions": (without_sums(write("data/metadata", '{"positions": []}')), "it has no data position"),
    "no metadata": (without_sums(write("data/metadata", "{}")), "it has no data position"),
    "empty metadata": (without_sums(write("data/metadata", "")), "data/metadata is not valid JSON"),
    "a position that is none": (without_sums(write("data/metadata", '{"positions": [{"samples": -3}]}')), "samples"),
    "empty metrics": (without_sums(write("metrics/metrics", "")), "metrics/metrics is not valid JSON"),
}


@pytest.mark.parametrize("name", fast_first(5, MALFORMED))
def test_a_malformed_step_gives_way_to_the_one_before_it(run, name, capsys):
    change, why = MALFORMED[name]
    change(run / "checkpoints")

    def check(position) -> None:
        if position["samples"] < 0:
            raise CheckpointError(f"samples is {position['samples']}")

    with Checkpoints(run, keep=3) as checkpoints:
        found = checkpoints.restore(state(0), check)
        assert found is not None and int(found[0].step) == 10 and found[1] == [{"samples": 10}]
        checkpoints.save(15, state(15), [{"samples": 15}], {"exact_match": 0.5})
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is damaged" in err and why in err and "newest whole one is of step 10" in err, err
    assert restored(run) == 15 and capsys.readouterr().err == ""


def test_the_best_step_is_kept_by_runs_that_go_on(run):
    for step in (20, 25):
        with Checkpoints(run, keep=1) as checkpoints:
            checkpoints.save(step, state(step), [{"samples": step}], {"exact_match": 0.5} if step == 20 else None)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "25"]


def test_metrics_that_are_none_do_not_end_a_run(run):
    for text in ("{}", '{"exact_match": null}', '{"exact_match": "1"}'):
        without_sums(write("metrics/metrics", text), missing_ok=True)(run / "checkpoints")
        with Checkpoints(run, keep=3) as checkpoints:
            checkpoints.save(20, state(20), [{"samples": 20}], {"exact_match": 0.5})
        shutil.rmtree(run / "checkpoints" / "20")
    assert restored(run) == 15


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_directory_of_checkpoints_that_is_none(tmp_path, kind):
    place = tmp_path / "checkpoints"
    place.write_text("") if kind == "file" else place.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"checkpoints is no directory, where the checkpoints of the run belong"):
        Checkpoints(tmp_path, keep=3)


def test_positions_that_are_none():
    good = {"samples": 1, "rows": 0, "seed": 0, "processes": 1, "records": [3], "packing": True, "counts": {"tokens": 9}}
    check_position(good)
    bad = [None, [], {}, *({k: v for k, v in good.items() if k != name} for name in good)]
    bad += [{**good, name: value} for name in good for value in (None, "1", -1, 1.5, 2**70, {"tokens": None})]
    for position in bad:
        with pytest.raises(CheckpointError, match="data position"):
            check_position(position)


def test_an_older_step_that_is_damaged_does_not_stop_a_run(run, capsys):
    (run / "checkpoints" / "10" / "_CHECKPOINT_METADATA").write_text("{")
    assert restored(run) == 15 and "step 10 is damaged" in capsys.readouterr().err


def test_without_a_whole_step_nothing_is_renamed(run):
    for step in (5, 10, 15):
        flip(max(files(run / "checkpoints" / str(step)), key=lambda path: path.stat().st_size))
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match=r"no checkpoint under .* is whole \(step 15: "):
        restored(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before


def test_steps_from_before_there_were_checksums(run, capsys):
    """They are tried; one that cannot be read gives way to the one before it."""
    for step in (5, 10, 15):
        (run / "checkpoints" / str(step) / NAME).unlink()
    assert restored(run) == 15
    next((run / "checkpoints" / "15" / "state").rglob("manifest.ocdbt")).write_bytes(b"rubbish")
    assert restored(run) == 10
    assert "step 15 is damaged" in capsys.readouterr().err and (run / "checkpoints" / "15.damaged").is_dir()


def test_another_model_is_not_taken_for_damage(run):
    other = TrainState(jnp.int32(0), {"b": jnp.ones(3)}, (jnp.ones(7),), jnp.int32(0))
    with Checkpoints(run, keep=3) as checkpoints, pytest.raises(CheckpointError, match=r"step 15 .* another model"):
        checkpoints.restore(other)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "15", "5"]


def test_one_run_at_a_time(tmp_path):
    """Also when the first one is killed, nothing keeps the next one out."""
    code = (
        "import sys, time; from pathlib import Path; from smolvlm_jax.train.claim import only_run\n"
        "with only_run(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"in\n"
    with pytest.raises(StorageError, match="another run is writing"), only_run(tmp_path):
        pass
    other.kill()
    other.wait()
    with only_run(tmp_path):
        pass
    assert json.dumps(os.listdir(tmp_path)) == "[]"


def test_a_killed_run_may_leave_half_a_line_of_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n3\n{"st": 1}\n\xff\n{"step": 2, "lo')
    log = Log(tmp_path, first=1, display=Display(5, False), loggers=(), main=True)
    log.write(2, {"loss": 1.0})
    log.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_metrics_hold_each_step_once_whatever_was_killed(tmp_path):
    """A run that goes on from step 2 drops what was logged of later steps, and lines that an older version doubled."""
    path = tmp_path / "metrics.jsonl"
    old = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "exact_match": 0.5}, {"step": 3, "loss": 9.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    log = Log(tmp_path, first=2, display=Display(5, False), loggers=(), main=True)
    log.write(3, {"loss": float("nan")})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [old[0], {"step": 2, "loss": 2.0, "exact_match": 0.5}, {"step": 3, "loss": "nan"}]
    Log(tmp_path, first=0, display=Display(5, False), loggers=(), main=True).close()
    assert path.read_text() == "", "a run from the beginning"


def test_a_step_is_checked_when_it_is_loaded_as_a_model(tiny_a, tmp_path):
    tiny_a.model.config.save_pretrained(tmp_path)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, TrainState(jnp.int32(1), tiny_a.params, (jnp.ones(7),), jnp.int32(0)), [{}])
    load(tmp_path, check=True)
    flip(tmp_path / "checkpoints" / "1" / "state" / "_sharding")
    with pytest.raises(CheckpointError, match="is damaged: state/_sharding has changed"):
        load(tmp_path, check=True)


def test_a_full_disk_is_one_error_and_the_steps_before_it_stay(tmp_path, capfd):
    """On a real file system of 400 KB, if the process may mount one."""
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", tmp_path], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system needs privileges that this test run does not have")
    try:
        noise = lambda step: jnp.asarray(np.random.default_rng(step).normal(size=20_000))
        with pytest.raises(StorageError, match="the disk is full"), Checkpoints(tmp_path, keep=9) as checkpoints:
            for step in range(1, 9):
                checkpoints.save(step, TrainState(jnp.int32(step), {"a": noise(step)}, (jnp.ones(7),), jnp.int32(0)), [{}])
        steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal())
        assert steps and all(damaged_files(tmp_path / "checkpoints" / str(step)) == [] for step in steps)
        assert "Traceback" not in capfd.readouterr().err
    finally:
        subprocess.run(["umount", tmp_path], check=True)
