"""Paths, URLs, base64 and bytes: what is read, and what is refused."""

import base64
import contextlib
import io
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from smolvlm_jax.errors import InputError, MediaError
from smolvlm_jax.processing import MediaLimits, SmolVLMImageProcessor, SmolVLMVideoProcessor
from smolvlm_jax.processing.fetch import image_size, load_image

from .conftest import tri_img, tri_video

LOCAL = MediaLimits(private_addresses=True, timeout=5)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


PICTURE = Image.fromarray(tri_img(20, 30))
PNG = encoded(PICTURE)


class Handler(BaseHTTPRequestHandler):
    clip = b""

    def do_GET(self):
        path = self.path.split("?")[0]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.split("=", 1)[1])
                self.end_headers()
            elif path == "/picture.png":
                self.answer(PNG)
            elif path == "/clip":
                self.answer(self.clip)
            elif path == "/loop":
                self.send_response(301)
                self.send_header("Location", "/loop")
                self.end_headers()
            elif path == "/declared":
                self.send_response(200)
                self.send_header("Content-Length", str(10**15))
                self.end_headers()
            elif path == "/endless":
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(b"x" * 65536)
            elif path == "/drip":  # a byte now and then keeps a socket's own timeout from ever running out
                self.send_response(200)
                self.end_headers()
                for _ in range(200):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
            elif path == "/drip-head":
                for _ in range(200):
                    self.wfile.write(b"H")
                    self.wfile.flush()
                    time.sleep(0.1)
            elif path == "/short":
                self.send_response(200)
                self.send_header("Content-Length", str(len(PNG)))
                self.end_headers()
                self.wfile.write(PNG[:50])
            elif path == "/words":
                self.wfile.write(b"HTTP/1.1 500 no\x1b[31m" + b"x" * 9000 + b"\r\n\r\n")
            elif path == "/no-http":
                self.wfile.write(b"\x89PNG\r\n" + b"x" * 9000 + b"\r\n\r\n")
            elif path == "/text":
                self.answer(b"<html>not a picture</html>")
            else:
                self.send_error(404)

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(data):
    Handler.clip = (data / "clip.avi").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


network = pytest.mark.network


def same_picture(image):
    return np.array_equal(np.asarray(image), np.asarray(PICTURE))


def test_sources(tmp_path):
    path = tmp_path / "picture.dat"
    path.write_bytes(PNG)
    text = base64.b64encode(PNG).decode()
    for source in (
        path,
        str(path),
        PNG,
        bytearray(PNG),
        text,
        f"data:image/png;base64,{text}",
        "\n".join([text[:76], text[76:]]),
        f"data:image/png;base64,{quote(text, safe='')}",
        f"data:image/png;base64,{'%0A'.join([text[:76], text[76:]])}",
        f"DATA:image/png;BASE64,{base64.urlsafe_b64encode(PNG).decode().rstrip('=')}",
        f"data:image/png,{quote(PNG)}",
    ):
        assert same_picture(load_image(source))
        assert image_size(source) == (20, 30)


@network
def test_url(server):
    assert same_picture(load_image(f"{server}/picture.png?q=1#part", LOCAL))
    assert same_picture(load_image(f"{server}/to/?place=/picture.png", LOCAL))
    assert image_size(f"{server}/picture.png", LOCAL) == (20, 30)
    images = SmolVLMImageProcessor(limits=LOCAL, size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    assert np.array_equal(images(f"{server}/picture.png")["pixel_values"], images(PICTURE)["pixel_values"])


@network
def test_video_url(server, data):
    videos = SmolVLMVideoProcessor(limits=LOCAL, max_image_size={"longest_edge": 32}, num_frames=4, fps=1)
    there = videos(f"{server}/clip", do_sample_frames=True, pixel_format="uint8")
    here = videos(data / "clip.avi", do_sample_frames=True, pixel_format="uint8")
    assert np.array_equal(there["pixel_values"], here["pixel_values"]) and here["num_tiles"] == 4
    with pytest.raises(MediaError, match=r"/nothing.*404"):
        videos(f"{server}/nothing")
    with pytest.raises(MediaError, match=r"/text.*it is text"):
        videos(f"{server}/text")


@network
def test_private_addresses_are_refused(server):
    port = server.rsplit(":", 1)[1]
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"):
        with pytest.raises(MediaError, match=r"not public|not known|cannot fetch"):
            load_image(f"http://{host}:{port}/picture.png")
    for host in (
        "169.254.169.254",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "100.64.0.1",
        "224.0.0.1",
        "[fe80::1]",
        "[fd00::1]",
    ):
        with pytest.raises(MediaError, match=r"not public"):
            load_image(f"http://{host}/latest/meta-data")


@network
def test_redirects_are_checked(server, monkeypatch):
    """A public address that redirects inside. The first address is allowed by name, as a public one would be."""
    from smolvlm_jax.processing import http

    true_check = http._checked_address
    port = int(server.rsplit(":", 1)[1])

    def check(url, host, found_port, limits):
        if host == "public.example":
            return (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))
        return true_check(url, host, found_port, limits)

    monkeypatch.setattr(http, "_checked_address", check)
    assert same_picture(load_image("http://public.example/picture.png"))
    for place in (f"{server}/picture.png", "http://169.254.169.254/", "http://localhost/", "//10.0.0.1/x"):
        with pytest.raises(MediaError, match=r"public.example.*not public"):
            load_image(f"http://public.example/to/?place={place}")
    for place in ("file:///etc/passwd", "ftp://example.org/x", "data:image/png;base64,AAAA", "gopher://x"):
        with pytest.raises(MediaError, match=r"public.example.*not an http"):
            load_image(f"http://public.example/to/?place={place}")
    with pytest.raises(MediaError, match=r"redirects more than 5 times"):
        load_image("http://public.example/loop")


@network
@pytest.mark.parametrize("path", ["drip", "drip-head"])
def test_time_limit(server, path):
    begun = time.perf_counter()
    with pytest.raises(MediaError, match=f"{path}.*0.5 seconds"):
        load_image(f"{server}/{path}", MediaLimits(private_addresses=True, timeout=0.5))
    assert time.perf_counter() - begun < 3


@network
@network
@pytest.mark.parametrize("path", ["/words", "/no-http"])
def test_words_of_a_server_are_one_short_line(server, path):
    with pytest.raises(MediaError) as raised:
        load_image(server + path, LOCAL)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 400


def test_size_limits(server, tmp_path):
    limits = MediaLimits(private_addresses=True, max_bytes=10**6)
    for path in ("declared", "endless"):
        with pytest.raises(MediaError, match=f"{path}.*bytes.*limit"):
            load_image(f"{server}/{path}", limits)
    for path, why in (("short", "50 of"), ("text", "no picture"), ("nothing", "404")):
        with pytest.raises(MediaError, match=rf"{path}.*{why}"):
            load_image(f"{server}/{path}", limits)
    big = tmp_path / "big.png"
    with big.open("wb") as file:
        file.truncate(2 * 10**6)
    for source in (big, bytes(2 * 10**6), "A" * 2_000_000):
        with pytest.raises(MediaError, match=r"limit"):
            load_image(source, limits)


def test_switches(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    with pytest.raises(MediaError, match=r"URLs are switched off"):
        load_image("https://example.org/x.png", MediaLimits(urls=False))
    with pytest.raises(MediaError, match=r"local files are switched off"):
        load_image(path, MediaLimits(files=False))
    with pytest.raises(MediaError, match=r"local files are switched off"):
        SmolVLMVideoProcessor(limits=MediaLimits(files=False))(str(path))
    assert same_picture(load_image(PNG, MediaLimits(urls=False, files=False)))


def test_errors_name_the_record(tmp_path):
    missing, empty = tmp_path / "missing.png", tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    images = SmolVLMImageProcessor()
    for source, name in (
        (missing, "missing.png"),
        (str(empty), "empty.jpg"),
        (tmp_path, tmp_path.name),
        ("no base64", "no base64"),
    ):
        with pytest.raises(MediaError, match=name):
            images(source)
    with pytest.raises(MediaError, match=r"images\[1\]\[0\].*missing"):
        images([[PICTURE], [str(missing)]])
    with pytest.raises(OSError):  # it is an OSError too
        images(str(missing))
    for source in ("ftp://example.org/x.png", "file:///etc/passwd", "http://", "data:image/png;base64,%%%", "x\0y", "y" * 5000):
        with pytest.raises(MediaError):
            images(source)
    with pytest.raises(InputError):
        images(object())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_endless_files_are_refused(tmp_path):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero"):
        if os.path.exists(path):
            with pytest.raises(MediaError, match=r"not a regular file"):
                load_image(path)
            with pytest.raises(MediaError, match=r"not a regular file"):
                SmolVLMVideoProcessor()(str(path))


def test_decompression_bombs():
    import zlib

    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    begun = time.perf_counter()
    with pytest.raises(MediaError, match=r"30000|900000000|exceeds limit"):
        load_image(bomb)
    with pytest.raises(MediaError, match=r"30×20 pixels.*limit of 100"):
        load_image(PNG, MediaLimits(max_pixels=100))
    with pytest.raises(MediaError, match=r"pixels.*limit"):
        image_size(PNG, MediaLimits(max_pixels=100))
    assert time.perf_counter() - begun < 2


def test_scans_of_a_jpeg_are_bounded():
    """Each takes as long as the whole picture; such bytes in metadata or behind the picture are no scans."""
    content = encoded(PICTURE, "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    with pytest.raises(MediaError, match="100 scans"):
        load_image(content[:-2] + scan * 150 + content[-2:])
    comment = b"\xff\xfe" + (402).to_bytes(2, "big") + b"\xff\xda" * 200
    for harmless in (content, content[:2] + comment + content[2:] + b"\xff\xda" * 200):
        assert np.array_equal(load_image(harmless), load_image(content))


def test_programs_are_not_started():
    """Pillow would hand PostScript to Ghostscript."""
    with pytest.raises(MediaError, match=r"cannot decode"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")


def test_playlists_are_not_videos(tmp_path):
    for name, text in (("a.m3u8", "#EXTM3U\n/etc/passwd\n"), ("b.mp4", "ffconcat version 1.0\nfile /etc/passwd\n")):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(MediaError, match=f"{name}.*text"):
            SmolVLMVideoProcessor()(str(path))


def test_truncated(data):
    with pytest.raises(MediaError):
        load_image(PNG[: len(PNG) // 2])
    with pytest.raises(MediaError):
        load_image(encoded(PICTURE, "JPEG")[:300])


def test_an_empty_file_is_called_empty(tmp_path):
    (empty := tmp_path / "empty.png").touch()
    for read in (load_image, image_size, lambda path: SmolVLMVideoProcessor()(str(path))):
        with pytest.raises(MediaError, match=r"empty\.png.*: it is empty"):
            read(empty)


def test_animations_give_their_first_frame(tmp_path):
    frames = [Image.fromarray(frame) for frame in tri_video(3, 20, 30)]
    for kind in ("PNG", "WEBP", "GIF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        first = encoded(frames[0], kind, **options)
        assert np.array_equal(np.asarray(load_image(content)), np.asarray(load_image(first)))


def test_header_size_is_the_decoded_size(tmp_path):
    """EXIF before or behind the pixels, in every orientation: the size from the header is the size decoded."""
    import struct
    import zlib

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
            content = encoded(PICTURE, kind, exif=exif)
            assert image_size(content) == load_image(content).size[::-1] == ((20, 30) if orientation < 5 else (30, 20))
        block = exif.tobytes().removeprefix(b"Exif\0\0")
        late = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
        content = PNG[:-12] + late + PNG[-12:]
        assert image_size(content) == load_image(content).size[::-1] == ((20, 30) if orientation < 5 else (30, 20))
    turned = Image.open(io.BytesIO(content))
    assert image_size(turned) == (20, 30) and image_size(turned, exif_transpose=True) == (30, 20)


def test_file_urls(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "a b.png")
    for url in (f"file://{tmp_path}/a%20b.png", f"FILE://localhost{tmp_path}/a%20b.png", f"file:{tmp_path}/a b.png"):
        assert load_image(url).size == (5, 4)
    for url in ("file://elsewhere/a.png", "file:a.png", "file://"):
        with pytest.raises(InputError, match="file"):
            load_image(url)
    with pytest.raises(MediaError, match="switched off"):
        load_image(f"file://{tmp_path}/a%20b.png", MediaLimits(files=False))
