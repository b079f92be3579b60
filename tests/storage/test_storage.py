"""The storage layer against servers that speak the protocols of S3 and of Google Cloud Storage."""

import io
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from smolvlm_jax.errors import InputError, MissingExtraError, UnreachableError
from smolvlm_jax.storage import (
    RangedFile,
    StorePath,
    download,
    download_tree,
    is_store,
    place,
    remove,
    stores,
    upload,
    upload_tree,
)

pytestmark = pytest.mark.network


def test_places():
    path = place("s3://data/a/b.json")
    assert (path.bucket, path.key, path.name, path.stem, path.suffix) == ("data", "a/b.json", "b.json", "b", ".json")
    assert str(path) == "s3://data/a/b.json" and str(path.parent.parent) == "s3://data"
    assert path.parent / "c" == place("s3://data/a/c") == path.with_name("c") == path.parent.joined("x/../c")
    assert path.below(place("s3://data")) == "a/b.json" and path.below(path.parent) == "b.json"
    assert path.below(path) is None and path.below(place("s3://data/ax")) is None and path.below(place("gs://data")) is None
    assert isinstance(place("a/b"), Path) and isinstance(place("s3"), Path) and isinstance(place("a/s3:/b"), Path)
    assert is_store("gs://a/b") and is_store(path) and not is_store("https://a/b") and not is_store("a")
    for url in ("az://data/a", "s3://", "s3:///a"):
        with pytest.raises(InputError, match=r"names no bucket: it is SCHEME://BUCKET/KEY, with the scheme s3 or gs"):
            place(url)


@pytest.mark.parametrize("given", ["s3:/data/a", Path("gs://data/a")])
def test_a_url_that_has_lost_a_slash_is_no_local_directory(given, tmp_path, monkeypatch):
    """Unless there is one of that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"write (s3|gs)://data/a, as text and not as a pathlib.Path"):
        place(given)
    for name in ("s3:", "gs:"):
        Path(name).mkdir()
    assert place(given) == Path(given)


def test_objects(bucket):
    folder = bucket / "a" / "b"
    path, data = folder / "x ö+%.bin", bytes(range(256)) * 3
    assert not path.exists() and not folder.is_dir()
    path.write_bytes(data)
    assert path.read_bytes() == data and path.read_bytes(250, 10) == data[250:260] and path.read_bytes(760, 100) == data[760:]
    assert path.info().size == len(data) and path.is_file() and not path.is_dir() and folder.is_dir() and not folder.is_file()
    first = path.info().tag
    path.write_bytes(data[::-1])
    assert path.info().tag != first
    assert (folder / "new").create(b"one", {"owner": "me"}) and not (folder / "new").create(b"two", {"owner": "you"})
    assert (folder / "new").read_bytes() == b"one" and dict((folder / "new").info().metadata) == {"owner": "me"}
    (folder / "empty").touch()
    assert (folder / "empty").read_bytes() == (folder / "empty").read_bytes(0, 10) == (folder / "empty").open().read() == b""
    assert [str(p) for p in bucket.iterdir()] == [f"{bucket}/a"]
    assert [entry.name for entry in bucket.entries()] == ["a/b/empty", "a/b/new", "a/b/x ö+%.bin"]
    assert [entry.name for entry in bucket.entries("a/b/x")] == ["a/b/x ö+%.bin"]
    (folder / "new").rename(bucket / "moved")
    assert (bucket / "moved").read_bytes() == b"one" and not (folder / "new").is_file()
    (bucket / "moved").unlink()
    (bucket / "moved").unlink()
    assert not (bucket / "moved").exists()


def test_one_of_many_creates(bucket):
    path, won = bucket / "one", []
    threads = [threading.Thread(target=lambda n=n: path.create(b"%d" % n) and won.append(b"%d" % n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes()] == won


@pytest.mark.thorough
def test_listings_have_pages(front, bucket):
    front.page = 7
    names = [f"part-{number:03d}" for number in range(30)]
    for name in names:
        (bucket / "a" / name).touch()
    (bucket / "a" / "other").touch()
    front.forget()
    assert [entry.name for entry in (bucket / "a").entries()] == ["other", *names]
    assert front.requests["GET"] == 5
    assert [path.name for path in (bucket / "a").glob("part-*")] == names
    assert [path.name for path in (bucket / "a").glob("*r")] == ["other"]
    remove([bucket / "a" / name for name in (*names, "never")])
    assert [path.name for path in (bucket / "a").iterdir()] == ["other"]


def test_files_of_ranges(front, bucket):
    path, data = bucket / "x", bytes(range(256)) * 4096
    path.write_bytes(data)
    front.forget()
    with path.open() as file:
        assert file.read(10) == data[:10] and file.seek(-5, io.SEEK_END) and file.read() == data[-5:]
        assert front.sent < 600_000 and len(front.log) == 3
    file = RangedFile(path)
    path.write_bytes(data[::-1])
    with pytest.raises(OSError, match="another object has taken its place") as caught:
        file.read()
    assert caught.value.filename == str(path)


def test_directories(bucket, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    (source / "a").write_bytes(b"a" * 10)
    (source / "sub" / "b").write_bytes(b"b" * 20)
    upload_tree(source, bucket / "tree", last=["a"])
    assert download_tree(bucket / "tree", target) == ["a", "sub/b"]
    assert (target / "a").read_bytes() == b"a" * 10 and (target / "sub" / "b").read_bytes() == b"b" * 20
    with pytest.raises(FileNotFoundError):
        download_tree(bucket / "nothing", target)
    upload(source / "a", bucket / "one")
    download(bucket / "one", tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == b"a" * 10


def test_errors_are_one_line_and_name_the_url(front, bucket, impatient):
    absent = StorePath(bucket.scheme, "no-such-bucket", "x")
    front.denied.add(bucket.bucket)
    for path, kind, words in ((absent, FileNotFoundError, "no such bucket"), (bucket / "x", PermissionError, "denies access")):
        for work in (path.read_bytes, path.info, lambda p=path: list(p.entries()), path.touch, lambda p=path: p.create(b"")):
            with pytest.raises(kind, match=words) as caught:
                work()
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    front.denied.clear()
    with pytest.raises(FileNotFoundError, match="no such object"):
        (bucket / "never").read_bytes()


@pytest.mark.thorough
def test_a_store_that_is_away_for_a_while(front, bucket, capfd):
    (bucket / "x").write_bytes(b"here")
    front.down(1.5)
    began = time.monotonic()
    assert (bucket / "x").read_bytes() == b"here"
    assert time.monotonic() - began > 1.4
    assert capfd.readouterr().err.count("\n") <= 1


@pytest.mark.parametrize(
    "front", [pytest.param("s3", marks=pytest.mark.thorough), pytest.param("gs", marks=pytest.mark.slow)], indirect=True
)
def test_a_store_that_stays_away(front, bucket, impatient):  # for s3 botocore's own attempts take 10 s, for gs gcsfs's 30 s
    front.down(1000)
    with pytest.raises(UnreachableError, match="the store does not answer"):
        (bucket / "x").read_bytes()


@pytest.mark.parametrize("scheme, extra", [("s3", "s3"), ("gs", "gcs")])
def test_a_missing_extra_is_named(scheme, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    stores._opened.cache_clear()
    with pytest.raises(MissingExtraError, match=rf"an? {scheme}:// URL .* pip install 'smolvlm-jax\[{extra}\]'"):
        place(f"{scheme}://a/b").read_bytes()


def test_nothing_is_imported_before_a_request():
    code = (
        "import sys, smolvlm_jax.storage as s; s.place('s3://a/b')\nprint({'s3fs', 'gcsfs', 'fsspec', 'jax'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
