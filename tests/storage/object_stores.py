"""Object stores on the loopback address, each behind a server that counts, fails and denies as a test wants.

S3 is moto's server. Google Cloud Storage is gcp-storage-emulator, which knows neither preconditions nor pages of listings: the
server in front of it decides `ifGenerationMatch` under a lock, as the store does, and cuts listings into pages.
"""

import contextlib
import functools
import http.client
import itertools
import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from smolvlm_jax.storage import StorePath, place, stores

__all__ = ["Front", "bucket", "front", "front_of", "impatient", "running", "serve"]

_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}
_ENVIRONMENT = {
    "s3": {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    },
    "gs": {"FSSPEC_GS": '{"token": "anon"}', "FSSPEC_GCS": '{"token": "anon"}'},
}


class Front(ThreadingHTTPServer):
    """In front of a store.

    Attributes:
        kind: "s3" or "gs".
        requests: Counter of requests by their methods; `log` has (method, key) of each.
        received, sent: Bytes of bodies, as the store sees it.
        denied: Buckets that nobody may enter.
        page: Entries of a page of a listing.
        delay: Seconds before each answer.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, kind: str, port: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kind, self._backend = kind, port
        self.requests: Counter = Counter()
        self.log: list[tuple[str, str]] = []
        self.received = self.sent = 0
        self.denied: set[str] = set()
        self.page, self.delay = 1000, 0.0
        self._down_until = 0.0
        self.lock, self.conditions = threading.Lock(), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process use this store."""
        name = "AWS_ENDPOINT_URL" if self.kind == "s3" else "STORAGE_EMULATOR_HOST"
        return {**_ENVIRONMENT[self.kind], name: self.url}

    def down(self, seconds: float) -> None:
        """Close every connection without an answer, for so long."""
        self._down_until = time.monotonic() + seconds

    @property
    def is_down(self) -> bool:
        return time.monotonic() < self._down_until

    def beside(self) -> "Front":
        """Another one in front of the same store, for requests that are not to be counted."""
        return Front(self.kind, self._backend)

    def forget(self) -> None:
        """Count from here."""
        with self.lock:
            self.requests.clear()
            self.log.clear()
            self.received = self.sent = 0

    def make(self, bucket: str) -> str:
        """A new bucket; its URL."""
        if self.kind == "s3":
            assert self.ask("PUT", f"/{bucket}")[0] == 200
        else:
            body = json.dumps({"name": bucket}).encode()
            assert self.ask("POST", "/storage/v1/b?project=p", {"Content-Type": "application/json"}, body)[0] == 200
        return f"{self.kind}://{bucket}"

    def ask(self, method: str, path: str, headers=None, body: bytes = b"") -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._backend, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def handle_error(self, request, client_address) -> None:
        pass  # a client that was killed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Front

    def log_message(self, *args) -> None:
        pass

    def _any(self) -> None:
        front = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = self._chunks()
        if front.is_down:
            self.close_connection = True
            return
        time.sleep(front.delay)
        bucket, key = _place(front.kind, self.path)
        with front.lock:
            front.requests[self.command] += 1
            front.log.append((self.command, key))
            front.received += len(body)
        if bucket in front.denied:
            return self._answer(*_denied(front.kind))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        return self._answer(*(_ask_gcs if front.kind == "gs" else _ask_s3)(front, self.command, self.path, headers, body))

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _any

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        length = next((value for name, value in headers if name.lower() == "content-length"), "0")
        for name, value in headers:
            if name.lower() not in _HOP:
                self.send_header(name, value)
        head = self.command == "HEAD"
        self.send_header("Content-Length", length if head else str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body)
            with self.server.lock:
                self.server.sent += len(body)


def _place(kind: str, path: str) -> tuple[str, str]:
    """(bucket, key) of a request, as far as its path tells."""
    parts = urlsplit(path)
    if kind == "s3":
        bucket, _, key = parts.path.lstrip("/").partition("/")
        return bucket, unquote(key)
    found = re.search(r"/b/([^/]+)(?:/o(?:/([^/]+))?)?", parts.path)
    name = parse_qs(parts.query).get("name", [""])[0]
    return (found[1], unquote(found[2] or "") or name) if found else ("", "")


def _denied(kind: str) -> tuple[int, list[tuple[str, str]], bytes]:
    if kind == "gs":
        return 403, [("Content-Type", "application/json")], b'{"error": {"code": 403, "message": "nobody may enter"}}'
    text = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    return 403, [("Content-Type", "application/xml")], text


def _ask_s3(front, method, path, headers, body):
    if "list-type=2" in path and front.page != 1000:
        path += f"&max-keys={front.page}" if "max-keys" not in path else ""
    if any(name.lower() in ("if-none-match", "if-match") for name in headers) and method == "PUT":
        with front.conditions:
            return front.ask(method, path, headers, body)
    return front.ask(method, path, headers, body)


def _ask_gcs(front, method, path, headers, body):
    parts = urlsplit(path)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    wanted = query.get("ifGenerationMatch")
    if method == "GET" and re.fullmatch(r"/storage/v1/b/[^/]+/o", parts.path):
        return _page(front, front.ask(method, path, headers), query)
    if wanted is not None:
        with front.conditions:
            bucket, key = _place("gs", path)
            status, _, known = front.ask("GET", f"/storage/v1/b/{bucket}/o/{quote(key or _name(body), safe='')}")
            generation = json.loads(known)["generation"] if status == 200 else "0"
            if generation != wanted and not (method == "GET" and status == 404):
                text = b'{"error": {"code": 412, "message": "a precondition did not hold"}}'
                return 412, [("Content-Type", "application/json")], text
            return front.ask(method, path, headers, body)
    status, out, data = front.ask(method, path, headers, body)
    if status == 206 and not data:
        return 416, [], b"the requested range cannot be satisfied"
    return status, out, data


def _name(body: bytes) -> str:
    """Of the object that an upload of several parts, or the beginning of one, is for."""
    return json.loads(re.search(rb"\{.*?\}(?=\s)|\{.*\}", body, re.DOTALL)[0])["name"]


def _page(front, answer, query):
    status, _, body = answer
    if status != 200:
        return answer
    found = json.loads(body)
    rows = sorted([*((item["name"], item) for item in found.get("items", [])), *((p, None) for p in found.get("prefixes", []))])
    start, size = int(query.get("pageToken", 0)), min(front.page, int(query.get("maxResults", 1000)))
    here = rows[start : start + size]
    out = {"kind": "storage#objects"}
    if items := [item for _, item in here if item]:
        out["items"] = items
    if prefixes := [name for name, item in here if item is None]:
        out["prefixes"] = prefixes
    if len(rows) > start + size:
        out["nextPageToken"] = str(start + size)
    return status, [("Content-Type", "application/json")], json.dumps(out).encode()


@contextlib.contextmanager
def serve(kind: str) -> Iterator[Front]:
    """A store of its own, without buckets."""
    if kind == "s3":
        server = pytest.importorskip("moto.server", reason="runs moto's server: pip install 'moto[s3]' flask flask-cors")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        backend = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        backend.start()
        port = backend.get_host_and_port()[1]
    else:
        server = pytest.importorskip("gcp_storage_emulator.server", reason="needs it: pip install gcp-storage-emulator")
        backend = server.Server("127.0.0.1", 0, in_memory=True)
        backend.start()
        while backend._api._httpd is None:
            time.sleep(0.01)
        port = backend._api._httpd.server_port
    try:
        with running(Front(kind, port)) as front:
            yield front
    finally:
        backend.stop()


@contextlib.contextmanager
def running(front: Front) -> Iterator[Front]:
    thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield front
    finally:
        front.shutdown()
        front.server_close()


# ---- fixtures, which tests/conftest.py gives to all tests

_numbers = itertools.count()


@pytest.fixture(scope="session")
def front_of() -> Iterator[Callable[[str], Front]]:
    """Starts each kind once."""
    pytest.importorskip("s3fs", reason="reads and writes S3: pip install 'smolvlm-jax[s3]'")
    pytest.importorskip("gcsfs", reason="reads and writes Google Cloud Storage: pip install 'smolvlm-jax[gcs]'")
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda kind: stack.enter_context(serve(kind)))


# moto takes three seconds to start.
@pytest.fixture(params=["gs", pytest.param("s3", marks=pytest.mark.thorough)])
def front(request, front_of, monkeypatch) -> Iterator[Front]:
    """A store that this process, and those that it starts, use."""
    front = front_of(request.param)
    for name, value in front.environment.items():
        monkeypatch.setenv(name, value)
    yield front
    front.denied.clear()
    front.down(0)
    front.page, front.delay = 1000, 0.0


@pytest.fixture
def bucket(front) -> StorePath:
    return place(front.make(f"bucket-{next(_numbers)}"))


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(stores, "PATIENCE", 0.0)
