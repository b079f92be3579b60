"""Sources other than a directory of weights: a training run, a Hub id in the local cache, a bundled name."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import convert_helpers as helpers
import jax
import numpy as np
import pytest

from smolvlm_jax import checkpoint
from smolvlm_jax.checkpoint import load, resolve
from smolvlm_jax.cli import main
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.errors import CheckpointError, InputError, MissingExtraError


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return helpers.make(tmp_path_factory.mktemp("original") / "hf")


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def run(original, tmp_path_factory):
    """A training run of three steps, as orbax's CheckpointManager writes it, each step with weights of its own."""
    import optax
    import orbax.checkpoint as ocp

    directory = tmp_path_factory.mktemp("run")
    shutil.copy(original / "config.json", directory)
    shutil.copy(original / "generation_config.json", directory)
    _, params = load(original)
    steps = {}
    with ocp.CheckpointManager(directory / "checkpoints") as manager:
        for step in (2, 10, 9):
            steps[step] = jax.tree.map(lambda x, step=step: x + step, params)
            state = {"params": steps[step], "opt_state": optax.adamw(1e-3).init(steps[step]), "step": np.int32(step)}
            manager.save(step, args=ocp.args.StandardSave(state), force=True)
        manager.wait_until_finished()
    return directory, steps


def test_the_last_step_of_a_training_run(run, tmp_path):
    directory, steps = run
    assert same(load(directory)[1], steps[10])
    assert same(load(directory / "checkpoints" / "9")[1], steps[9])
    convert(directory, tmp_path / "hf", quiet=True)
    assert same(load(tmp_path / "hf")[1], steps[10])
    assert (tmp_path / "hf" / "generation_config.json").exists()
    convert(directory / "checkpoints" / "2", tmp_path / "orbax", to="orbax", quiet=True)
    assert same(load(tmp_path / "orbax")[1], steps[2])
    assert json.loads((tmp_path / "orbax" / "manifest.json").read_text())["step"] == 2


def test_a_step_that_was_never_finished_is_no_step(run, tmp_path):
    directory, steps = run
    copy = tmp_path / "run"
    shutil.copytree(directory, copy)
    (copy / "checkpoints" / "11.orbax-checkpoint-tmp-0").mkdir()
    (copy / "checkpoints" / "12").mkdir()
    assert same(load(copy)[1], steps[10])


def test_an_orbax_checkpoint_of_something_else(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "other" / "params", {"weights": np.zeros(3)})
    with pytest.raises(CheckpointError, match="neither `model` nor `params`"):
        load(tmp_path / "other")


# ---- the Hub


@pytest.fixture
def cache(original, tmp_path) -> tuple[Path, str]:
    """The cache of huggingface_hub after a download: blobs, and a snapshot of links to them."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "home" / "hub" / "models--somebody--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "refs" / "v1").write_text(commit)
    for path in original.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, repository / "blobs" / blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob)
    return tmp_path / "home", commit


def offline(home: Path, *arguments) -> subprocess.CompletedProcess:
    return helpers.shell(*arguments, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "JAX_PLATFORMS": "cpu"})


def test_a_hub_id_is_read_from_the_cache_and_its_commit_is_recorded(cache, original, tmp_path):
    pytest.importorskip("huggingface_hub", reason="needs the hub: pip install 'smolvlm-jax[hub]'")
    home, commit = cache
    done = offline(home, "convert", "somebody/tiny", tmp_path / "out", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["source"], manifest["revision"], manifest["commit"]) == ("somebody/tiny", "v1", commit)
    assert (
        manifest["files"]["model.safetensors"]["sha256"]
        == hashlib.sha256((original / "model.safetensors").read_bytes()).hexdigest()
    )
    assert same(load(tmp_path / "out")[1], load(original)[1])
    snapshot = home / "hub" / "models--somebody--tiny" / "snapshots" / commit
    assert same(load(snapshot)[1], load(original)[1])  # the links of the cache may leave the snapshot


def test_what_is_not_in_the_cache_is_one_line(cache, tmp_path):
    pytest.importorskip("huggingface_hub", reason="needs the hub: pip install 'smolvlm-jax[hub]'")
    home, _ = cache
    for arguments in (("somebody/tiny", "--revision", "v2"), ("somebody/else",)):
        done = offline(home, "convert", arguments[0], tmp_path / "out", *arguments[1:])
        assert done.returncode == 2
        assert done.stderr.startswith("smolvlm-jax: cannot download somebody/")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("offline", "name", "code", "words"),
    [
        (True, "LocalEntryNotFoundError", 2, "HF_HUB_OFFLINE is set; pass a directory that holds it"),
        (False, "LocalEntryNotFoundError", 1, "the Hub cannot be reached (no answer); pass a directory that holds it"),
        (False, "HFValidationError", 2, "no answer"),
    ],
)
def test_a_network_that_fails_is_no_mistake_of_the_user(monkeypatch, offline, name, code, words):
    hub = pytest.importorskip("huggingface_hub", reason="needs the hub: pip install 'smolvlm-jax[hub]'")

    def fails(*args, **options):
        raise getattr(hub.errors, name)("no answer\nfrom the server")

    monkeypatch.setattr(hub, "snapshot_download", fails)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(CheckpointError, match=rf"cannot download somebody/tiny: .*{re.escape(words)}$") as caught:
        checkpoint.resolve("somebody/tiny")
    assert caught.value.exit_code == code


def test_pickles_are_downloaded_only_where_there_is_nothing_else(original, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="needs the hub: pip install 'smolvlm-jax[hub]'")
    asked = []

    def download(name, revision=None, allow_patterns=None):
        asked.append(allow_patterns)
        return str(original if name == "a/safe" else tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert checkpoint.resolve("a/safe") == original
    assert len(asked) == 1
    assert not any("bin" in pattern or pattern.endswith(".py") for pattern in asked[0])
    assert checkpoint.resolve("a/pickle") == tmp_path
    assert len(asked) == 3
    assert "pytorch_model*.bin" in asked[2]


def test_without_the_extra_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'smolvlm-jax\[hub\]'"):
        load("somebody/tiny")


def test_what_is_nothing_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="not a directory"):
        load("no-such-model")
    for name in ("./a/b", str(tmp_path / "absent")):
        with pytest.raises(CheckpointError, match="no such directory"):
            load(name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="neither"):
        load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(tmp_path / "empty" / "config.json")


def test_a_revision_of_what_is_local_is_refused(tmp_path, capsys):
    for words in (("convert", "tiny", tmp_path / "out"), ("verify", "tiny", resolve("tiny"))):
        assert main([*map(str, words), "--revision", "v1"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "revision 'v1'" in err and "only models of the Hub have revisions" in err, err
    with pytest.raises(InputError, match="has no revision 'v1'"):
        load(resolve("tiny"), revision="v1")
    assert not (tmp_path / "out").exists()
