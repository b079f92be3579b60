"""Damaged and malicious files: a one-line error and exit code 2, and nothing is executed."""

import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import convert_helpers as helpers
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from smolvlm_jax.checkpoint import load
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.convert.safetensors_file import SafetensorsReader, read_header
from smolvlm_jax.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return helpers.make(tmp_path_factory.mktemp("original") / "hf")


@pytest.fixture
def copy(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def refused(source: Path, message: str, error=CheckpointError) -> None:
    """`convert` and `load` refuse it, and no files are left behind."""
    before = sorted(source.parent.iterdir())
    for attempt in (lambda: convert(source, source.parent / "out", quiet=True), lambda: load(source)):
        with pytest.raises(error, match=message):
            attempt()
    assert sorted(source.parent.iterdir()) == before


A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HEADERS = {
    "overlap": ({"a": A, "b": {**A, "data_offsets": [8, 24]}}, 24, "b overlaps the tensor before it"),
    "same place": ({"a": A, "b": A}, 16, "overlaps"),
    "out of range": ({"a": {**A, "data_offsets": [16, 32]}}, 16, "leaves 16 unused bytes"),
    "beyond the end": ({"a": {**A, "shape": [4, 4], "data_offsets": [0, 64]}}, 16, "ends 48 bytes early"),
    "negative": ({"a": {**A, "data_offsets": [-16, 0]}}, 16, "offsets"),
    "reversed": ({"a": {**A, "data_offsets": [16, 0]}}, 16, "-16 bytes"),
    "huge": ({"a": {**A, "data_offsets": [2**63, 2**63 + 16]}}, 16, "offsets"),
    "float": ({"a": {**A, "data_offsets": [0.0, 16.0]}}, 16, "offsets"),
    "hole": ({"a": A, "b": {**A, "data_offsets": [20, 36]}}, 36, "leaves 4 unused bytes"),
    "tail": ({"a": A}, 20, "4 bytes follow"),
    "wrong size": ({"a": {**A, "shape": [2, 3]}}, 16, "needs 24"),
    "negative shape": ({"a": {**A, "shape": [-2, -2]}}, 16, "shape"),
    "overflowing shape": ({"a": {**A, "shape": [2**40, 2**40]}}, 16, "needs"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, 16, "lacks"),
    "integers": ({"a": {**A, "dtype": "I32"}}, 16, "dtype I32"),
    "unknown dtype": ({"a": {**A, "dtype": "F9"}}, 16, "dtype F9"),
    "not an object": ([1, 2], 0, "not an object"),
    "not json": (b"{'a': 1", 0, "header"),
    "not text": (b"\xff\xfe\x00", 0, "header"),
    "nested": (b'{"a":' * 100_000, 0, "header"),
    "a million dimensions": ({"a": {**A, "shape": [2**47] * 500_000}}, 16, "shape"),
    "a dtype that is a list": ({"a": {**A, "dtype": ["F32"] * 9}}, 16, "dtype"),
    "name with a line end": ({"a\nb": A}, 16, "a name that is none"),
    "name without end": ({"a" * 5000: A}, 16, "a name that is none"),
    "name of nothing": ({"": A}, 16, "a name that is none"),
    "two prefixes": ({"module.a": A, "a": {**A, "data_offsets": [16, 32]}}, 32, "occurs twice"),
    "twice": (b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(A).encode() + b"}", 16, "twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_broken_headers(copy, name):
    header, size, message = HEADERS[name]
    helpers.write_safetensors(copy / "model.safetensors", header, bytes(size))
    refused(copy, message)


@pytest.mark.parametrize("length", [2 * 10**9, 2**64 - 1, 100_000_001, 16_000_001])
def test_a_header_of_two_gigabytes_is_not_read(copy, length):
    path = copy / "model.safetensors"
    helpers.write_safetensors(path, b"{}", length=length)
    refused(copy, f"announces a header of {length:,} bytes")
    os.truncate(path, 3 * 10**9)  # as long as it says, and sparse
    refused(copy, "announces a header|broken safetensors header|limit")


def test_empty_and_truncated_files(copy):
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 8, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(copy, "not a safetensors file|damaged")


def test_a_file_that_shrinks_while_it_is_read(copy):
    path = copy / "model.safetensors"
    reader = SafetensorsReader([path])
    os.truncate(path, 2000)
    with pytest.raises(CheckpointError, match="became shorter"):
        for name in reader.shapes:
            reader.read(name)


class Payload:
    """What a hostile pickle does: the marker appears if anybody unpickles it."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write_bin(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_that_execute_code_are_refused_unread(copy, tmp_path, protocol):
    (copy / "model.safetensors").unlink()
    pickled = pickle.dumps({"lm_head.weight": Payload(tmp_path / "executed")}, protocol=protocol)
    write_bin(copy / "pytorch_model.bin", pickled)
    refused(copy, r"would run (posix\.mkdir|a\.name)")
    (copy / "pytorch_model.bin").write_bytes(pickled)  # bare, as torch wrote before 1.6
    refused(copy, "bare pickles are never opened")
    write_bin(copy / "pytorch_model.bin", pickled[:-10])
    refused(copy, "refused")
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickled)
    assert (tmp_path / "executed").exists()  # the payload works, and was not run before


def test_a_pickle_is_refused_by_what_it_names_even_where_torch_would_look_away(copy, tmp_path):
    import torch

    torch.save({"lm_head.weight": torch.nn.Linear(2, 2)}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    refused(copy, r"would run torch\.nn\.modules\.linear\.Linear")


def test_a_pickle_of_something_else(copy):
    import torch

    (copy / "model.safetensors").unlink()
    for content, message in (
        ([torch.zeros(2)], "holds a list"),
        ({"lm_head.weight": 3}, "no tensor"),
        ({"lm_head.weight": torch.zeros(2, dtype=torch.int64)}, "int64"),
    ):
        torch.save(content, copy / "pytorch_model.bin")
        refused(copy, message)


def test_a_pickle_is_read_without_torch(original, copy, monkeypatch):
    import sys

    import torch

    wanted = helpers.weights(copy)
    torch.save({name: torch.from_numpy(array) for name, array in wanted.items()}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    monkeypatch.setitem(sys.modules, "torch", None)
    convert(copy, copy.parent / "out", to="hf", quiet=True)
    assert helpers.bit_equal(helpers.weights(copy.parent / "out"), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_honest_pickles_are_read(tmp_path, dtype, shards):
    source = helpers.make(tmp_path / "hf", dtype=dtype)

    import torch
    from safetensors.torch import load_file

    state = load_file(source / "model.safetensors")
    names = sorted(state)
    (source / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, source / "pytorch_model.bin")
    else:
        halves = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        for file, part in halves.items():
            torch.save({name: state[name] for name in part}, source / file)
        weight_map = {name: file for file, part in halves.items() for name in part}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(source, tmp_path / "orbax", quiet=True)
    convert(tmp_path / "orbax", tmp_path / "back", quiet=True)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype for name in state)


@pytest.mark.parametrize("indexed", (True, False))
def test_one_shard_is_refused_with_the_directory(tmp_path, indexed):
    source = helpers.make(tmp_path / "shards", shards=3)
    if not indexed:
        (source / "model.safetensors.index.json").unlink()
    shards = sorted(source.glob("*.safetensors"))
    listed = ", which model.safetensors.index.json lists" if indexed else ""
    for shard in shards:
        said = f"{shard} is one of the {len(shards)} shards of the weights{listed}: pass the directory {source}"
        refused(shard, f"^{re.escape(said)}$")


def test_a_whole_file_may_be_called_the_only_shard(copy):
    file = (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    assert convert(file, copy.parent / "out", quiet=True).tensors


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_weights_are_warned_about(original, tmp_path, dtype, capsys):
    tensors = {name: value.astype(dtype) for name, value in helpers.weights(original).items()}
    tensors["model.text_model.norm.weight"][[3, 5]] = np.nan
    tensors["lm_head.weight"][7, 7] = -np.inf
    source = tmp_path / "nan"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(original / "config.json", source)
    done = convert(source, tmp_path / "orbax", quiet=True)
    assert done.warnings == (
        "lm_head/kernel has 1 values that are NaN or infinite",
        "model/text_model/norm/scale has 2 values that are NaN or infinite",
    )
    said = capsys.readouterr().err
    assert said.count("warning: ") == 2 and said.count(f"{source} has no tokenizer.json") == 1
    back = convert(tmp_path / "orbax", tmp_path / "back", quiet=True)
    assert "model.text_model.norm.weight has 2 values that are NaN or infinite" in back.warnings
    assert helpers.bit_equal(tensors, helpers.weights(tmp_path / "back"))


def test_values_too_large_for_the_asked_dtype_are_warned_about(original, tmp_path):
    tensors = helpers.weights(original)
    tensors["model.text_model.norm.weight"][0] = 1e6
    source = tmp_path / "large"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(original / "config.json", source)
    assert convert(source, tmp_path / "a", quiet=True).warnings == ()
    assert convert(source, tmp_path / "b", dtype="float16", quiet=True).warnings == (
        "model/text_model/norm/scale has 1 values that are NaN or infinite in float16",
    )


def edit_config(directory: Path, part: str | None, **changes) -> None:
    path = directory / "config.json"
    data = json.loads(path.read_text())
    (data if part is None else data[part]).update(changes)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", dict(hidden_size=64, num_attention_heads=6), "do not fit the config"),
        ("text_config", dict(vocab_size=161), "misshapen lm_head.weight: file has .160, 48., config says .161, 48."),
        ("text_config", dict(num_hidden_layers=3), "have 2 layers, config.json says text_config.num_hidden_layers = 3"),
        ("text_config", dict(num_hidden_layers=10**9), "1000000000"),
        ("text_config", dict(intermediate_size=10**15), "do not fit the config"),
        ("vision_config", dict(num_hidden_layers=1), "have 2 layers"),
        ("vision_config", dict(image_size=4 * 10**6), "have 64 vision positions, config.json says 1000000000000"),
        ("vision_config", dict(patch_size=8, image_size=64), "misshapen"),
        ("text_config", dict(num_attention_heads=4, num_key_value_heads=2), "misshapen"),
    ],
)
def test_a_config_that_contradicts_the_tensors(copy, part, changes, message):
    edit_config(copy, part, **changes)
    refused(copy, message)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", dict(hidden_size=-1), "positive integer"),
        ("text_config", dict(hidden_act="evil"), "hidden_act"),
        (None, dict(model_type="llava"), "not a SmolVLM"),
        (None, dict(dtype="int8"), "dtype"),
    ],
)
def test_a_config_that_describes_nothing(copy, part, changes, message):
    edit_config(copy, part, **changes)
    refused(copy, message, ConfigError)


def test_a_config_that_is_none(copy):
    for text in ("", "[]", "{", '{"a":' * 100_000):
        (copy / "config.json").write_text(text)
        refused(copy, "config.json", ConfigError)
    (copy / "config.json").unlink()
    refused(copy, "cannot open .*config.json")


def test_missing_surplus_and_misshapen_tensors_are_listed_together(copy):
    tensors = helpers.weights(copy)
    tensors["model.text_model.norm.weight"] = np.zeros(7, np.float32)
    tensors["model.text_model.rotary.inv_freq"] = np.zeros(4, np.float32)
    del tensors["lm_head.weight"], tensors["model.vision_model.post_layernorm.bias"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(copy)
    text = str(caught.value)
    assert "3 tensors do not fit the config" in text
    assert "missing   model.vision_model.post_layernorm.bias (32,)" in text
    assert "surplus   model.text_model.rotary.inv_freq (4,)" in text
    assert "misshapen model.text_model.norm.weight: file has (7,), config says (48,)" in text


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_symbolic_links_out_of_the_directory(copy, tmp_path, name):
    secret = tmp_path / "secret"
    secret.mkdir()
    if (copy / name).exists():
        shutil.move(copy / name, secret / name)
    else:
        (secret / name).write_text("{}")
    (copy / name).symlink_to(secret / name)
    refused(copy, "points outside its directory")
    (copy / name).unlink()
    (copy / "sub").mkdir()
    shutil.copy(secret / name, copy / "sub" / name)
    (copy / name).symlink_to(Path("sub") / name)  # inside it is fine
    load(copy)


def test_links_to_nothing_and_directories_in_place_of_files(copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to(copy / "model.safetensors")
    refused(copy, "cannot open|neither")
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").mkdir()
    refused(copy, "not a regular file")


def test_an_index_that_lies(tmp_path):
    source = helpers.make(tmp_path / "hf", shards=3)
    index = source / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def with_map(change) -> None:
        weight_map = dict(good["weight_map"])
        change(weight_map)
        index.write_text(json.dumps({"weight_map": weight_map}))

    first = next(iter(good["weight_map"]))
    with_map(lambda m: m.update({first: "../hf/model-00001-of-00003.safetensors"}))
    refused(source, "names a file outside its directory")
    with_map(lambda m: m.update({first: "model-00009-of-00003.safetensors"}))
    refused(source, "No such file")
    with_map(lambda m: m.update({"model.more": good["weight_map"][first]}))
    refused(source, "missing   model.more")
    with_map(lambda m: m.pop(first))
    refused(source, f"surplus   {first}")
    for text in (
        "{}",
        "[]",
        '{"weight_map": [1]}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "b\\u0000"}}',
        " " * 16_000_001,
    ):
        index.write_text(text)
        refused(source, "index")
    index.write_text(json.dumps(good))
    shutil.copy(source / good["weight_map"][first], source / "model.safetensors")
    refused(source, "has both")


def test_two_files_with_one_tensor(copy):
    shutil.move(copy / "model.safetensors", copy / "a.safetensors")
    shutil.copy(copy / "a.safetensors", copy / "b.safetensors")
    refused(copy, "is in both a.safetensors and b.safetensors")


def test_damaged_orbax_directories(original, tmp_path):
    convert(original, tmp_path / "good", quiet=True)
    for damage, message in (
        (lambda d: (d / "params" / "_METADATA").write_text("{"), "not an orbax checkpoint's tree"),
        (lambda d: (d / "params" / "_METADATA").write_text('{"tree_metadata": {"a": 1}}'), "not an orbax checkpoint's tree"),
        (lambda d: (d / "params" / "manifest.ocdbt").unlink(), "cannot open the parameter"),
        (lambda d: (d / "params" / "manifest.ocdbt").write_bytes(b"rubbish"), "cannot open the parameter"),
        (lambda d: shutil.rmtree(d / "params" / "ocdbt.process_0"), "cannot (open|read) the parameter"),
        (lambda d: (d / "config.json").unlink(), "without a config.json"),
        (lambda d: edit_config(d, "text_config", vocab_size=200), "misshapen lm_head/kernel"),
        (lambda d: edit_config(d, "text_config", num_hidden_layers=5), "have 2 layers"),
        (lambda d: (d / "manifest.json").write_text("["), "not a manifest"),
    ):
        bad = tmp_path / "case" / "bad"
        shutil.copytree(tmp_path / "good", bad)
        damage(bad)
        refused(bad, message)
        shutil.rmtree(bad)


def test_the_header_reader_agrees_with_the_library(original):
    from safetensors import safe_open

    with safe_open(original / "model.safetensors", framework="numpy") as theirs:
        ours = read_header(original / "model.safetensors")
        assert set(theirs.keys()) == set(ours)
        assert all(tuple(theirs.get_slice(name).get_shape()) == ours[name].shape for name in ours)


def test_every_mistake_is_one_line_and_exit_code_2(copy, tmp_path):
    """In processes of their own: no traceback reaches the user."""
    edit_config(copy, "text_config", num_hidden_layers=7)
    cases = [
        ("convert", copy, tmp_path / "out"),
        ("convert", tmp_path / "nowhere", tmp_path / "out"),
        ("convert", copy, tmp_path / "out", "--mesh", "fsdp=two"),
        ("verify", copy, copy),
    ]
    for case in cases:
        done = helpers.shell(*case)
        assert done.returncode == 2, done
        assert done.stderr.startswith("smolvlm-jax: ")
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
