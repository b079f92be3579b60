"""hf -> orbax -> hf is the identity, for every layout, dtype and number of files, and transformers reads the result."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import convert_helpers as helpers
import jax
import numpy as np
import pytest
from tiers import fast_first

from smolvlm_jax.checkpoint import load, save, save_hf
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.errors import CheckpointError, InputError
from smolvlm_jax.parameters import flatten_params


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Checkpoints by (layout, dtype, shards), made once."""
    root, made = tmp_path_factory.mktemp("originals"), {}

    def get(layout="smolvlm", dtype="float32", shards=1) -> Path:
        key = (layout, dtype, shards)
        if key not in made:
            made[key] = helpers.make(root / "-".join(map(str, key)), *key)
        return made[key]

    return get


def logits(directory: Path, layout: str):
    """What transformers computes, without a warning on the way."""
    import torch
    import transformers

    kind = transformers.AutoModel if layout == "base" else transformers.AutoModelForImageTextToText
    with helpers.transformers_warnings() as said, warnings.catch_warnings():
        warnings.simplefilter("error")
        model = kind.from_pretrained(directory, dtype="auto").eval()
    assert said == []
    ids = torch.tensor([[5, *[helpers.IMAGE_TOKEN] * 16, 9, 11, 3]])
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 1, 3, 32, 32).to(model.dtype)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    return (out.last_hidden_state if layout == "base" else out.logits), model.dtype


@pytest.mark.parametrize("shards", fast_first(1, [3, 1]))
@pytest.mark.parametrize("dtype", fast_first(2, ["float32", "bfloat16", "float16"]))
@pytest.mark.parametrize("layout", fast_first(2, helpers.LAYOUTS))
def test_round_trip(originals, tmp_path, layout, dtype, shards):
    source = originals(layout, dtype, shards)  # skips where the reference is not installed

    import torch

    assert len(list(source.glob("*.safetensors"))) == shards
    convert(source, tmp_path / "orbax", quiet=True)
    limit = (
        "4GB"
        if shards == 1
        else sum(path.stat().st_size for path in source.glob("*.safetensors")) // 3 + 4_000 * (4 if dtype == "float32" else 2)
    )
    convert(tmp_path / "orbax", tmp_path / "back", max_shard_size=limit, quiet=True)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == shards
    assert (tmp_path / "back" / "model.safetensors.index.json").exists() == (shards > 1)
    original, back = helpers.weights(source), helpers.weights(tmp_path / "back")
    assert helpers.bit_equal(original, back)
    assert ("lm_head.weight" in back) == (layout in ("smolvlm", "idefics3"))
    assert any(name.startswith("model.") for name in back) == (layout != "base")
    first, kind = logits(source, layout)
    second, same_kind = logits(tmp_path / "back", layout)
    assert kind == same_kind == getattr(torch, dtype)
    assert torch.equal(first, second)


@pytest.mark.parametrize("layout", helpers.LAYOUTS)
def test_a_standard_checkpointer_restores_what_load_loads(originals, tmp_path, layout):
    import orbax.checkpoint as ocp

    source = originals(layout)
    convert(source, tmp_path / "orbax", quiet=True)
    if layout == "base":
        with pytest.warns(UserWarning, match="base class"):
            _, ours = load(tmp_path / "orbax")
        with pytest.warns(UserWarning, match="base class"):
            _, direct = load(source)
    else:
        (_, ours), (_, direct) = load(tmp_path / "orbax"), load(source)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "orbax" / "params")
    for tree in (direct, restored):
        assert jax.tree.structure(tree) == jax.tree.structure(ours)
        assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(ours), strict=True))


def test_weights_written_by_save_are_exported(originals, tmp_path):
    model, params = load(originals())
    save(tmp_path / "orbax", model, params)
    convert(tmp_path / "orbax", tmp_path / "hf", quiet=True)
    save_hf(tmp_path / "direct", model, params, max_shard_size=100_000)
    assert len(list((tmp_path / "direct").glob("*.safetensors"))) > 3
    assert helpers.bit_equal(helpers.weights(originals()), helpers.weights(tmp_path / "hf"))
    assert helpers.bit_equal(helpers.weights(originals()), helpers.weights(tmp_path / "direct"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_rounded_as_torch_rounds(originals, tmp_path, dtype):
    source = originals()

    import torch
    from safetensors.torch import load_file

    convert(source, tmp_path / "orbax", dtype=dtype, quiet=True)
    convert(tmp_path / "orbax", tmp_path / "hf", quiet=True)
    kind = getattr(torch, dtype)
    expected, found = load_file(source / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(expected[name].to(kind), found[name]) for name in expected)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == dtype
    assert all(leaf.dtype == dtype for leaf in flatten_params(load(tmp_path / "orbax")[1]).values())


def test_mixed_dtypes_stay_mixed(originals, tmp_path):
    from safetensors.numpy import save_file

    source = tmp_path / "mixed"
    source.mkdir()
    (source / "config.json").write_bytes((originals() / "config.json").read_bytes())
    mixed = {k: v.astype(np.float16) if "norm" in k else v for k, v in helpers.weights(originals()).items()}
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "orbax", quiet=True)
    convert(tmp_path / "orbax", tmp_path / "hf", quiet=True)
    assert helpers.bit_equal(mixed, helpers.weights(tmp_path / "hf"))


def test_every_tensor_starts_on_a_multiple_of_its_item_size(tmp_path):
    from smolvlm_jax.convert.leaves import ArrayLeaf
    from smolvlm_jax.convert.safetensors_file import read_header
    from smolvlm_jax.convert.to_hf import write_hf

    arrays = {
        "model/text_model/norm/scale": np.ones(3, np.float32),
        "model/text_model/embed_tokens/embedding": np.ones((5, 3), np.float16),
        "lm_head/kernel": np.ones((3, 5), np.float32),
    }
    write_hf(tmp_path, {path: ArrayLeaf(path, array) for path, array in arrays.items()})
    found = read_header(tmp_path / "model.safetensors")
    assert len(found) == 3
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in found.values())


def test_orbax_to_orbax_and_hf_to_hf(originals, tmp_path):
    convert(originals(), tmp_path / "a", quiet=True)
    convert(tmp_path / "a", tmp_path / "b", to="orbax", quiet=True)
    convert(tmp_path / "b", tmp_path / "c", quiet=True)
    convert(originals(), tmp_path / "d", to="hf", max_shard_size="200KB", quiet=True)
    assert helpers.bit_equal(helpers.weights(originals()), helpers.weights(tmp_path / "c"))
    assert helpers.bit_equal(helpers.weights(originals()), helpers.weights(tmp_path / "d"))


def test_files_beside_the_weights_come_along_and_unknown_keys_stay(originals, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes((originals() / "model.safetensors").read_bytes())
    config = json.loads((originals() / "config.json").read_text())
    config["a_key_of_somebody_else"] = {"x": [1, 2]}
    config["text_config"]["pixel_shuffle_factor"] = 4
    (source / "config.json").write_text(json.dumps(config))
    carried = {"generation_config.json": '{"eos_token_id": 9}', "tokenizer.json": "{}", "chat_template.jinja": "x\n"}
    carried |= {"preprocessor_config.json": '{"size": 1}', "processor_config.json": "{}", "tokenizer_config.json": "{}"}
    for name, text in carried.items():
        (source / name).write_text(text)
    (source / "modeling_evil.py").write_text("raise SystemExit")
    convert(source, tmp_path / "orbax", quiet=True)
    convert(tmp_path / "orbax", tmp_path / "hf", quiet=True)
    for directory in (tmp_path / "orbax", tmp_path / "hf"):
        for name, text in carried.items():
            assert (directory / name).read_text() == text
        assert not (directory / "modeling_evil.py").exists()
        kept = json.loads((directory / "config.json").read_text())
        assert kept["a_key_of_somebody_else"] == {"x": [1, 2]}
        assert kept["text_config"]["pixel_shuffle_factor"] == 4


def test_manifest_says_what_it_was_made_from(originals, tmp_path):
    import hashlib

    import smolvlm_jax

    source = originals("idefics3", "bfloat16", 3)
    convert(source, tmp_path / "orbax", mesh={"fsdp": 4}, quiet=True)
    manifest = json.loads((tmp_path / "orbax" / "manifest.json").read_text())
    assert manifest["source"] == str(source)
    assert manifest["kind"] == "model"
    assert manifest["smolvlm_jax"] == smolvlm_jax.__version__
    assert manifest["dtype"] == "bfloat16"
    assert manifest["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    expected = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in source.iterdir()
    }
    assert manifest["files"] == expected


def test_one_file_and_its_config(originals, tmp_path):
    source = originals()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "any.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert(tmp_path / "weights" / "any.safetensors", tmp_path / "no", quiet=True)
    convert(tmp_path / "weights" / "any.safetensors", tmp_path / "o", config=source / "config.json", quiet=True)
    convert(source / "model.safetensors", tmp_path / "p", quiet=True)
    for name in ("o", "p"):
        convert(tmp_path / name, tmp_path / f"{name}-hf", quiet=True)
        assert helpers.bit_equal(helpers.weights(source), helpers.weights(tmp_path / f"{name}-hf"))


def test_a_head_that_config_denies_is_used(originals, tmp_path):
    source = tmp_path / "contradiction"
    source.mkdir()
    (source / "model.safetensors").write_bytes((originals() / "model.safetensors").read_bytes())
    config = json.loads((originals() / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    convert(source, tmp_path / "orbax", quiet=True)
    convert(tmp_path / "orbax", tmp_path / "hf", quiet=True)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    assert helpers.bit_equal(helpers.weights(source), helpers.weights(tmp_path / "hf"))
    assert "lm_head" in load(tmp_path / "orbax")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(to="gguf"), "orbax and hf"),
        (dict(to="hf", mesh={"fsdp": 8}), "max_shard_size"),
        (dict(dtype="int8"), "float32, bfloat16, float16"),
        (dict(max_shard_size="many"), "not a size"),
        (dict(max_shard_size="0GB"), "not a size"),
    ],
)
def test_wrong_arguments_are_named(originals, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        convert(originals(), tmp_path / "out", quiet=True, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_source_and_destination_are_different(originals):
    with pytest.raises(InputError, match="contains the source"):
        convert(originals(), originals(), force=True, quiet=True)
    with pytest.raises(InputError, match="contains the source"):
        convert(originals(), originals().parent, force=True, quiet=True)


def test_a_destination_that_leads_nowhere(originals, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in (("loop", "exists"), ("loop/below", "cannot write")):
        with pytest.raises(CheckpointError, match=message):
            convert(originals(), tmp_path / name, quiet=True)


EAR = """
import sys
import transformers
sys.path.insert(0, sys.argv[1])
import convert_helpers
with convert_helpers.transformers_warnings() as said:
    transformers.AutoModel.from_pretrained(sys.argv[2])  # the base class does not use the head
assert any("lm_head.weight" in line for line in said), said
"""


@pytest.mark.thorough
def test_the_ear_for_warnings_hears(originals):
    """The round trip asserts that there are no warnings; here a process of its own shows that they would be seen."""
    done = subprocess.run(
        [sys.executable, "-c", EAR, str(Path(__file__).parent), str(originals())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
