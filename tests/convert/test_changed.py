"""A source that changes while it is read: an error, and nothing is written."""

import json
import os
import shutil
from pathlib import Path

import convert_helpers as helpers
import pytest
from tiers import fast_first

from smolvlm_jax.checkpoint import load
from smolvlm_jax.convert import conversion, leaves
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.convert.verify import verify
from smolvlm_jax.errors import ChangedError, CheckpointError


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return helpers.make(tmp_path_factory.mktemp("original") / "hf", shards=2)


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))


def replace(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def replace_keeping_the_time(path: Path) -> None:
    before = path.stat()
    replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "overwritten": overwrite,
    "replaced": replace,
    "replaced, same time": replace_keeping_the_time,
    "longer": lambda path: path.open("ab").write(b" "),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "gone": Path.unlink,
    "touched": os.utime,
}


def disturbed(monkeypatch, path: Path, change) -> None:
    """The change happens when the tenth parameter is read."""
    read, count = leaves.TorchLeaf.borrow, []

    def borrow(self):
        count.append(1)
        if len(count) == 10:
            change(path)
        return read(self)

    monkeypatch.setattr(leaves.TorchLeaf, "borrow", borrow)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("change", fast_first(3, CHANGES))
def test_nothing_is_made_of_a_source_that_changes(original, tmp_path, monkeypatch, name, change):
    source = Path(shutil.copytree(original, tmp_path / "source"))
    disturbed(monkeypatch, source / name, CHANGES[change])
    with pytest.raises(ChangedError, match=f"{name} changed while it was read|became shorter|cannot read"):
        convert(source, tmp_path / "out", to=("orbax", "hf")[len(change) % 2], quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_load_and_verify_notice_it_too(original, tmp_path, monkeypatch):
    source = Path(shutil.copytree(original, tmp_path / "source"))
    for attempt, error in (
        (lambda: load(source), ChangedError),
        (lambda: verify(source, original, quiet=True), ChangedError),
        (lambda: helpers.call("verify", source, original, "--quiet"), CheckpointError),
    ):
        with monkeypatch.context() as patch:
            disturbed(patch, source / "config.json", os.utime)
            with pytest.raises(error, match=r"config\.json changed while it was read") as caught:
                attempt()
        assert caught.value.exit_code == (1 if error is ChangedError else 2), "of verify, 1 says that they differ"


def test_an_orbax_source_and_the_old_destination(original, tmp_path, monkeypatch):
    """Values that change after they were checked; the destination that is there stays as it was."""
    convert(original, tmp_path / "orbax", quiet=True)
    convert(original, tmp_path / "out", to="hf", quiet=True)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    data = max((tmp_path / "orbax" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    write = conversion.write_hf

    def disturb(*args, **options):
        overwrite(data)
        return write(*args, **options)

    monkeypatch.setattr(conversion, "write_hf", disturb)
    with pytest.raises(ChangedError, match="changed while it was read"):
        convert(tmp_path / "orbax", tmp_path / "out", to="hf", force=True, quiet=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["orbax", "out"]


def test_checksums_of_sources_are_of_what_was_read(original, tmp_path):
    convert(original, tmp_path / "out", quiet=True)
    files = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert {name: item["bytes"] for name, item in files.items()} == {
        path.name: path.stat().st_size for path in original.iterdir()
    }
