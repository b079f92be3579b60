"""Checkpoints in object stores: converted, verified, loaded, replaced, interrupted."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from convert_helpers import bit_equal, call, weights
from train_helpers import small_checkpoint

import smolvlm_jax
from smolvlm_jax import staging
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.errors import CheckpointError, InputError, MissingExtraError, MissingFileError, StorageError
from smolvlm_jax.parameters import flatten_params
from smolvlm_jax.storage import StorePath, download_tree, upload_tree

pytestmark = [pytest.mark.network, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("small"))


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Where temporary folders are made, in this process and others."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    staging._forget()
    staging._copies.clear()
    yield folder
    staging._forget()
    staging._copies.clear()
    assert not list(folder.glob("smolvlm-jax-stage*"))


def names(path):
    return {entry.name for entry in path.entries()}


def same(a, b):
    a, b = flatten_params(a), flatten_params(b)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


@pytest.mark.thorough
def test_there_and_back(bucket, model, tmp_path, stages, capsys):
    upload_tree(model, bucket / "hf")
    assert call("convert", bucket / "hf", bucket / "a" / "orbax") == 0
    assert names(bucket / "a" / "orbax") >= {"config.json", "manifest.json", "tokenizer.json", "params/_METADATA"}
    assert json.loads((bucket / "a/orbax/manifest.json").read_bytes())["source"] == f"{bucket}/hf"
    assert call("verify", bucket / "a" / "orbax", bucket / "hf", "--json", bucket / "report.json") == 0
    assert json.loads((bucket / "report.json").read_bytes())["same"]
    assert call("convert", bucket / "a" / "orbax", bucket / "back") == 0
    download_tree(bucket / "back", tmp_path / "back")
    assert bit_equal(weights(tmp_path / "back"), weights(model))

    mine, params = smolvlm_jax.load(str(bucket / "a" / "orbax"), check=True)
    assert same(params, smolvlm_jax.load(model)[1]) and same(smolvlm_jax.load(f"{bucket}/hf/model.safetensors")[1], params)
    smolvlm_jax.save(str(bucket / "saved"), mine, params, companions=model)
    smolvlm_jax.save_hf(str(bucket / "saved_hf"), mine, params, companions=smolvlm_jax.resolve(f"{bucket}/hf"))
    assert same(smolvlm_jax.load(str(bucket / "saved"))[1], params) and same(smolvlm_jax.load(f"{bucket}/saved_hf")[1], params)
    processor = smolvlm_jax.SmolVLMProcessor.from_pretrained(f"{bucket}/hf")
    assert processor.tokenizer.vocab_size == smolvlm_jax.SmolVLMProcessor.from_pretrained(model).tokenizer.vocab_size
    assert ".incomplete" not in {name.rpartition("/")[2] for name in names(bucket)}


@pytest.mark.thorough
def test_a_checkpoint_that_changes_is_read_anew(bucket, model, stages, front):
    upload_tree(model, bucket / "hf")
    first = smolvlm_jax.resolve(str(bucket / "hf"))
    front.forget()
    assert smolvlm_jax.resolve(str(bucket / "hf")) == first and front.requests.keys() == {"GET"}  # a listing
    config = json.loads((model / "config.json").read_text())
    (bucket / "hf" / "config.json").write_bytes(json.dumps({**config, "pad_token_id": 7}).encode())
    assert smolvlm_jax.SmolVLMConfig.from_pretrained(str(bucket / "hf")).pad_token_id == 7


@pytest.mark.thorough
def test_a_destination_is_replaced_by_force_alone(bucket, model, stages):
    there = bucket / "made"
    convert(model, str(there), to="hf", max_shard_size="1MB", quiet=True)
    before = names(there)
    with pytest.raises(CheckpointError, match=rf"^{there} exists: choose another name, or replace it with --force"):
        convert(model, str(there), to="hf", quiet=True)
    convert(model, str(there), to="hf", force=True, quiet=True)
    assert names(there) == before - {name for name in before if "safetensors" in name} | {"model.safetensors"}
    assert names(bucket / "made_replaced-1") == before
    with pytest.raises(InputError, match="is or contains the source"):
        convert(str(there), str(bucket), force=True)
    with pytest.raises(InputError, match="is or contains the source"):
        convert(str(there), str(there), force=True)
    (bucket / "diary" / "today.txt").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="is not a checkpoint: it is not replaced, even with --force"):
        convert(model, str(bucket / "diary"), force=True)
    with pytest.raises(InputError, match="is a whole bucket: name a directory in it"):
        convert(model, str(bucket))
    assert (bucket / "diary" / "today.txt").read_bytes() == b"mine"


@pytest.mark.thorough
def test_what_force_replaces_is_kept_and_a_killed_move_goes_on(bucket, model, stages, monkeypatch):
    """The old checkpoint's objects are moved beside it; a run that ends among them loses none, and the next one moves on."""
    there, real, moved = bucket / "made", StorePath.rename, []
    convert(model, str(there), to="hf", quiet=True)
    before = {entry.name: (there / entry.name).read_bytes() for entry in there.entries()}

    def ends(self, target):
        moved.append(self)
        if len(moved) == 4:
            raise OSError(5, "the store fails", str(self))
        return real(self, target)

    monkeypatch.setattr(StorePath, "rename", ends)
    with pytest.raises(StorageError, match="the store fails"):
        convert(model, str(there), quiet=True, force=True)
    with pytest.raises(CheckpointError, match="is incomplete"):
        smolvlm_jax.load(str(there))
    lines: list[str] = []
    convert(model, str(there), quiet=True, force=True, notify=lines.append)
    assert f"the old {there} is kept as {there}_replaced-1" in lines and len(moved) > 4
    kept = bucket / "made_replaced-1"
    assert {entry.name: (kept / entry.name).read_bytes() for entry in kept.entries()} == before
    assert same(smolvlm_jax.load(str(there), check=True)[1], smolvlm_jax.load(str(kept))[1])


@pytest.mark.thorough
def test_what_fails_in_the_middle_leaves_nothing(bucket, model, stages, monkeypatch, impatient):
    there = bucket / "made"
    real = staging.upload_tree

    def half(folder, path):
        (folder / "manifest.json").unlink()
        real(folder, path)
        raise OSError(5, "the store fails", str(path))

    monkeypatch.setattr(staging, "upload_tree", half)
    with pytest.raises(StorageError, match=rf"^cannot write {there}: the store fails$"):
        convert(model, str(there), quiet=True)
    assert names(bucket) == set()
    with pytest.raises(MissingFileError, match="there is nothing below it in the bucket"):
        smolvlm_jax.load(str(there))


@pytest.mark.thorough
def test_a_killed_conversion_is_visible_and_started_over(bucket, model, stages, front):
    there = bucket / "made"
    front.delay = 0.3  # between the third object and the last lies time to be killed, also on a busy machine
    program = [sys.executable, "-m", "smolvlm_jax", "convert", str(model), str(there)]
    running = subprocess.Popen(program, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE)
    while len(names(there)) < 3:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    front.delay = 0.0
    left = names(there)
    assert ".incomplete" in left and "config.json" not in left and list(stages.glob("smolvlm-jax-stage*"))
    with pytest.raises(CheckpointError, match=rf"^{there} is incomplete: it is being written, or what wrote it was killed"):
        smolvlm_jax.load(str(there))
    (there / "params" / "surplus").write_bytes(b"of another kind")
    time.sleep(1.1)  # a folder that young may belong to a process that begins
    lines: list[str] = []
    convert(model, str(there), quiet=True, notify=lines.append)
    assert lines == [f"an interrupted run left an incomplete {there}: it is removed, starting over"]
    assert same(smolvlm_jax.load(str(there), check=True)[1], smolvlm_jax.load(model)[1])
    assert not {".incomplete", "params/surplus"} & names(there)


@pytest.mark.thorough
def test_two_writers(bucket, model, stages, monkeypatch):
    there, real = bucket / "made", staging.upload_tree

    def overtaken(folder, path):
        real(folder, path)
        monkeypatch.setattr(staging, "upload_tree", real)
        convert(model, str(path), quiet=True, notify=lambda line: None)

    monkeypatch.setattr(staging, "upload_tree", overtaken)
    with pytest.raises(StorageError, match=rf"^another process is writing {there}: wait for it, or choose another name"):
        convert(model, str(there), quiet=True)
    assert same(smolvlm_jax.load(str(there), check=True)[1], smolvlm_jax.load(model)[1])


def test_what_is_not_there_or_denied_is_one_line(bucket, front, stages, impatient, monkeypatch):
    load = smolvlm_jax.load
    (bucket / "empty.txt").write_bytes(b"x")
    with pytest.raises(MissingFileError, match=rf"^cannot read {bucket}/nowhere: there is nothing below it in the bucket$"):
        load(str(bucket / "nowhere"))
    with pytest.raises(MissingFileError, match=rf"^cannot read {front.kind}://no-such-bucket/model/: no such [\w ,]*bucket$"):
        load(f"{front.kind}://no-such-bucket/model")
    front.denied.add(bucket.bucket)
    with pytest.raises(
        CheckpointError, match=rf"^cannot read {bucket}/model/: the store denies access with .*[^\n]$"
    ) as denied:
        load(str(bucket / "model"))
    with pytest.raises(CheckpointError, match=rf"^cannot write {bucket}/out: the store denies access with .*[^\n]$"):
        convert("tiny", str(bucket / "out"), quiet=True)
    assert denied.value.exit_code == 2
    with pytest.raises(InputError, match="names no bucket: it is SCHEME://BUCKET/KEY"):
        load("az://data/model")
    with pytest.raises(InputError, match="has no revision 'v2'"):
        load(str(bucket / "model"), revision="v2")


def test_a_missing_extra_is_named(monkeypatch):
    from smolvlm_jax.storage import stores

    for scheme, module, extra in (("s3", "s3fs", "s3"), ("gs", "gcsfs.core", "gcs")):
        monkeypatch.setitem(sys.modules, module, None)
        stores._opened.cache_clear()
        for act in (lambda url: smolvlm_jax.load(url), lambda url: convert("tiny", url)):
            with pytest.raises(MissingExtraError, match=rf"pip install 'smolvlm-jax\[{extra}\]'"):
                act(f"{scheme}://bucket/model")
    stores._opened.cache_clear()
