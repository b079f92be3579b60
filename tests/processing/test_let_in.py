"""What is let in: formats of pictures, containers of videos, addresses. Nothing starts a program or opens another file."""

import base64
import io
import ipaddress
import os
import socket
import stat
import struct

import numpy as np
import pytest
from PIL import Image

from smolvlm_jax.errors import MediaError
from smolvlm_jax.processing import MediaLimits, SmolVLMImageProcessor, SmolVLMVideoProcessor, http
from smolvlm_jax.processing.addresses import is_public
from smolvlm_jax.processing.containers import recognise
from smolvlm_jax.processing.decode import decode_video
from smolvlm_jax.processing.fetch import image_size, load_image

from .conftest import need, tri_img
from .video_files import write_video

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n%%EOF\n"


def iptc(payload: bytes) -> bytes:
    """An IPTC file with a picture of another format in it."""

    def field(record: int, number: int, data: bytes) -> bytes:
        return bytes([0x1C, record, number]) + len(data).to_bytes(2, "big") + data

    side = (32).to_bytes(2, "big")
    head = field(3, 20, side) + field(3, 30, side) + field(3, 60, bytes([1, 0])) + field(3, 65, bytes([1]))
    return head + field(3, 120, bytes([5])) + field(8, 10, payload)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Stands in for every program that Pillow knows, and notes that it was started."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gs", "gswin64c", "djpeg"):
        (folder / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path / 'started'}\nexit 1\n")
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    yield tmp_path / "started"
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("content", [EPS, iptc(EPS), iptc(iptc(EPS))], ids=["eps", "in iptc", "twice in iptc"])
def test_no_picture_starts_a_program(content, tmp_path, programs):
    """However it is given: a path with a harmless name, bytes, data:, base64, or a Pillow image that is not decoded yet."""
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    images = SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    for source in (path, content, f"data:image/png;base64,{text}", text):
        for read in (load_image, image_size, images):
            with pytest.raises(MediaError, match="decode"):
                read(source)
    for read in (images, lambda picture: SmolVLMVideoProcessor()([picture])):
        with pytest.raises(MediaError, match=r"format (EPS|IPTC).*PNG, JPEG"):
            read(Image.open(path))


def test_formats_of_pictures():
    """The dozen that is read, and none of the others that Pillow can write and would read."""
    picture = Image.fromarray(tri_img(24, 32))
    wanted = {"PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF"}
    read, refused = set(), set()
    Image.init()
    for name in Image.SAVE:
        out = io.BytesIO()
        try:
            picture.save(out, name)
        except Exception:  # a format that cannot hold such a picture
            continue
        try:
            assert load_image(out.getvalue()).mode == "RGB"
            read.add(name)
        except MediaError as error:
            assert "no picture of a kind that is read" in str(error)
            refused.add(name)
    assert wanted - {"AVIF"} <= read <= wanted and {"TGA", "PCX", "SGI", "DDS", "EPS", "IM"} <= refused


def test_the_size_is_checked_again_after_decoding():
    """An icon says 16×16 and holds a PNG of another size."""
    png = io.BytesIO()
    Image.fromarray(tri_img(300, 400)).save(png, "PNG")
    content = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png.getvalue()), 22) + png.getvalue()
    for read in (load_image, image_size):
        with pytest.raises(MediaError, match="400×300 pixels"):
            read(content, MediaLimits(max_pixels=1000))


# ---- videos

HIDDEN_TEXTS = {
    "m3u8": b"#EXTM3U\n#\x01\n#EXTINF:2.0,\n%s\n#EXT-X-ENDLIST\n",
    "bom": b"\xef\xbb\xbf#EXTM3U\n#EXTINF:2.0,\n%s\n",
    "utf16": "#EXTM3U\n#EXTINF:2.0,\nx\n".encode("utf-16"),
    "null": b"#EXTM3U\n#\x00\n#EXTINF:2.0,\n%s\n",
    "concat": b"ffconcat version 1.0\n#\x01\nfile %s\n",
    "dash": b"<?xml version='1.0'?><!-- \x01 --><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>%s</BaseURL></MPD>",
    "sdp": b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=\x01\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 33\r\n",
    "sync": (b"G" + b"#EXTM3U\n%s\n").ljust(188, b"\n") * 4,
    "empty": b"",
    "junk": bytes(range(256)) * 4,
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_texts_are_no_videos(backend, tmp_path):
    need(backend)
    inner = write_video(tmp_path / "inner.ts", [tri_img(48, 64)] * 4, codec="mpeg2video")
    for name, text in HIDDEN_TEXTS.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(text.replace(b"%s", os.fsencode(inner)))
        with pytest.raises(MediaError, match=f"{name}.mp4"):
            decode_video(path, backend=backend)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypmp42", "mov"),
        (b"\0\0\0\x01mdat" + bytes(8), "mov"),
        (b"\0\0\0\x08wide", "mov"),
        (b"\x1a\x45\xdf\xa3\x01", "matroska"),
        (b"RIFF\x10\0\0\0AVI LIST", "avi"),
        (b"RIFF\x10\0\0\0WAVEfmt ", None),
        ((b"G" + bytes(187)) * 3, "mpegts"),
        ((bytes(4) + b"G" + bytes(187)) * 3, "mpegts"),
        ((b"G" + bytes(203)) * 3, "mpegts"),
        (b"G" + bytes(187) + b"X" + bytes(187), None),
        (b"\0\0\x01\xba\x44", "mpeg"),
        (b"OggS\0\x02", "ogg"),
        (b"GIF89a", "gif"),
        (b"FLV\x01\x05", "flv"),
    ],
)
def test_containers(head, name):
    if name is None:
        with pytest.raises(MediaError, match="no video of a kind"):
            recognise(head)
    else:
        assert recognise(head) == name


def test_videos_in_every_form(tmp_path):
    """A path, bytes, base64 and data: give the same frames; the limit of bytes holds for each."""
    frames = [np.roll(tri_img(36, 64), 5 * n, 1) for n in range(6)]
    path = write_video(tmp_path / "clip.mp4", frames, codec="libx264")
    content = path.read_bytes()
    text = base64.b64encode(content).decode()
    videos = SmolVLMVideoProcessor(max_image_size={"longest_edge": 32}, num_frames=4, fps=25)
    wanted = videos(str(path), do_sample_frames=True)["pixel_values"]
    small = MediaLimits(max_video_bytes=100)
    for source in (content, bytearray(content), text, f"data:video/mp4;base64,{text}"):
        assert np.array_equal(videos(source, do_sample_frames=True)["pixel_values"], wanted)
        assert np.array_equal(videos([[source], [source]], do_sample_frames=True)["pixel_values"][1], wanted[0])
        with pytest.raises(MediaError, match="limit"):
            videos(source, limits=small)
    for wrong in (b"no video", base64.b64encode(bytes(100)).decode(), "data:video/mp4;base64,%%"):
        with pytest.raises(MediaError):
            videos(wrong)


def test_lists_of_frames_in_a_conversation(processor, tmp_path):
    """They have no rate to sample by, so all of them are shown; files and pictures may be mixed."""
    frames = [Image.fromarray(np.roll(tri_img(36, 64), 5 * n, 1)) for n in range(3)]
    paths = []
    for number, frame in enumerate(frames):
        paths.append(str(tmp_path / f"{number}.png"))
        frame.save(paths[-1])
    found = []
    for clip in (paths, frames, [paths[0], frames[1], (tmp_path / "2.png").read_bytes()]):
        content = [{"type": "video", "video": clip}, {"type": "text", "text": "Q?"}]
        conversation = [{"role": "user", "content": content}]
        found.append(processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="np"))
    assert found[0]["pixel_values"].shape[1] == 3
    assert all(np.array_equal(found[0]["pixel_values"], other["pixel_values"]) for other in found[1:])
    with pytest.raises(MediaError, match=r"3 frames.*limit of 2"):
        processor.video_processor([[paths]], limits=MediaLimits(max_frames=2))


# ---- addresses

REFUSED = """
0.0.0.0 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.0.1 168.63.129.16 169.254.169.254 172.16.0.1 172.31.255.255
192.0.0.8 192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.19.255.255 198.51.100.7 203.0.113.9 224.0.0.1
239.255.255.255 240.0.0.1 255.255.255.255
:: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:168.63.129.16 ::ffff:0:7f00:1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe
64:ff9b:1::1 100::1 2001::1 2001:0:4136:e378:8000:63bf:80ff:fffe 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1::
2002:808:808::1 2620:4f:8000::1 3fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fd20:ce::254 fe80::1 fec0::1 feff::1 ff02::1
ff0e::1 2001:4860:4860::5efe:7f00:1 2001:4860:4860::200:5efe:a00:1
"""
PUBLIC = """
8.8.8.8 1.1.1.1 172.32.0.1 100.128.0.1 192.0.1.1 198.20.0.1 168.63.129.17 2001:4860:4860::8888 2606:4700::1111 64:ff9b::808:808
::ffff:8.8.8.8 2a00:1450:4001::1
"""


def test_addresses(monkeypatch):
    """Also behind a name, as the second of its addresses, and after a redirect: every hop asks the same function."""
    assert not [address for address in REFUSED.split() if is_public(ipaddress.ip_address(address))]
    assert not [address for address in PUBLIC.split() if not is_public(ipaddress.ip_address(address))]
    for address in REFUSED.split():
        found = [(socket.AF_INET, 1, 6, "", ("8.8.8.8", 80)), (socket.AF_INET6, 1, 6, "", (address, 80, 0, 0))]
        monkeypatch.setattr(http.socket, "getaddrinfo", lambda *_, found=found, **__: found)
        with pytest.raises(MediaError, match="not public"):
            http._checked_address("http://a.example/", "a.example", 80, MediaLimits())


def test_a_name_that_changes_its_address(monkeypatch):
    """What was checked is what is connected to: the name is looked up once a hop."""
    looked_up, connected = [], []

    def look_up(host, port, **_):
        looked_up.append(host)
        return [(socket.AF_INET, 1, 6, "", ("8.8.8.8" if len(looked_up) == 1 else "127.0.0.1", port))]

    def connect(address, *_):
        connected.append(address)
        raise OSError("not connected in tests")

    monkeypatch.setattr(http.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(http.socket, "create_connection", connect)
    with pytest.raises(MediaError, match="not connected"):
        load_image("http://rebinds.example/a.png")
    assert looked_up == ["rebinds.example"] and connected == [("8.8.8.8", 80)]
    with pytest.raises(MediaError, match="not public"):
        load_image("http://rebinds.example/a.png")
