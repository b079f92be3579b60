"""The small files of checkpoints, changed at random: an error of ours that names the file, or what they said before."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiers import fast_first

from smolvlm_jax.convert.adapters import open_adapter
from smolvlm_jax.convert.arrays import checksum, mismatches
from smolvlm_jax.convert.file_sums import damaged_files, write_sums
from smolvlm_jax.convert.from_orbax import find_checkpoint, open_orbax
from smolvlm_jax.convert.manifest import read_manifest, stored_digests, write_manifest
from smolvlm_jax.convert.safetensors_file import read_header
from smolvlm_jax.convert.tensors import open_tensors
from smolvlm_jax.errors import SmolVLMError

ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**70,
    1.5,
    float("nan"),
    1e308,
    "",
    "\n",
    "a\0b",
    "../x",
    "é" * 2000,
    [],
    {},
    [[]],
    "0",
]


def places(value, path=()):
    """The paths of everything inside a JSON value."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def at(value, path):
    """The value at a path."""
    for key in path:
        value = value[key]
    return value


def changed(value, rng: random.Random):
    """A value inside replaced, removed, renamed or given twice."""
    value = copy.deepcopy(value)
    *path, last = rng.choice([place for place in places(value) if place])
    holder = at(value, path)
    kind = rng.randrange(4)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice([odd for odd in ODD if isinstance(odd, str)])] = holder.pop(last)
    elif kind == 2:
        holder[last] = copy.deepcopy(at(value, rng.choice(list(places(value)))))
    else:
        holder[last] = rng.choice(ODD)
    return value


def garbled(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return rng.choice(
        [
            data[:at],
            data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            data[:at] + data[at - 40 :],
            data[at:],
            b"[" * 200_000,
        ]
    )


class HF:
    """Shards with an index: what their tensors are and hold."""

    def __init__(self, folder: Path):
        self.directory = folder / "hf"
        self.directory.mkdir()
        self.tensors = {
            f"layer.{n}.weight": np.random.default_rng(n).normal(size=(n + 1, 3)).astype(np.float32) for n in range(6)
        }
        files = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(self.tensors)}
        for file in set(files.values()):
            save_file({name: self.tensors[name] for name in files if files[name] == file}, self.directory / file)
        (self.directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))

    def read(self):
        reader = open_tensors(self.directory)
        try:
            return {name: reader.read(name).tolist() for name in sorted(reader.shapes)}
        finally:
            reader.close()


class Header(HF):
    def load(self):
        self.path = self.directory / "model-0.safetensors"
        data = self.path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        self.rest = data[8 + length :]
        return json.loads(data[8 : 8 + length])

    def store(self, data: bytes):
        self.path.write_bytes(len(data).to_bytes(8, "little") + data + self.rest)
        if read_header(self.path) is None:
            raise AssertionError


class Plain:
    def load(self):
        return json.loads(self.path.read_text())

    def store(self, data: bytes):
        self.path.write_bytes(data)


class Index(Plain, HF):
    @property
    def path(self) -> Path:
        return self.directory / "model.safetensors.index.json"


class AdapterConfig(Plain):
    def __init__(self, folder: Path):
        save_file({"a.lora_A.weight": np.ones((2, 2), np.float32)}, folder / "adapter_model.safetensors")
        self.path = folder / "adapter_config.json"
        settings = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "rank_pattern": {"a": 2},
            "alpha_pattern": {},
            "use_dora": False,
        }
        self.path.write_text(
            json.dumps(settings | {"base_model_name_or_path": "x/y", "target_modules": ["a"], "revision": None})
        )

    def read(self):
        adapter = open_adapter(self.path.parent)
        adapter.reader.close()
        return True  # what it says is the user's to say


class Orbax(Plain):
    """An orbax directory of a few arrays."""

    name = "params/_METADATA"

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        arrays = {"layer": {name: np.arange(6, dtype=np.float32).reshape(2, 3) for name in "abc"}}
        self.directory, self.path = folder / "orbax", folder / "orbax" / self.name
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.directory / "params", {"model": arrays})
        digests = {f"model/layer/{name}": checksum(array) for name, array in arrays["layer"].items()}
        write_manifest(self.directory, source=None, layout="full", dtype="float32", files={}, arrays=digests)

    def read(self):
        leaves = open_orbax(find_checkpoint(self.directory))
        digests = stored_digests(self.directory / "manifest.json", read_manifest(self.directory))
        # whether it has all of them is compared with the config later
        return mismatches({path: leaves[path] for path in leaves if path in digests}, digests, lambda count: None)


class Manifest(Orbax):
    name = "manifest.json"

    def read(self):
        stored_digests(self.path, read_manifest(self.directory))
        return True


@pytest.mark.parametrize("kind", [Header, Index, AdapterConfig, Orbax, Manifest])
@pytest.mark.parametrize("seed", fast_first(1, range(10)))
def test_only_errors_of_ours(tmp_path, kind, seed):
    case, rng = kind(tmp_path), random.Random(seed)
    good, wanted = case.load(), case.read()
    refused = 0
    for number in range(150):
        data = json.dumps(good).encode()
        data = garbled(data, rng) if number % 3 == 0 else json.dumps(changed(good, rng)).encode()
        try:
            case.store(data)
            found = case.read()
            assert found == wanted or kind is Header, data[:500]  # names and shapes are compared with the config later
        except SmolVLMError as error:
            refused += 1
            assert str(tmp_path) in str(error) or "tensor" in str(error), error
            assert len(str(error)) < 20_000, "bounded"
    assert refused > 20


def test_a_list_of_checksums_is_never_an_exception(tmp_path):
    (tmp_path / "state").mkdir()
    for name in "ab":
        (tmp_path / "state" / name).write_text(name)
    write_sums(tmp_path, step=5)
    assert damaged_files(tmp_path) == []
    good, rng = json.loads((tmp_path / "checksums.json").read_text()), random.Random(0)
    for number in range(200):
        data = json.dumps(changed(good, rng)).encode()
        (tmp_path / "checksums.json").write_bytes(garbled(data, rng) if number % 3 == 0 else data)
        assert isinstance(damaged_files(tmp_path), list)
