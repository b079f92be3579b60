"""Conversion for a mesh: chunks follow shards, hosts read and write only their part, and any mesh reads what another wrote."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import convert_helpers as helpers
import numpy as np
import pytest

from smolvlm_jax.convert.chunks import DEFAULT_MESH, MAX_BYTES, abstract_mesh, chunk_regions, chunk_shape, shard_shape
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.convert.from_orbax import find_checkpoint, open_orbax

LOAD = """
import json, sys
import jax, numpy as np
from smolvlm_jax.checkpoint import load
from smolvlm_jax.parameters import flatten_params
from smolvlm_jax.sharding import make_mesh
source, reference, fsdp, tensor = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
assert len(jax.devices()) == fsdp * tensor, jax.devices()
mesh = make_mesh(data=1, fsdp=fsdp, tensor=tensor)
params = flatten_params(load(source, mesh=mesh)[1])
expected = flatten_params(load(reference)[1])
assert params.keys() == expected.keys()
split = 0
for path, leaf in params.items():
    assert np.array_equal(np.asarray(leaf), np.asarray(expected[path])), path
    assert leaf.sharding.mesh.shape == mesh.shape
    split += leaf.addressable_shards[0].data.size < leaf.size
print(json.dumps({"split": split, "all": len(params)}))
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return helpers.make(tmp_path_factory.mktemp("original") / "hf")


def child(code: str, *arguments, devices: int = 1, **environment: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environment},
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize(
    ("fsdp", "tensor"), [*(pytest.param(*more, marks=pytest.mark.thorough) for more in ((1, 1), (4, 1), (8, 1))), (2, 4)]
)
def test_converted_for_eight_and_read_on_any(original, tmp_path_factory, fsdp, tensor):
    """Cut for FSDP over 8 devices, read back on 1, on 4 and on others: equal."""
    converted = tmp_path_factory.getbasetemp() / "for-eight"
    if not converted.exists():
        convert(original, converted, mesh={"data": 1, "fsdp": 8, "tensor": 1}, quiet=True)
    found = json.loads(finish(child(LOAD, converted, original, fsdp, tensor, devices=fsdp * tensor)))
    assert (found["split"] > found["all"] // 3) == (fsdp * tensor > 1)


def test_a_hugging_face_directory_goes_straight_onto_a_mesh(original):
    found = json.loads(finish(child(LOAD, original, original, 4, 2, devices=8)))
    assert found["split"] > found["all"] // 3


def test_a_host_reads_only_its_slices(original):
    """One host of eight reads an eighth of every tensor that is split, to the byte."""
    from smolvlm_jax.convert.opened import open_checkpoint
    from smolvlm_jax.model import SmolVLMForConditionalGeneration
    from smolvlm_jax.parameters import flatten_params, logical_axes

    source = open_checkpoint(original)
    (reader,) = source.readers
    axes = flatten_params(logical_axes(SmolVLMForConditionalGeneration(source.model_config)))
    mesh = abstract_mesh({"fsdp": 8})
    split = 0
    for path, leaf in source.leaves.items():
        shard = shard_shape(axes[path], leaf.shape, mesh)
        whole = leaf.read()
        for number, region in enumerate(chunk_regions(leaf.shape, shard)):
            before = reader.bytes_read
            part = leaf.read(region)
            assert reader.bytes_read - before == part.nbytes, path
            assert np.array_equal(part, whole[region])
            assert number < 8
        split += math.prod(shard) * 8 == whole.size
    assert split > len(source.leaves) // 3
    source.close()


def test_chunks_of_the_real_sizes():
    """Every chunk is at most 8 MiB, lies inside one shard of the mesh it was cut for, and the default serves 1 to 8 devices."""
    shapes = {
        ("vocab", "embed"): [(49280, 2048), (49155, 2048), (100352, 576), (49280, 960)],
        ("embed", "vocab"): [(2048, 49280), (2048, 49155), (576, 49280)],
        ("embed", "heads", None): [(2048, 32, 64), (1152, 16, 72), (576, 9, 64)],
        ("embed", "mlp"): [(2048, 8192), (1152, 4304)],
        ("mlp", "embed"): [(8192, 2048), (4304, 1152)],
        ("shuffled", "embed"): [(10368, 2048), (12288, 960)],
        (None,): [(2048,)],
    }
    for names, group in shapes.items():
        for shape in group:
            for itemsize in (2, 4):
                for mesh in (
                    None,
                    abstract_mesh({"fsdp": 8}),
                    abstract_mesh({"fsdp": 2, "tensor": 4}),
                    abstract_mesh({"tensor": 8}),
                ):
                    chunk = chunk_shape(names, shape, itemsize, mesh)
                    assert math.prod(chunk) * itemsize <= MAX_BYTES
                    covered = sum(math.prod(p.stop - p.start for p in region) for region in chunk_regions(shape, chunk))
                    assert covered == math.prod(shape)
                    shard = shard_shape(names, shape, mesh or abstract_mesh(DEFAULT_MESH))
                    if mesh is not None or math.prod(shard) * itemsize >= 1 << 20:
                        # whole chunks make up a shard, except along an axis that the mesh leaves whole
                        assert all(s % c == 0 or s == n for s, c, n in zip(shard, chunk, shape, strict=True))


def test_the_chunks_on_disk_are_those(original, tmp_path):
    convert(original, tmp_path / "plain", quiet=True)
    convert(original, tmp_path / "cut", mesh={"fsdp": 4, "tensor": 2}, quiet=True)
    chunks = {
        name: open_orbax(find_checkpoint(tmp_path / name))["model/text_model/layers_0/self_attn/q_proj/kernel"].chunk
        for name in ("plain", "cut")
    }
    assert chunks == {"plain": (48, 6, 8), "cut": (12, 3, 8)}


TOGETHER = """
import sys, warnings
warnings.simplefilter("ignore")
import jax
jax.distributed.initialize(sys.argv[3], num_processes=2, process_id=int(sys.argv[4]))
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.convert.safetensors_file import SafetensorsReader
from smolvlm_jax.checkpoint import load
from smolvlm_jax.sharding import make_mesh
readers = []
start = SafetensorsReader.__init__
def keep(self, *args):
    start(self, *args); readers.append(self)
SafetensorsReader.__init__ = keep
assert len(jax.devices()) == 8 and jax.process_count() == 2
mesh = make_mesh(data=1, fsdp=8, tensor=1)
convert(sys.argv[1], sys.argv[2], mesh=mesh, quiet=True)
_, params = load(sys.argv[2], mesh=mesh)
_, direct = load(sys.argv[1], mesh=mesh)
assert all(
    (x.data == y.data).all()
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(direct))
    for x, y in zip(a.addressable_shards, b.addressable_shards)
)
print(*[reader.bytes_read for reader in readers])
"""


@pytest.mark.thorough
def test_two_processes_convert_together(original, tmp_path):
    """Each of two processes reads and writes its own half, and the result is what one process writes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    both = [child(TOGETHER, original, tmp_path / "out", address, number, devices=4) for number in range(2)]
    try:
        read = [[int(word) for word in finish(process).splitlines()[-1].split()] for process in both]
    finally:
        for process in both:
            process.kill()
    total = sum(value.nbytes for value in helpers.weights(original).values())
    for converting, loading in read:
        assert converting < 0.7 * total  # norms, biases and what does not divide are whole
        assert loading < 0.7 * total
    assert helpers.call("verify", original, tmp_path / "out", "--quiet") == 0
    assert (tmp_path / "out" / "params" / "ocdbt.process_1").is_dir()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["arrays"]) == len(helpers.weights(original)), "verify has compared the arrays with them"


def test_the_command_under_slurm(original, tmp_path):
    """`--distributed` finds its job in the environment, and without --mesh cuts for FSDP over all devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    code = "import sys; from smolvlm_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ("convert", original, tmp_path / "out", "--distributed")
    both = [
        child(code, *command, devices=2, SLURM_PROCID=str(n), SLURM_LOCALID=str(n), SLURM_STEP_NUM_NODES="1", **job)
        for n in range(2)
    ]
    try:
        for process in both:
            finish(process)
    finally:
        for process in both:
            process.kill()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert helpers.call("verify", original, tmp_path / "out", "--quiet") == 0
