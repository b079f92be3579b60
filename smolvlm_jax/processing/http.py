"""Fetching a URL that somebody else wrote down: public addresses only, every hop checked, bounded in size and time.

The address that was checked is the address that is connected to: a name that resolves differently the second time
cannot lead inside. Proxies of the environment are not used, since they would resolve names out of our sight.
"""

import http.client
import ipaddress
import os
import socket
import tempfile
import threading
import time
import urllib.parse

from ..errors import MediaError
from .limits import MediaLimits, describe_source

_CHUNK = 1 << 16
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_REDIRECTS = (301, 302, 303, 307, 308)


def fetch_url(url: str, limits: MediaLimits, max_bytes: int) -> bytes:
    """The body at an http(s) `url`. Raises MediaError: switched off, refused address, bad status, too large, too slow."""
    chunks = []
    _stream(url, limits, max_bytes, chunks.append)
    return b"".join(chunks)


def download(url: str, limits: MediaLimits, max_bytes: int) -> str:
    """The body at `url` in a temporary file; the caller deletes it. Raises MediaError as fetch_url does."""
    descriptor, path = tempfile.mkstemp(suffix=".video")
    try:
        with os.fdopen(descriptor, "wb") as file:
            _stream(url, limits, max_bytes, file.write)
    except BaseException:
        os.unlink(path)
        raise
    return path


def _stream(url: str, limits: MediaLimits, max_bytes: int, write):
    if not limits.urls:
        raise MediaError(f"URLs are switched off, so {describe_source(url)} is not fetched")
    deadline = time.monotonic() + limits.timeout
    target = url
    for _ in range(limits.max_redirects + 1):
        try:
            target = _one_hop(url, target, limits, max_bytes, deadline, write)
        except MediaError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            slow = time.monotonic() >= deadline
            why = f"nothing complete after {limits.timeout} seconds" if slow else (str(error) or type(error).__name__)
            raise MediaError(f"cannot fetch {describe_source(url)}: {why}") from error
        if target is None:
            return
    raise MediaError(f"{describe_source(url)} redirects more than {limits.max_redirects} times")


def _one_hop(url, target, limits, max_bytes, deadline, write) -> str | None:
    """Fetch `target`; the next target if it redirects, None once the body is written."""
    parts = urllib.parse.urlsplit(target)
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
        raise MediaError(f"{describe_source(url)} leads to {describe_source(target)}, which is not an http(s) URL")
    if any(ord(character) <= 32 or ord(character) == 127 for character in target):
        raise MediaError(f"{describe_source(target)} has spaces or control characters in it")
    port = parts.port or (443 if parts.scheme.lower() == "https" else 80)
    address = _checked_address(url, parts.hostname, port, limits)
    connection = _connection(parts, port, address, max(0.001, deadline - time.monotonic()))
    # The socket's own timeout starts anew with every byte. This one does not.
    watchdog = threading.Timer(max(0.001, deadline - time.monotonic()), _hang_up, [connection])
    watchdog.daemon = True
    watchdog.start()
    try:
        path = urllib.parse.quote(urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")), "/%?&=+,;:@!$'()*~[]")
        connection.request("GET", path, headers={"User-Agent": "smolvlm-jax", "Accept-Encoding": "identity"})
        response = connection.getresponse()
        if response.status in _REDIRECTS:
            place = response.headers.get("Location")
            if not place:
                raise MediaError(f"{describe_source(url)} redirects to nowhere")
            return urllib.parse.urljoin(target, place)
        if response.status != 200:
            raise MediaError(f"{describe_source(url)} answers {response.status} {response.reason}")
        declared = response.headers.get("Content-Length", "")
        if declared.isdigit() and int(declared) > max_bytes:
            raise MediaError(f"{describe_source(url)} has {declared} bytes, above the limit of {max_bytes}")
        received = 0
        while True:
            chunk = response.read1(_CHUNK)
            if time.monotonic() >= deadline:
                raise MediaError(f"{describe_source(url)} is not complete after {limits.timeout} seconds")
            if not chunk:
                break
            received += len(chunk)
            if received > max_bytes:
                raise MediaError(f"{describe_source(url)} has more bytes than the limit of {max_bytes}")
            write(chunk)
        if declared.isdigit() and received < int(declared):
            raise MediaError(f"{describe_source(url)} broke off after {received} of {declared} bytes")
        return None
    finally:
        watchdog.cancel()
        connection.close()


def _checked_address(url, host: str, port: int, limits: MediaLimits) -> tuple:
    """An entry of getaddrinfo for `host`. Every address it has must be public, not just the one we would take."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise MediaError(f"cannot fetch {describe_source(url)}: the host {host!r} is not known ({error})") from error
    if not limits.private_addresses:
        for *_, address in found:
            ip = _innermost(ipaddress.ip_address(address[0].partition("%")[0]))
            if not ip.is_global or ip.is_multicast or ip.is_reserved:
                raise MediaError(
                    f"{describe_source(url)} leads to the address {ip}, which is not public; set "
                    "MediaLimits.private_addresses if that is meant"
                )
    return found[0]


def _innermost(ip):
    """The IPv4 address that an IPv6 one stands for, where it does: mapped, 6to4, or behind a NAT64 gateway."""
    if ip.version == 4:
        return ip
    if ip in _NAT64:
        return ipaddress.IPv4Address(ip.packed[-4:])
    return ip.ipv4_mapped or ip.sixtofour or ip


def _connection(parts, port: int, address: tuple, timeout: float) -> http.client.HTTPConnection:
    family, kind, protocol, _, place = address

    def connect(_address, timeout=None, source_address=None):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(timeout)
            sock.connect(place)
        except BaseException:
            sock.close()
            raise
        return sock

    secure = parts.scheme.lower() == "https"
    make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = make(parts.hostname, port, timeout=timeout)
    connection._create_connection = connect  # the hook http.client has for this; the name stays for TLS and Host
    return connection


def _hang_up(connection):
    sock = connection.sock
    if sock is not None:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
