"""The requests to S3 and Google Cloud Storage that everything else is made of, and the errors that they answer with."""

import asyncio
import errno
import functools
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

from ..errors import UnreachableError, import_extra
from ..terminal import say

__all__ = ["STORES", "Entry", "Store", "store_of"]

# Seconds for which a request is repeated that may succeed later, and after which the user is told so.
PATIENCE = 60.0
_SAID_AFTER = 4.0
_TOGETHER = 16  # requests at a time, where there are many
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_EMPTY_RANGE = 416
_LIBRARIES = ("aiohttp", "requests", "urllib3")
_CONNECTIONS = {"ConnectionError", "HTTPClientError", "TransportError", "RefreshError"}
_NO_BUCKET, _ABSENT = "no such bucket", "no such object, or no such bucket"
_NO_CREDENTIALS = ("Credential", "Profile", "SSO")

T = TypeVar("T")


class Entry(NamedTuple):
    """An object, or with no tag the common beginning of several.

    Attributes:
        name: Its key; of a listing below a path, what follows that.
        size: In bytes.
        tag: Differs between any two contents that were ever put there: its ETag or generation.
        metadata: The user's, in lower case; only where one object was asked for.
    """

    name: str
    size: int
    tag: str
    metadata: Mapping[str, str] = {}


class Store(ABC):
    """A store, as one process uses it, from any number of threads.

    Methods take a bucket and keys. They raise OSErrors that name the URL, and UnreachableError.
    """

    scheme: ClassVar[str]

    def __init__(self, system: Any):
        from fsspec.asyn import sync

        self._fs, self._sync = system, sync

    def head(self, bucket: str, key: str) -> Entry:
        """An object's size, tag and metadata."""
        return self._ask(bucket, key, lambda: self._head(bucket, key))

    def get(self, bucket: str, key: str, start: int = 0, size: int | None = None, tag: str | None = None) -> bytes:
        """What an object holds.

        Args:
            bucket: Its bucket.
            key: Its key.
            start: The first byte.
            size: How many bytes, at most; by default all.
            tag: Raise OSError (ESTALE) unless the object has this one.
        """
        if size == 0:
            return b""
        ranges = "" if start == 0 and size is None else f"bytes={start}-{'' if size is None else start + size - 1}"
        try:
            return self._ask(bucket, key, lambda: self._get(bucket, key, ranges, tag))
        except FileExistsError:  # the precondition failed
            raise OSError(errno.ESTALE, "another object has taken its place", self._url(bucket, key)) from None
        except _EmptyRangeError:
            return b""

    def put(self, bucket: str, key: str, data: bytes, *, new: bool = False, metadata: Mapping[str, str] | None = None) -> bool:
        """Write an object, which appears whole.

        Args:
            bucket: Its bucket.
            key: Its key.
            data: Its contents.
            new: Do nothing if there is one; of several such puts one succeeds.
            metadata: The user's, names in lower case.

        Returns:
            Whether it was written. After a lost answer, False may stand for a put of this process too.
        """
        mode = "create" if new else "overwrite"
        given = self._metadata(metadata) if metadata else {}
        try:
            self._ask(bucket, key, lambda: self._fs._pipe_file(f"{bucket}/{key}", data, mode=mode, **given), _NO_BUCKET)
        except FileExistsError:
            return False
        return True

    def pages(self, bucket: str, prefix: str, delimiter: str = "", limit: int | None = None) -> Iterator[list[Entry]]:
        """Objects whose keys begin with `prefix`, in the order of their keys, and with a delimiter the beginnings up to it
        instead of what continues. limit: of a page, below the store's own."""
        token: str | None = None
        while True:
            ask = functools.partial(self._page, bucket, prefix, delimiter, token, limit)
            entries, token = self._ask(bucket, prefix, ask, _NO_BUCKET)
            yield entries
            if not token:
                return

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        """Remove objects; those that are not there are none."""

        async def every() -> None:
            gate = asyncio.Semaphore(_TOGETHER)

            async def one(key: str) -> None:
                async with gate:
                    try:
                        await self._fs._rm_file(f"{bucket}/{key}")
                    except FileNotFoundError:
                        pass

            await asyncio.gather(*map(one, keys))

        if keys:
            self._ask(bucket, keys[0], every)

    def copy(self, bucket: str, key: str, new: str) -> None:
        """Copy an object within its bucket, at the store."""
        self._ask(bucket, key, lambda: self._fs._cp_file(f"{bucket}/{key}", f"{bucket}/{new}"))

    def upload(self, file: str | os.PathLike, bucket: str, key: str) -> None:
        """Write an object from a file, in pieces where it is large."""
        self._ask(bucket, key, lambda: self._fs._put_file(os.fspath(file), f"{bucket}/{key}"), _NO_BUCKET)

    @abstractmethod
    async def _head(self, bucket: str, key: str) -> Entry: ...

    @abstractmethod
    async def _get(self, bucket: str, key: str, ranges: str, tag: str | None) -> bytes: ...

    @abstractmethod
    async def _page(
        self, bucket: str, prefix: str, delimiter: str, token: str | None, limit: int | None
    ) -> tuple[list[Entry], str | None]: ...

    @abstractmethod
    def _metadata(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        """As _pipe_file takes it."""

    def _url(self, bucket: str, key: str) -> str:
        return f"{self.scheme}://{bucket}/{key}"

    def _ask(self, bucket: str, key: str, work: Callable[[], Awaitable[T]], absent: str = _ABSENT) -> T:
        """The answer to a request, which is repeated while it may succeed later. absent: what an answer of 404 says."""
        began, wait, said = time.monotonic(), 0.5, False
        while True:
            try:
                return self._sync(self._fs.loop, work)
            except Exception as error:
                url = self._url(bucket, key)
                if not _is_transient(error):
                    raise _failure(error, url, absent) from error
                waited = time.monotonic() - began
                if waited + wait > PATIENCE:
                    raise UnreachableError(f"{url}: the store does not answer, or is too busy ({_line(error)})") from error
                if waited > _SAID_AFTER and not said:
                    said = True
                    say(f"{url}: the store does not answer, or is too busy ({_line(error)}); trying again")
            time.sleep(wait)
            wait = min(2 * wait, 10.0)


class S3(Store):
    scheme = "s3"

    def __init__(self):
        s3fs = import_extra("s3fs", "an s3:// URL", "s3")
        system = s3fs.S3FileSystem(use_listings_cache=False)
        system.retries = 1  # of botocore's five attempts each; what is longer is waited for here
        super().__init__(system)

    async def _head(self, bucket, key):
        found = await self._fs._call_s3("head_object", Bucket=bucket, Key=key)
        return Entry(key, found["ContentLength"], found["ETag"], found.get("Metadata", {}))

    async def _get(self, bucket, key, ranges, tag):
        given = {name: value for name, value in (("Range", ranges), ("IfMatch", tag)) if value}
        answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key, **given)
        async with answer["Body"] as body:
            return await body.read()

    async def _page(self, bucket, prefix, delimiter, token, limit):
        given = {"Prefix": prefix, "Delimiter": delimiter, "ContinuationToken": token, "MaxKeys": limit}
        given = {name: value for name, value in given.items() if value}
        page = await self._fs._call_s3("list_objects_v2", Bucket=bucket, **given)
        entries = [Entry(found["Key"], found["Size"], found["ETag"]) for found in page.get("Contents", [])]
        entries += [Entry(found["Prefix"], 0, "") for found in page.get("CommonPrefixes", [])]
        return sorted(entries), page.get("NextContinuationToken")

    def _metadata(self, metadata):
        return {"Metadata": dict(metadata)}


class GCS(Store):
    scheme = "gs"

    def __init__(self):
        core = import_extra("gcsfs.core", "a gs:// URL", "gcs")
        from aiohttp import ClientTimeout

        # It logs a traceback of what is an error of one line here.
        logging.getLogger("gcsfs").addHandler(logging.NullHandler())
        timeout = ClientTimeout(total=None, sock_connect=10, sock_read=60)
        super().__init__(core.GCSFileSystem(use_listings_cache=False, requests_timeout=timeout))

    async def _head(self, bucket, key):
        found = await self._fs._call("GET", "b/{}/o/{}", bucket, key, json_out=True)
        return Entry(key, int(found["size"]), found["generation"], found.get("metadata", {}))

    async def _get(self, bucket, key, ranges, tag):
        headers = {"Range": ranges} if ranges else {}
        url = self._fs.url(f"{bucket}/{key}")
        _, data = await self._fs._call("GET", url, headers=headers, ifGenerationMatch=tag)
        return data

    async def _page(self, bucket, prefix, delimiter, token, limit):
        given = {"prefix": prefix, "delimiter": delimiter, "pageToken": token, "maxResults": limit}
        given = {name: value for name, value in given.items() if value}
        page = await self._fs._call("GET", "b/{}/o", bucket, json_out=True, **given)
        entries = [Entry(found["name"], int(found["size"]), found["generation"]) for found in page.get("items", [])]
        entries += [Entry(found, 0, "") for found in page.get("prefixes", [])]
        return sorted(entries), page.get("nextPageToken")

    def _metadata(self, metadata):
        return {"metadata": dict(metadata)}


STORES: dict[str, type[Store]] = {store.scheme: store for store in (S3, GCS)}


def store_of(scheme: str) -> Store:
    """The client of this process for one of STORES. Raises MissingExtraError."""
    return _opened(scheme, os.getpid())


@functools.cache
def _opened(scheme: str, process: int) -> Store:
    return STORES[scheme]()  # type: ignore[call-arg]  # each knows its file system


class _EmptyRangeError(OSError):
    """A range that begins behind an object's last byte."""


def _failure(error: BaseException, url: str, absent: str) -> OSError:
    """What a store or its library says, as an OSError of one line."""
    status, code = _status(error)
    if status == _EMPTY_RANGE:
        return _EmptyRangeError(errno.EINVAL, "no such range", url)
    if isinstance(error, FileNotFoundError) or status == 404:
        what = {"NoSuchBucket": _NO_BUCKET, "NoSuchKey": "no such object"}.get(code, absent)
        return FileNotFoundError(errno.ENOENT, what, url)
    if isinstance(error, FileExistsError) or status == 412:
        return FileExistsError(errno.EEXIST, "there is such an object", url)
    names = " ".join(kind.__name__ for fault in _chain(error) for kind in type(fault).__mro__)
    if status is None and any(word in names for word in _NO_CREDENTIALS):
        return PermissionError(errno.EACCES, f"no credentials for the store ({_line(error)})", url)
    if isinstance(error, PermissionError) or status in (401, 403) or str(error).startswith("Forbidden"):
        return PermissionError(errno.EACCES, f"the store denies access with these credentials ({_line(error)})", url)
    return OSError(errno.EIO, _line(error), url)


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError)):
        return False
    status, code = _status(error)
    if status is not None:
        return status in _BUSY or code in ("ConditionalRequestConflict", "OperationAborted")
    for fault in _chain(error):
        names = {kind.__name__ for kind in type(fault).__mro__}
        if isinstance(fault, TimeoutError) or names & _CONNECTIONS:
            return True
        if type(fault).__module__.partition(".")[0] in _LIBRARIES:
            return True
    return False


def _status(error: BaseException) -> tuple[int | None, str]:
    """(the status of the answer, None where there was none; the store's own code)."""
    for fault in _chain(error):
        response = getattr(fault, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
        status = getattr(fault, "code", None) or getattr(fault, "status", None)
        if str(status).isdecimal():
            return int(str(status)), ""
    return None, ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:300]
