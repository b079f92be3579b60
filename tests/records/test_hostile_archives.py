"""Archives and packed files that nobody would make in earnest: errors of their records, or refused by name."""

import gzip
import io
import json
import tarfile

import pytest

from smolvlm_jax.errors import InputError
from smolvlm_jax.records.sources import jsonl, open_source, plain

GOOD = json.dumps({"prompt": "What?"}).encode()


def add(file: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    file.addfile(info, io.BytesIO(data))


def read(path) -> list:
    source = open_source(path, prompt="?")
    return [source.parse(row.payload) for unit in source.units(3) for row in unit.rows()]


def test_links_devices_and_sizes_are_errors_of_their_records(tmp_path, monkeypatch):
    """No member is ever written anywhere or looked up by its name, so names that lead out of the archive are names."""
    monkeypatch.setattr(jsonl, "MAX_LINE", 4096)
    monkeypatch.setattr("smolvlm_jax.records.sources.tar.MAX_LINE", 4096)
    secret = tmp_path / "secret.json"
    secret.write_bytes(json.dumps({"prompt": "a secret"}).encode())
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        add(file, "1.json", GOOD)
        add(file, "2.json", type=tarfile.SYMTYPE, linkname=str(secret))
        add(file, "3.json", type=tarfile.LNKTYPE, linkname="1.json")
        add(file, "4.json", type=tarfile.FIFOTYPE)
        add(file, "5.json", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add(file, str(secret), GOOD)
        add(file, "../../6.json", GOOD)
        add(file, "7.json", GOOD + b" " * 5000)
        add(file, "8.json", GOOD)
        add(file, "8.txt", bytes(4096))
        add(file, "9.json", b'{"prompt": "?", "image": "9.jpg"}')
        add(file, "9.jpg", type=tarfile.SYMTYPE, linkname="1.json")
        add(file, "10.json", GOOD)
        add(file, "10.json", GOOD)
    records = read(tmp_path / "a.tar")
    errors = [record.error and record.error.partition(", ")[2] for record in records]
    assert errors == [
        None,
        *(f"{n}, has the member .json, which is no plain file" for n in (2, 3, 4, 5)),
        None,
        None,
        "7, is larger than 4096 bytes",
        "8, is larger than 4096 bytes",
        "9, has the member .jpg, which is no plain file",
        "10, has two members .json",
    ]
    assert [record.id for record in records if not record.error] == ["1", str(secret)[:-5], "../../6"]
    assert not any("secret" in str(record.messages) for record in records)


def test_a_size_that_is_claimed_only(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        add(file, "1.json", GOOD)
        info = tarfile.TarInfo("2.jpg")
        info.size = 2**40
        file.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(InputError, match=r"a\.tar is no archive that can be read: (it is cut off|unexpected end of data)"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.tar"])
def test_a_packed_file_may_not_fill_the_disk(tmp_path, monkeypatch, name):
    monkeypatch.setattr(plain, "_ANY_BYTES", 2**20)
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(bytes(2**22)))
    with pytest.raises(InputError, match=rf"{name}\.gz cannot be unpacked: it holds more than 250 times its [\d,]+ bytes"):
        read(path)
