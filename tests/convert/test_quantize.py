"""`convert --quantize int8`: what is stored, what it stands for wherever it is read, and what is refused."""

import json
import shutil
from pathlib import Path

import convert_helpers as helpers
import ml_dtypes
import numpy as np
import pytest

from smolvlm_jax import generate, load, make_mesh, save, save_hf
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.convert.opened import open_checkpoint
from smolvlm_jax.convert.verify import verify
from smolvlm_jax.errors import CheckpointError, InputError
from smolvlm_jax.parameters import flatten_params, quantize_params, spanned_dimensions
from smolvlm_jax.quantization import SCALE, dequantized


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """The bundled checkpoint in 8 bits, the rest of it in bfloat16."""
    directory = tmp_path_factory.mktemp("int8") / "orbax"
    convert("tiny", directory, quantize="int8", dtype="bfloat16", quiet=True)
    return directory


def same(a: dict, b: dict) -> bool:
    a, b = flatten_params(a), flatten_params(b)
    return a.keys() == b.keys() and all(a[path].dtype == b[path].dtype and (a[path] == b[path]).all() for path in a)


@pytest.mark.thorough
def test_what_is_stored_is_what_quantizing_in_memory_makes(ours, tmp_path):
    """Int8 and scales of every matrix, the rest in the dtype asked for, named in the manifest; a byte a number of a matrix."""
    model, params = load(ours)
    wanted = quantize_params(model, load("tiny")[1])
    flat, kept = flatten_params(params), flatten_params(wanted)
    assert flat.keys() == kept.keys()
    for path, x in flat.items():
        if path.endswith(SCALE) or path in spanned_dimensions(model):
            assert x.dtype == kept[path].dtype, path
            np.testing.assert_allclose(x.astype(np.float32), kept[path].astype(np.float32), rtol=1e-6, atol=0, err_msg=path)
        else:
            assert x.dtype == ml_dtypes.bfloat16, path
    manifest = json.loads((ours / "manifest.json").read_text())
    assert manifest["quantization"] == {"weights": "int8", "arrays": len(spanned_dimensions(model))}
    assert manifest["dtype"] == "bfloat16" and manifest["arrays"].keys() == flat.keys()
    halves = tmp_path / "bfloat16"
    convert("tiny", halves, dtype="bfloat16", quiet=True)
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in (ours, halves)}
    matrices = sum(x.size for path, x in flat.items() if path in spanned_dimensions(model))
    scales = sum(4 * x.size for path, x in flat.items() if path.endswith(SCALE))
    # How much files take beyond their arrays differs from run to run.
    stored = [sum(x.nbytes for x in flatten_params(load(path)[1]).values()) for path in (halves, ours)]
    assert stored[0] - stored[1] == matrices - scales and sizes[ours] < sizes[halves]


@pytest.mark.thorough
def test_generate_answers_as_with_what_the_weights_stand_for(ours, tmp_path):
    model, params = load(ours, dtype="float32")
    ids = np.array([[1, 5, 9, 11, 13, 17]])
    found = generate(model, params, ids, max_new_tokens=8)
    assert np.array_equal(found, generate(model, dequantized(params), ids, max_new_tokens=8))


@pytest.mark.thorough
def test_verify_states_the_bound_and_the_drift(ours, tmp_path):
    for a, b in (("tiny", ours), (ours, "tiny")):
        report = verify(a, b, quiet=True)
        assert report.same and {row.status for row in report.tensors} == {"quantized", "rounded"}
        assert any("at most 0.50" in note and "the bound is 0.5" in note and "%" in note for note in report.notes), report.notes
        assert all(0 < row.steps <= 0.5001 and 0 < row.relative < 0.02 for row in report.tensors if row.status == "quantized")
    other = tmp_path / "other"
    model, params = load("tiny")
    kernel = params["model"]["text_model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    params["model"]["text_model"]["layers_0"]["mlp"]["up_proj"]["kernel"] = kernel.at[3, 5].add(0.02)
    save(other, model, params)
    (bad,) = [row for row in verify(other, ours, quiet=True).tensors if not row.good]
    assert bad.status == "different" and bad.where == (3, 5) and bad.steps > 0.5


@pytest.mark.thorough
def test_back_to_pytorch_and_to_floats_are_what_the_weights_stand_for(ours, tmp_path):
    plain = dequantized(load(ours, dtype="float32")[1])
    convert(ours, tmp_path / "hf", dtype="float32", quiet=True)
    assert same(load(tmp_path / "hf")[1], plain)
    convert(ours, tmp_path / "floats", to="orbax", dtype="float32", quiet=True)
    assert same(load(tmp_path / "floats")[1], plain)
    convert(ours, tmp_path / "copy", to="orbax", quiet=True)
    convert(ours, tmp_path / "again", quantize="int8", quiet=True)
    for copy in ("copy", "again"):
        assert same(load(tmp_path / copy)[1], load(ours)[1])
    model, params = load(ours)
    save(tmp_path / "saved", model, params)
    assert same(load(tmp_path / "saved", check=True)[1], params)
    save_hf(tmp_path / "saved_hf", model, params)
    assert verify(tmp_path / "saved_hf", ours, quiet=True).same


@pytest.mark.thorough
def test_onto_a_mesh_and_cut_for_it(ours, tmp_path):
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    convert("tiny", tmp_path / "cut", quantize="int8", dtype="bfloat16", mesh=dict(mesh.shape), quiet=True)
    for directory in (ours, tmp_path / "cut"):
        assert same(load(directory, mesh=mesh)[1], load(ours)[1])


def test_what_cannot_be_is_refused_by_name(ours, tmp_path):
    with pytest.raises(InputError, match="8 bits"):
        convert("tiny", tmp_path / "x", quantize="int8", to="hf", quiet=True)
    with pytest.raises(InputError, match="int4"):
        convert("tiny", tmp_path / "x", quantize="int4", quiet=True)
    model, params = load("tiny")
    params["model"]["text_model"]["layers_0"]["mlp"]["up_proj"]["kernel"] *= np.nan
    save(tmp_path / "nan", model, params)
    with pytest.raises(CheckpointError, match="up_proj/kernel has values that are NaN"):
        convert(tmp_path / "nan", tmp_path / "x", quantize="int8", quiet=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda mlp: mlp.pop(f"kernel{SCALE}"), "up_proj/kernel is int8 and has no kernel_scale"),
        (lambda mlp: mlp.update(kernel=mlp["kernel"].astype(np.float32)), "kernel_scale belongs to nothing in int8"),
        (lambda mlp: mlp.update({f"kernel{SCALE}": mlp[f"kernel{SCALE}"][:, 1:]}), "does not fit"),
        (lambda mlp: mlp.update({f"kernel{SCALE}": mlp[f"kernel{SCALE}"][:, :1]}), "misshapen .*kernel_scale"),
    ],
)
def test_parts_that_do_not_fit_together_are_named(ours, tmp_path, change, message):
    model, params = load(ours)
    change(params["model"]["text_model"]["layers_0"]["mlp"]["up_proj"])
    save(tmp_path / "broken", model, params)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "broken")


def test_damage_is_found(ours, tmp_path):
    directory = tmp_path / "damaged"
    shutil.copytree(ours, directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    name = next(path for path in manifest["arrays"] if path.endswith(SCALE))
    manifest["arrays"][name] = "crc32:00000000"
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=name):
        load(directory, check=True)


def test_an_adapter_is_merged_into_what_the_weights_stand_for(ours):
    with open_checkpoint(ours) as opened:
        assert opened.quantized is not None and not any(path.endswith(SCALE) for path in opened.leaves)
        assert {leaf.dtype.name for leaf in opened.leaves.values()} == {"bfloat16"}


def test_the_command(tmp_path):
    assert helpers.call("convert", "tiny", tmp_path / "o", "--quantize", "int8", "--quiet") == 0
    assert json.loads((tmp_path / "o" / "manifest.json").read_text())["quantization"]["weights"] == "int8"
