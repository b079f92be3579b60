"""Objects in buckets, in place of paths: `s3://BUCKET/KEY` and `gs://BUCKET/KEY`.

    path = place("s3://photos/2024")               # a StorePath; of anything else a pathlib.Path
    for entry in path.entries(): ...               # every object below it, page by page: Entry(name, size, tag)
    (path / "a.json").read_bytes()                 # also: open() by ranges, info(), exists(), glob("part-*"), unlink()
    (path / "a.json").write_bytes(data)            # one put, which replaces what is there
    (path / "a.json").create(data) -> bool         # one conditional put: False, and nothing is done, if there is one
    download(path, file), upload(file, path)       # large files, in pieces
    download_tree(path, folder), upload_tree(folder, path)

paths.py       StorePath: what the package uses of pathlib.Path, over objects; a file of ranges
anywhere.py    paths that may be local or in a store
stores.py      the requests that all of it is made of, and what stores answer in errors
copying.py     files and directories to and from a store

A StorePath fails as a file does: FileNotFoundError, PermissionError and other OSErrors of one line that name the URL. A request
that fails for a temporary reason (no connection, a timeout, "slow down") is repeated for a minute; then UnreachableError is
raised, which is no OSError: nothing is wrong with the request. An object appears when it is complete. There are no locks and
no renames: what only one of several processes may do is decided by `create`. "Appending" is done by more objects.

Requests go through s3fs and gcsfs (the extras `s3` and `gcs`), which are imported when the first one is made. Credentials and
endpoints are theirs: AWS_PROFILE, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST, FSSPEC_S3, ….
"""

from .anywhere import AnyPath, is_store, place, remove
from .copying import download, download_tree, upload, upload_tree
from .paths import RangedFile, StorePath
from .stores import Entry

__all__ = ["AnyPath", "Entry", "RangedFile", "StorePath", "download", "download_tree", "is_store", "place", "remove", "upload"]
__all__ += ["upload_tree"]
