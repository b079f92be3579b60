"""Fetching a URL that somebody else wrote down: public addresses only, every redirect checked, bounded in size and time.

The address that was checked is the address that is connected to, so a name that resolves differently the second time cannot
lead to an internal address. Proxies of the environment are not used, since they would resolve names unchecked.
"""

import contextlib
import http.client
import ipaddress
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from ..errors import MediaError
from .addresses import is_public
from .limits import MediaLimits, describe_source

_CHUNK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)


def fetch_url(url: str, limits: MediaLimits, max_bytes: int) -> bytes:
    """The body at an http(s) URL.

    Args:
        url: where to fetch it.
        limits: which addresses are allowed, how long it may take, how often it may redirect.
        max_bytes: the largest body.

    Raises:
        MediaError: URLs are switched off, the address is refused, the status is bad, or the body is too large or too slow.
    """
    chunks: list[bytes] = []
    _Fetch(url, limits, max_bytes, chunks.append).run()
    return b"".join(chunks)


def download(url: str, limits: MediaLimits, max_bytes: int, file: IO[bytes]) -> None:
    """Write the body at `url` to `file`. The other arguments and the errors are those of `fetch_url`."""
    _Fetch(url, limits, max_bytes, file.write).run()


@dataclass
class _Fetch:
    """One URL on its way to `write`, through all its redirects."""

    url: str
    limits: MediaLimits
    max_bytes: int
    write: Callable[[bytes], Any]

    def run(self) -> None:
        self.name = describe_source(self.url)
        if not self.limits.urls:
            raise MediaError(f"URLs are switched off, so {self.name} is not fetched")
        self.deadline = time.monotonic() + self.limits.timeout
        target = self.url
        for _ in range(self.limits.max_redirects + 1):
            try:
                following = self._hop(target)
            except MediaError:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                slow = time.monotonic() >= self.deadline
                why = f"nothing complete after {self.limits.timeout} seconds" if slow else _line(error) or type(error).__name__
                raise MediaError(f"cannot fetch {self.name}: {why}") from error
            if following is None:
                return
            target = following
        raise MediaError(f"{self.name} redirects more than {self.limits.max_redirects} times")

    def _hop(self, target: str) -> str | None:
        """Fetch `target`; the next target if it redirects, None once the body is written."""
        parts = urllib.parse.urlsplit(target)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise MediaError(f"{self.name} leads to {describe_source(target)}, which is not an http(s) URL")
        if any(ord(character) <= 32 or ord(character) == 127 for character in target):
            raise MediaError(f"{describe_source(target)} has spaces or control characters in it")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        *_, address = _checked_address(self.url, parts.hostname, port, self.limits)
        seconds = max(0.001, self.deadline - time.monotonic())
        make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = make(parts.hostname, port, timeout=seconds)
        # TLS and the Host header keep the name; the connection goes to the numeric address that was checked.
        connect = lambda _, *rest: socket.create_connection(address[:2], *rest)
        connection._create_connection = connect  # type: ignore[attr-defined]  # the stubs do not know http.client's hook for this
        # The socket's own timeout starts again with every byte; this one does not.
        watchdog = threading.Timer(seconds, _hang_up, [connection])
        watchdog.daemon = True
        watchdog.start()
        try:
            path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            path = urllib.parse.quote(path, "/%?&=+,;:@!$'()*~[]")
            connection.request("GET", path, headers={"User-Agent": "smolvlm-jax", "Accept-Encoding": "identity"})
            response = connection.getresponse()
            if response.status in _REDIRECTS:
                place = response.headers.get("Location")
                if not place:
                    raise MediaError(f"{self.name} redirects to nowhere")
                return urllib.parse.urljoin(target, place)
            if response.status != 200:
                raise MediaError(f"{self.name} answers {response.status} {_line(response.reason)}")
            self._body(response)
            return None
        finally:
            watchdog.cancel()
            connection.close()

    def _body(self, response: http.client.HTTPResponse) -> None:
        declared = response.headers.get("Content-Length", "")
        if declared.isdigit() and int(declared) > self.max_bytes:
            raise MediaError(f"{self.name} has {declared} bytes, above the limit of {self.max_bytes}")
        received = 0
        while True:
            chunk = response.read1(_CHUNK)
            if time.monotonic() >= self.deadline:
                raise MediaError(f"{self.name} is not complete after {self.limits.timeout} seconds")
            if not chunk:
                break
            received += len(chunk)
            if received > self.max_bytes:
                raise MediaError(f"{self.name} has more bytes than the limit of {self.max_bytes}")
            self.write(chunk)
        if declared.isdigit() and received < int(declared):
            raise MediaError(f"{self.name} broke off after {received} of {declared} bytes")


def _line(text: object) -> str:
    """What a server may have worded, as one short line without control characters."""
    return "".join(character for character in " ".join(str(text).split()) if character.isprintable())[:200]


def _checked_address(url: str, host: str, port: int, limits: MediaLimits) -> tuple[Any, ...]:
    """An entry of getaddrinfo for `host`. Every address it has must be public, not only the one that is used."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise MediaError(f"cannot fetch {describe_source(url)}: the host {host!r} is not known ({error})") from error
    if not limits.private_addresses:
        for *_, address in found:
            ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
            if not is_public(ip):
                raise MediaError(
                    f"{describe_source(url)} leads to the address {ip}, which is not public; pass "
                    "--private-addresses (MediaLimits.private_addresses) if that is meant"
                )
    return found[0]


def _hang_up(connection: http.client.HTTPConnection) -> None:
    sock = connection.sock
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
