"""Archives of torch: read right, with their CRCs checked, or refused; no more memory than the file justifies."""

import functools
import io
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from smolvlm_jax.convert.regions import whole
from smolvlm_jax.convert.torch_bin import BinReader
from smolvlm_jax.convert.torch_pickle import SavedTensor, WouldRun, read_state
from smolvlm_jax.errors import CheckpointError

torch = pytest.importorskip("torch", reason="writes its archives with torch: pip install 'smolvlm-jax[test]'")
KINDS = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


def state() -> dict:
    """Tensors whose storages are whole, shared, permuted, sliced, with steps, parameters, empty and scalar."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(3000, generator=generator)
    table = torch.randn(20, 30, generator=generator)
    return {
        **{f"whole.{kind}": torch.randn(17, 5, generator=generator).to(kind) for kind in KINDS},
        "view.a": flat[:600].view(20, 30),
        "view.b": flat[600:1200].view(30, 20).T,
        "view.steps": flat[::3][:900:2],
        "tied": table,
        "tied again": table,
        "permuted": torch.randn(2, 3, 4, 5, generator=generator).permute(3, 1, 0, 2),
        "repeated": torch.randn(1, 5, generator=generator).expand(4, 5),
        "parameter": torch.nn.Parameter(torch.randn(4, generator=generator)),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }


def rezip(source: Path, target: Path, method: int, edit=lambda name, data: data) -> None:
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(target, "w", method) as b:
        for item in a.infolist():
            b.writestr(item.filename, edit(item.filename, a.read(item)))


def equal(reader: BinReader, wanted: dict) -> bool:
    bits = lambda array: np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for name, tensor in wanted.items():
        tensor = tensor.detach().contiguous()
        values = tensor.view(torch.int16).numpy().view(KINDS[tensor.dtype]) if tensor.element_size() == 2 else tensor.numpy()
        assert reader.shapes[name] == tuple(tensor.shape) and reader.dtypes[name] == values.dtype
        assert np.array_equal(bits(reader.borrow(name)), bits(values)), name
        region = tuple(slice(part.stop // 3, part.stop) for part in whole(tensor.shape))
        assert np.array_equal(bits(reader.read(name, region)), bits(values[region])), name
    return True


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("method", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_way_to_store_a_tensor_is_read_right(tmp_path, method, protocol):
    path = tmp_path / "a.bin"
    torch.save(state(), path, pickle_protocol=protocol)
    if method is not None:
        path = shutil.move(path, tmp_path / "b.bin")
        rezip(path, tmp_path / "a.bin", method)
    reader = BinReader([tmp_path / "a.bin"])
    assert equal(reader, state()) and reader.shapes.keys() == state().keys()
    reader.close()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, method):
    """Every byte of a small archive: an error, or the same values (where the byte is a date or padding)."""
    wanted = {"a": torch.arange(7.0), "b": torch.arange(40.0)[8:20]}
    torch.save(wanted, tmp_path / "good.bin")
    rezip(tmp_path / "good.bin", tmp_path / "a.bin", method)
    data = (tmp_path / "a.bin").read_bytes()
    outcomes = {"error": 0, "same": 0}
    for at in range(0, len(data), 3):
        (tmp_path / "a.bin").write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            reader = BinReader([tmp_path / "a.bin"])
            assert reader.shapes.keys() == wanted.keys() and equal(reader, wanted)
            reader.close()
            outcomes["same"] += 1
        except CheckpointError as error:
            assert "a.bin" in str(error) and "\n" not in str(error)
            outcomes["error"] += 1
    assert min(outcomes.values()) > 50


def refused(tmp_path: Path, message: str, content=None, edits: dict[str, bytes] | None = None) -> None:
    """An archive, with some members replaced, is refused when it is opened or when it is read."""
    torch.save({"a": torch.arange(1000.0)} if content is None else content, tmp_path / "good.bin")
    edit = lambda name, data: (edits or {}).get(name.removeprefix("good/"), data)
    rezip(tmp_path / "good.bin", tmp_path / "a.bin", zipfile.ZIP_DEFLATED, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        reader = BinReader([tmp_path / "a.bin"])
        for name in reader.shapes:
            reader.read(name)
    assert str(tmp_path / "a.bin") in str(caught.value)


def test_members_that_are_not_as_long_as_their_tensors(tmp_path):
    refused(tmp_path, "data/0 has 2,000 bytes, where a needs 4,000", edits={"data/0": bytes(2000)})
    refused(tmp_path, "data/0 has 5,000 bytes", edits={"data/0": bytes(5000)})
    refused(tmp_path, "not in little-endian", edits={"byteorder": b"big"})


def test_what_announces_more_than_the_file_holds_is_refused(tmp_path):
    huge = 200_000_000
    refused(tmp_path, "announces tensors of 800,000,000", {"a": torch.zeros(1).expand(huge)})
    refused(tmp_path, "announces tensors", {"a": torch.zeros(1).as_strided((20_000, 20_000), (0, 0))})
    refused(tmp_path, "announces tensors", {f"a{n}": t for t in [torch.zeros(500_000)] for n in range(100)})
    refused(tmp_path, "announces tensors of 40,000,000", {"a": torch.zeros(10_000_000)})  # 40 MB of zeros in 40 kB


def rebuilt(offset=0, shape=(4,), stride=(1,), size=1000, kind="FloatStorage", key="0") -> bytes:
    """A pickle as torch writes it, with any numbers in it."""

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, stride, False, {})

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return ("storage", getattr(torch, kind), key, "cpu", size) if isinstance(thing, Storage) else None

    out = io.BytesIO()
    Pickler(out, protocol=2).dump({"a": Tensor()})
    return out.getvalue()


@pytest.mark.parametrize(
    "numbers",
    [
        dict(offset=-1),
        dict(offset=997),
        dict(offset=2**62),
        dict(shape=(-4,)),
        dict(shape=(1001,)),
        dict(stride=(-1,)),
        dict(stride=(500,)),
        dict(shape=(4, 4)),
        dict(shape=(1,) * 40, stride=(1,) * 40),
        dict(shape=(2**60, 2**60), stride=(0, 0)),
        dict(shape=4),
        dict(shape=(4.0,)),
        dict(shape=(functools.reduce(lambda pair, _: (pair, pair), range(40), ()),)),  # 2**40 characters when printed
        dict(size=-1),
        dict(size="1000"),
        dict(key=0),
        dict(key="../0"),
        dict(kind="DoubleStorage"),
        dict(kind="LongStorage"),
        dict(size=500),
    ],
    ids=lambda numbers: next(iter(numbers)),
)
def test_offsets_strides_and_storages_are_checked(tmp_path, numbers):
    refused(tmp_path, "refused|damaged|has dtype", edits={"data.pkl": rebuilt(**numbers)})


def test_a_pickle_is_interpreted_and_never_run(tmp_path):
    assert isinstance(read_state(rebuilt())["a"], SavedTensor)
    for named in (b"c__builtin__\neval\n", b"cposix\nsystem\n", b"ctorch\nload\n", b"i__main__\nx\n"):
        with pytest.raises(WouldRun):
            read_state(b"\x80\x02(" + named + b".")
    for bad in (
        b"",
        b".",
        b"\x80\x02.",
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02}].",  # a list is left on top
        b"\x80\x02h\x05.",
        b"\x80\x02ccollections\nOrderedDict\n}b.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02}}K\x01s.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02K\x012.",
        b"\x80\x02" + b"(" * 3_000_000 + b".",
        b"\x80\x02" + b"]" * 3_000_000 + b".",
    ):
        try:
            assert not isinstance(read_state(bad), dict)
        except ValueError:
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_pickle_that_inflates_takes_no_memory(tmp_path):
    for name, text in (("marks", b"(" * 60_000_000), ("lists", b"]" * 3_900_000)):
        path = tmp_path / f"{name}.bin"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + text + b".")
        code = (
            "import sys, pathlib\nfrom smolvlm_jax.convert.torch_bin import BinReader\n"
            "try: BinReader([pathlib.Path(sys.argv[1])])\nexcept ValueError as error: print(error)\n"
            "print([line for line in open('/proc/self/status') if 'VmHWM' in line][0].split()[1])"
        )
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        said, peak = done.stdout.splitlines()
        assert "is refused" in said and int(peak) < 400_000, done.stdout


def test_a_directory_that_lies(tmp_path):
    """The central directory and the local headers disagree, or a name occurs twice."""
    torch.save({"a": torch.arange(100.0)}, tmp_path / "good.bin")
    data = (tmp_path / "good.bin").read_bytes()
    with zipfile.ZipFile(tmp_path / "good.bin") as archive:
        item = next(item for item in archive.infolist() if item.filename.endswith("data/0"))
        start = archive.start_dir
    entry = data.index(item.filename.encode(), start) - 46
    for offset, value in ((42, 1), (42, len(data) + 5), (24, 2**31), (20, 4), (8, 1), (10, 99), (16, item.CRC ^ 1)):
        changed = bytearray(data)
        form = "<H" if offset in (8, 10) else "<I"
        struct.pack_into(form, changed, entry + offset, value)
        (tmp_path / "a.bin").write_bytes(bytes(changed))
        with pytest.raises(CheckpointError, match=r"a\.bin"):
            BinReader([tmp_path / "a.bin"]).read("a")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "good.bin", "a") as archive:
        archive.writestr(item.filename, bytes(400))
    with pytest.raises(CheckpointError, match="not the archive"):
        BinReader([tmp_path / "good.bin"])
