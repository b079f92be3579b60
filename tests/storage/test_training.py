"""Training with every path in an object store: data, model, output; killed, continued, damaged."""

import base64
import json
import shutil
import signal
import time

import pytest
from convert_helpers import bit_equal, call, weights
from train_helpers import losses, recipe, small_checkpoint, start, write_records

from smolvlm_jax.errors import CheckpointError, ConfigError, InputError, StorageError
from smolvlm_jax.processing.fetch import load_image
from smolvlm_jax.storage import download_tree, upload_tree
from smolvlm_jax.train.mirror import Mirror, mirrored
from smolvlm_jax.train.recipes import load_recipe
from smolvlm_jax.train.records import messages_of, open_records
from smolvlm_jax.train.runner import run

pytestmark = [pytest.mark.network, pytest.mark.filterwarnings("ignore::UserWarning")]
COMMIT = "_CHECKPOINT_METADATA"


def names(path):
    return {entry.name for entry in path.entries()}


def steps(path):
    found = (name.split("/") for name in names(path / "checkpoints"))
    return {parts[0] for parts in found if parts[1] == COMMIT}


def embedded(folder):
    """Records whose pictures stand in the lines."""
    source = write_records(folder, 24)
    text = source.read_text()
    for picture in folder.rglob("*.png"):
        data = base64.b64encode(picture.read_bytes()).decode()
        text = text.replace(json.dumps(str(picture.relative_to(folder))), json.dumps(f"data:image/png;base64,{data}"))
    assert ".png" not in text
    source.write_text(text)
    return source


@pytest.mark.slow
def test_a_run_that_is_killed_and_continued(bucket, front, tmp_path, monkeypatch, capfd):
    model, data = small_checkpoint(tmp_path), embedded(tmp_path / "data")
    upload_tree(model, bucket / "model")
    upload_tree(data.parent, bucket / "data")
    here = recipe(tmp_path, model, data={"train": str(data)})
    whole = run(load_recipe(str(here)), progress=False)

    there = bucket / "run"
    named = recipe(tmp_path, f"{bucket}/model", output=str(there), data={"train": f"{bucket}/data/train.jsonl"})
    (bucket / "recipe.yaml").write_bytes(named.read_bytes())
    running = start(f"{bucket}/recipe.yaml", devices=8, TMPDIR=str(tmp_path))  # as many as this process has
    try:
        while "2" not in steps(there) and running.poll() is None:
            time.sleep(0.02)
        front.delay = 0.15  # so that the next one is caught in the middle
        while not any(name.startswith("checkpoints/4/") for name in names(there)) and running.poll() is None:
            time.sleep(0.02)
    finally:
        running.send_signal(signal.SIGKILL)
        said = running.communicate()
    front.delay = 0.0
    assert running.returncode == -signal.SIGKILL, said
    assert steps(there) == {"2"} and any(name.startswith("checkpoints/4/") for name in names(there))
    assert "model/config.json" not in names(there)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    capfd.readouterr()
    done = run(load_recipe(f"{bucket}/recipe.yaml"), progress=False)
    assert f"the checkpoint {there}/checkpoints/4 is incomplete, since what wrote it was killed" in capfd.readouterr().err
    assert steps(there) == {"4", "6"} and done.model == there / "model" and ".running" not in names(there)
    copy = tmp_path / "copy"
    download_tree(there, copy)
    assert losses(copy) == losses(whole.directory)
    assert bit_equal(weights(copy / "model"), weights(whole.model))
    assert call("convert", there, bucket / "exported") == 0 and call("verify", bucket / "exported", there / "model") == 0

    # a damaged newest step
    broken = next(name for name in names(there) if name.startswith("checkpoints/6/state/d/"))
    content = bytearray((there / broken).read_bytes())
    content[len(content) // 2] ^= 255
    (there / broken).write_bytes(bytes(content))
    capfd.readouterr()
    run(load_recipe(f"{bucket}/recipe.yaml"), progress=False)
    told = capfd.readouterr().err
    assert "the checkpoint of step 6 is damaged" in told and f"it is now {there}/checkpoints/6.damaged" in told
    assert steps(there) == {"4", "6", "6.damaged"}
    download_tree(there, copy)
    assert losses(copy) == losses(whole.directory) and bit_equal(weights(copy / "model"), weights(whole.model))
    shutil.rmtree(copy)


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("training", [False, True])
def test_a_run_that_is_ended_at_once_leaves_no_local_directory(bucket, tmp_path, number, training):
    """While it opens model and data, and by a second signal while it trains."""
    write_records(tmp_path, 24)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    named = recipe(tmp_path, small_checkpoint(tmp_path), output=f"{bucket}/run", steps=2000)
    running = start(named, TMPDIR=str(temporary))
    local = "smolvlm-jax-stage*/run" + "/config.json" * training  # written when signals are collected
    try:
        while not list(temporary.glob(local)) and running.poll() is None:
            time.sleep(0.01)
        for _ in range(1 + training):
            running.send_signal(number)
            time.sleep(0.7)  # what comes sooner is the same stop
    finally:
        said = running.communicate(timeout=60)
    assert running.returncode == 128 + number, said
    assert not list(temporary.iterdir()) and steps(bucket / "run") == set()


def write_step(directory, step):
    folder = directory / "checkpoints" / str(step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "values").write_bytes(b"x" * step)
    (folder / COMMIT).write_text("{}")


@pytest.mark.thorough
def test_the_store_follows_the_directory(bucket, front, capfd):
    there = bucket / "run"
    with mirrored(there) as mirror:
        (mirror.directory / "metrics.jsonl").write_text("1\n")
        (mirror.directory / "checkpoints" / "3.orbax-checkpoint-tmp-0").mkdir(parents=True)
        write_step(mirror.directory, 1)
        write_step(mirror.directory, 2)
        front.forget()
        mirror.send()
        put = [key for method, key in front.log if method in ("PUT", "POST")]
        if front.kind == "s3":  # the other names objects in the bodies of requests
            assert put.index("run/metrics.jsonl") < put.index("run/checkpoints/1/state/values")
            assert put.index("run/checkpoints/1/state/values") < put.index(f"run/checkpoints/1/{COMMIT}")
        front.forget()
        mirror.send()
        assert not {"PUT", "POST", "DELETE"} & front.requests.keys()  # nothing has changed
        shutil.rmtree(mirror.directory / "checkpoints" / "1")
        (mirror.directory / "checkpoints" / "2").rename(mirror.directory / "checkpoints" / "2.damaged")
        write_step(mirror.directory, 2)
        write_step(mirror.directory, 4)
        (mirror.directory / "checkpoints" / "2" / "state" / "values").write_bytes(b"of another run")
    assert steps(there) == {"2", "2.damaged", "4"}
    assert (there / "checkpoints/2/state/values").read_bytes() == b"of another run"
    (there / "checkpoints" / "6" / "state" / "values").write_bytes(b"half of it")
    (there / "model" / "config.json").write_bytes(b"{}")
    capfd.readouterr()
    with mirrored(there) as mirror:
        assert f"{there}/checkpoints/6 is incomplete, since what wrote it was killed: it is removed" in capfd.readouterr().err
        here = {str(path.relative_to(mirror.directory)) for path in mirror.directory.rglob("*") if path.is_file()}
        kept = {f"checkpoints/{step}/{name}" for step in ("2", "4") for name in ("state/values", COMMIT)}
        assert here - {f"checkpoints/2.damaged/{name}" for name in ("state/values", COMMIT)} == {"metrics.jsonl"} | kept
    assert steps(there) == {"2", "2.damaged", "4"} and "model/config.json" in names(there)
    assert not any(name.startswith("checkpoints/6") or name == ".running" for name in names(there))


@pytest.mark.thorough
def test_records_and_their_pictures(bucket, tmp_path):
    data = write_records(tmp_path / "data", 6)
    upload_tree(data.parent, bucket / "data")
    local, stored = open_records(str(data)), open_records(f"{bucket}/data")
    assert len(stored) == len(local) == 6 and len(open_records(f"{bucket}/data/train.jsonl")) == 6
    seen = 0
    for number in range(6):
        pairs = zip(messages_of(local[number]), messages_of(stored[number]), strict=True)
        for mine, theirs in [pair for a, b in pairs for pair in zip(a["content"], b["content"], strict=True)]:
            if mine["type"] == "image":
                assert theirs["path"] == mine["path"].replace(str(data.parent), f"{bucket}/data")
                assert load_image(theirs["path"]).tobytes() == load_image(mine["path"]).tobytes()
                seen += 1
    assert seen


@pytest.mark.thorough
def test_of_two_runs_the_later_one_goes_on(bucket, tmp_path):
    with mirrored(bucket / "run") as later:
        earlier = Mirror(bucket / "run", tmp_path / "run")
        earlier.directory.mkdir()
        with pytest.raises(StorageError, match=rf"^another run is writing {bucket}/run, and this one stops"):
            earlier.send()
        (later.directory / "metrics.jsonl").write_text("{}\n")
    assert names(bucket / "run") == {"metrics.jsonl"}


def test_what_is_not_there_is_one_line(bucket, front, tmp_path, impatient):
    write_records(tmp_path, 3)
    for words, error, message in (
        (
            {"data": {"train": f"{bucket}/no.jsonl"}},
            InputError,
            rf"{bucket}/no.jsonl: no such object, and nothing below it$",
        ),
        ({"model": f"{bucket}/model"}, CheckpointError, rf"{bucket}/model: there is nothing below it in the bucket$"),
        ({"output": f"{front.kind}://nowhere/run"}, CheckpointError, rf"{front.kind}://nowhere/.*: no such [\w ,]*bucket$"),
        ({"output": "az://data/run"}, InputError, "names no bucket"),
    ):
        with pytest.raises(error, match=message):
            run(load_recipe(str(recipe(tmp_path, words.pop("model", "tiny"), **words))), progress=False)
    front.denied.add(bucket.bucket)
    with pytest.raises(CheckpointError, match=rf"{bucket}/run.*: the store denies access with these credentials \(.*\)$"):
        run(load_recipe(str(recipe(tmp_path, "tiny", output=f"{bucket}/run"))), progress=False)


def test_a_job_of_several_processes_needs_a_shared_directory(monkeypatch, tmp_path):
    import jax

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"output s3://data/run is in an object store, where only one process can write"):
        run(load_recipe(str(recipe(tmp_path, "tiny", output="s3://data/run"))), progress=False)
