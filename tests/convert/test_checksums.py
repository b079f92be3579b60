"""A checksum for each array: the same however it is cut, checked by `load` and `verify`, and the damage is named."""

import json
import re
import shutil
from pathlib import Path

import convert_helpers as helpers
import jax
import ml_dtypes
import numpy as np
import pytest

from smolvlm_jax.checkpoint import load, resolve, save
from smolvlm_jax.cli import main
from smolvlm_jax.convert.arrays import Checksum, checksum
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.convert.digest import model_digest
from smolvlm_jax.convert.verify import verify
from smolvlm_jax.errors import CheckpointError


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return helpers.make(tmp_path_factory.mktemp("original") / "hf")


@pytest.fixture(scope="module")
def orbax(original, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "orbax"
    convert(original, directory, quiet=True)
    return directory


def arrays(directory: Path) -> dict[str, str]:
    return json.loads((directory / "manifest.json").read_text())["arrays"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_checksum_is_of_the_values_in_order(dtype):
    values = np.arange(4 * 5 * 6).reshape(4, 5, 6).astype(dtype)
    wanted = checksum(values)
    pieces = Checksum(values.shape, values.dtype)
    for row in values:
        pieces.add(np.ascontiguousarray(row))
    assert pieces.text == wanted == checksum(values.transpose(2, 1, 0).copy().transpose(2, 1, 0)) == checksum(values[...])
    assert checksum(values.astype(np.float64), values.dtype) == wanted
    others = [values.reshape(5, 4, 6), values.transpose(1, 0, 2), values.astype(np.float64), values[::-1]]
    assert wanted not in [checksum(other) for other in others]
    changed = values.copy()
    changed.view(np.uint8)[3, 2, 1] ^= 1
    assert checksum(changed) != wanted


def test_it_does_not_depend_on_chunks_shards_or_writer(original, orbax, tmp_path):
    wanted = arrays(orbax)
    assert len(wanted) == len(helpers.weights(original))
    convert(original, tmp_path / "mesh", mesh={"fsdp": 2, "tensor": 2}, quiet=True)
    convert(orbax, tmp_path / "again", to="orbax", quiet=True)
    mesh = jax.make_mesh((1, 4, 2), ("data", "fsdp", "tensor"))
    model, params = load(original, mesh=mesh)
    save(tmp_path / "saved", model, params)
    for name in ("mesh", "again", "saved"):
        assert arrays(tmp_path / name) == wanted, name
        load(tmp_path / name, check=True)
    convert(original, tmp_path / "narrow", dtype="bfloat16", quiet=True)
    assert not set(arrays(tmp_path / "narrow").values()) & set(wanted.values())
    load(tmp_path / "narrow", mesh=mesh, check=True)


def flip(directory: Path, position: float) -> Path:
    """Flip a bit of the largest file of values."""
    path = max((path for path in (directory / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 4
    path.write_bytes(bytes(data))
    return path


def damage(directory: Path) -> None:
    """Flip a bit that only checksums notice: the store's own format notices one in its indices or in a compressed frame."""
    good = jax.tree.leaves(load(directory)[1])
    for number in range(16):
        position = (number + 0.4) / 16
        path = flip(directory, position)
        try:
            now = jax.tree.leaves(load(directory)[1])
        except CheckpointError:
            now = good
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(good, now, strict=True)):
            return
        assert flip(directory, position) == path, "which puts it back"
    raise AssertionError(f"no bit of {directory} is one of a value")


def test_a_flipped_bit_is_named_with_its_array_and_its_file(original, orbax, tmp_path):
    _, good = load(orbax)
    found = 0
    for number in range(8):
        bad = Path(shutil.copytree(orbax, tmp_path / f"bad{number}"))
        path = flip(bad, (number + 0.5) / 8)
        try:
            _, now = load(bad)
        except CheckpointError:
            continue  # an index of the store, which has checksums of its own
        flat = lambda tree: dict(jax.tree_util.tree_leaves_with_path(tree))
        (name,) = [name for name, array in flat(good).items() if not np.array_equal(array, flat(now)[name], equal_nan=True)]
        parameter = "/".join(key.key for key in name)
        with pytest.raises(CheckpointError, match=f"is damaged: {parameter} is not what manifest.json says") as caught:
            load(bad, check=True)
        assert str(path.relative_to(bad / "params")) in str(caught.value)
        with pytest.raises(CheckpointError, match=parameter):
            convert(bad, tmp_path / "out", quiet=True)
        assert not (tmp_path / "out").exists()
        report = verify(bad, bad, quiet=True)
        assert not report.same and len(report.damage) == 2 and report.damage[0].startswith(f"A: {parameter}")
        found += 1
    assert found >= 4


def test_verify_says_which_of_two_is_damaged(orbax, tmp_path, capsys):
    bad = Path(shutil.copytree(orbax, tmp_path / "bad"))
    damage(bad)
    assert helpers.call("verify", orbax, bad) == 1
    out = capsys.readouterr().out
    assert re.search(r"damaged: B: (model|lm_head)/", out) and "damaged: A" not in out
    assert helpers.call("verify", bad, bad, "--quiet") == 1
    assert helpers.call("verify", orbax, orbax, "--quiet") == 0


def test_an_array_that_only_the_manifest_has_is_missing(orbax, tmp_path):
    bad = Path(shutil.copytree(orbax, tmp_path / "bad"))
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest["arrays"]["model/lost/kernel"] = "crc32:00000000"
    (bad / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"is damaged: model/lost/kernel is missing, which manifest\.json has"):
        load(bad, check=True)


def test_what_has_no_checksums_is_said_to_have_none(original, orbax, tmp_path):
    old = Path(shutil.copytree(orbax, tmp_path / "old"))
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["arrays"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    for source in (old, original):
        with pytest.warns(UserWarning, match="has no checksums of its arrays: nothing was checked"):
            load(source, check=True)
    report = verify(orbax, old, quiet=True)
    assert report.same and report.notes == ["B has no checksums of its arrays"]
    for wrong in ([], {"model": 3}):
        (old / "manifest.json").write_text(json.dumps({**manifest, "arrays": wrong}))
        with pytest.raises(CheckpointError, match="arrays is no mapping"):
            load(old)
    wanted = arrays(orbax)
    lost = wanted.popitem()[0]
    (old / "manifest.json").write_text(json.dumps({**manifest, "arrays": wanted}))
    with pytest.raises(CheckpointError, match=lost):
        load(old, check=True)


@pytest.mark.thorough
@pytest.mark.filterwarnings("default:.*has no checksums")
def test_every_command_that_reads_a_model_can_check_it(tmp_path, capsys):
    """Damage is named before anything is made of it; where there are no checksums a line says so."""
    files = resolve("tiny")
    model, params = load("tiny")
    save(tmp_path / "bad", model, params, companions=files)
    damage(tmp_path / "bad")
    (tmp_path / "a.jsonl").write_text('{"prompt": "Number?", "answer": "1", "max_new_tokens": 1}\n')
    train = ("train", "tiny-numbers", f"output={tmp_path / 'run'}", "weights=checkpoint", f"data.train={tmp_path / 'a.jsonl'}")
    train += ("steps=1", "evaluation=null", "data.length=64", "data.batch_size=1", "data.window_rows=1", "--quiet")
    commands = {
        "generate": lambda model: ("generate", "Number?", "--max-new-tokens", "1", "--model", model),
        "batch": lambda model: ("batch", tmp_path / "a.jsonl", tmp_path / "out", "--workers", "0", "--model", model),
        "train": lambda model: (*train, f"model={model}"),
        "convert": lambda model: ("convert", model, tmp_path / "converted"),
    }
    for name, words in commands.items():
        assert main([*map(str, words(tmp_path / "bad")), "--check"]) == 2, name
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and re.search(r"is damaged: (model|lm_head)/\S+ is not what manifest\.json says", err), (
            name,
            err,
        )
    assert not list(tmp_path.glob("out/part-*")) and not (tmp_path / "run" / "model").exists()
    for name in ("generate", "convert"):
        assert main([*map(str, commands[name](files)), "--check"]) == 0, name
        err = capsys.readouterr().err
        assert "has no checksums of its arrays: nothing was checked" in err and err.startswith("smolvlm-jax: "), (name, err)


def test_the_models_digest_sees_every_file(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(5 * 2**20))
    digests = {model_digest(tmp_path)}
    for small in (2**30, 2**20):  # as a small file, then as a large one
        monkeypatch.setattr("smolvlm_jax.convert.digest._SMALL", small)
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
