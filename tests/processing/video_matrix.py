"""Small videos of every kind: each frame carries its number as a bar code, so that what is right is known without one."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

WIDTH, HEIGHT, RATE = 64, 48, 25
_UP = lambda frame: frame


def drawn(number: int) -> np.ndarray:
    """A frame whose eight columns are the bits of its number, above a smooth part that is different from frame to frame."""
    pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    for bit in range(8):
        pixels[:, 8 * bit : 8 * bit + 8] = 235 if number >> bit & 1 else 20
    y, x = np.mgrid[0:16, 0:WIDTH]
    pixels[32:] = ((3 * x + 5 * y + 2 * number) % 200)[..., None] // 2 + 40
    return pixels


def number_of(frame: np.ndarray) -> int:
    """The number in a frame that was compressed and decompressed."""
    return sum(1 << bit for bit in range(8) if frame[4:28, 8 * bit + 2 : 8 * bit + 6].mean() > 128)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """How to write a video, and what a player shows of it.

    Attributes:
        name: of the file, with the extension that names its container.
        codec: FFmpeg's encoder.
        count: frames written.
        options: of the encoder.
        gop: frames from one key frame to the next.
        times: milliseconds of each frame, for a variable rate or a late start; None: constant from 0.
        format: FFmpeg's name of the container, where the extension does not say it.
        container: options of the container.
        live: written where the writer cannot go back, so without a length and an index.
        after: from the written bytes to the file's.
        shown: numbers of the frames that are presented; None: all.
        seconds: when, from the first; None: as written.
        turned: from a frame as it is stored to what is shown.
        cover: a picture stands before the film.
        hidden: numbers of the frames of VP8 that are marked as reference only.
    """

    name: str
    codec: str
    count: int = 40
    options: dict = field(default_factory=dict)
    gop: int = 12
    times: tuple | None = None
    format: str | None = None
    container: dict = field(default_factory=dict)
    live: bool = False
    after: Callable[[bytes], bytes] = bytes
    shown: tuple | None = None
    seconds: tuple | None = None
    turned: Callable = _UP
    cover: bool = False
    hidden: tuple = ()

    @property
    def uneven(self) -> bool:
        return bool(self.hidden) or (self.times is not None and len(set(np.diff(self.times))) > 1)

    def numbers(self) -> list[int]:
        return [n for n in (range(self.count) if self.shown is None else self.shown) if n not in self.hidden]

    def presented(self) -> list[float]:
        if self.seconds is not None:
            return list(self.seconds)
        times = [self.times[n] if self.times else 1000 * n / RATE for n in self.numbers()]
        return [(time - times[0]) / 1000 for time in times]

    def write(self, folder: Path) -> Path:
        av = pytest.importorskip("av", reason="writes its videos with PyAV: pip install 'smolvlm-jax[pyav]'")
        if self.codec not in av.codecs_available:
            pytest.skip(f"this FFmpeg has no encoder {self.codec}")
        path = folder / self.name
        target = _NoWayBack(path) if self.live else str(path)
        with av.open(target, "w", format=self.format, options=self.container) as container:
            if self.cover:
                cover = container.add_stream("mjpeg", rate=1)
                cover.width, cover.height, cover.pix_fmt = 96, 96, "yuvj420p"
                cover.disposition = av.stream.Disposition.attached_pic
            stream = container.add_stream(
                self.codec, rate=RATE, options={key: str(value) for key, value in self.options.items()}
            )
            stream.width, stream.height = WIDTH, HEIGHT
            stream.pix_fmt = "rgb8" if self.codec == "gif" else "yuvj420p" if self.codec == "mjpeg" else "yuv420p"
            stream.gop_size = self.gop
            if self.times:
                stream.codec_context.time_base = Fraction(1, 1000)
            if self.cover:
                container.mux(cover.encode(av.VideoFrame.from_ndarray(np.full((96, 96, 3), 200, np.uint8), format="rgb24")))
                container.mux(cover.encode())
            for number in range(self.count):
                frame = av.VideoFrame.from_ndarray(drawn(number), format="rgb24").reformat(format=stream.pix_fmt)
                if self.times:
                    frame.pts, frame.time_base = self.times[number], Fraction(1, 1000)
                else:
                    frame.pts, frame.time_base = number, Fraction(1, RATE)
                for packet in stream.encode(frame):
                    container.mux(_hide(packet) if number in self.hidden else packet)
            container.mux(stream.encode())
        if self.live:
            target.close()
        path.write_bytes(self.after(path.read_bytes()))
        return path


def _hide(packet):
    """A packet of VP8 without the bit that says that its frame is shown."""
    import av

    content = bytearray(bytes(packet))
    content[0] &= ~0x10
    out = av.Packet(bytes(content))
    out.pts, out.dts, out.time_base, out.stream = packet.pts, packet.dts, packet.time_base, packet.stream
    out.is_keyframe = packet.is_keyframe
    return out


class _NoWayBack:
    """A file that can only be written on."""

    def __init__(self, path: Path):
        self._file = path.open("wb")

    def write(self, content) -> int:
        return self._file.write(content)

    def close(self) -> None:
        self._file.close()


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def _boxes(content: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], 0
    while place < len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        found.append((content[place + 4 : place + 8], content[place + 8 : place + size]))
        place += size
    return found


def _track(content: bytes, change: Callable[[list[tuple[bytes, bytes]]], list[tuple[bytes, bytes]]]) -> bytes:
    """An mp4 with its index at the end, with the boxes of its track changed."""
    out = b""
    for kind, body in _boxes(content):
        if kind == b"moov":
            parts = [
                (k, b"".join(_box(*box) for box in change(_boxes(b)))) if k == b"trak" else (k, b) for k, b in _boxes(body)
            ]
            body = b"".join(_box(*part) for part in parts)
        out += _box(kind, body)
    return out


def edited(*edits: tuple[int, int], delay: int = 0) -> Callable[[bytes], bytes]:
    """Puts an edit list into an mp4: (first, end) in frames for each edit; the film starts `delay` frames late."""

    def change(boxes: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        inner = dict(boxes)
        media = dict(_boxes(inner[b"mdia"]))
        (clock,) = struct.unpack(">I", media[b"mdhd"][12:16])
        offset = 0
        if b"edts" in inner:  # where B-frames put the first frame
            offset = struct.unpack(">i", dict(_boxes(inner[b"edts"]))[b"elst"][12:16])[0]
        entries = [(delay * 1000 // RATE, -1)] if delay else []
        entries += [((end - first) * 1000 // RATE, offset + first * clock // RATE) for first, end in edits]
        content = struct.pack(">II", 0, len(entries)) + b"".join(struct.pack(">IiI", *entry, 1 << 16) for entry in entries)
        kept = [box for box in boxes if box[0] != b"edts"]
        return [kept[0], (b"edts", _box(b"elst", content)), *kept[1:]]

    return lambda content: _track(content, change)


def with_matrix(a: int, b: int, c: int, d: int) -> Callable[[bytes], bytes]:
    """Puts a display matrix into an mp4: x goes to (a, b), y to (c, d)."""

    def change(boxes: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        (kind, head), *others = boxes
        place = 40 if head[0] == 0 else 52
        matrix = struct.pack(">9i", *(n << 16 for n in (a, b)), 0, *(n << 16 for n in (c, d)), 0, 0, 0, 1 << 30)
        return [(kind, head[:place] + matrix + head[place + 36 :]), *others]

    return lambda content: _track(content, change)


_BFRAMES = {"bf": 2}
_UNEVEN = tuple(int(t) for t in np.cumsum(np.random.default_rng(1).integers(20, 120, 40)))
_H264 = {"codec": "libx264", "options": _BFRAMES}
_THIRTY = tuple(range(40))
_EVENLY = lambda count: tuple(n / RATE for n in range(count))

CLIPS = [
    # containers and codecs, with and without B-frames, with many and few key frames
    Clip(name="plain.mp4", **_H264),
    Clip(name="plain.ts", **_H264),
    Clip(name="plain.avi", **_H264),
    Clip(name="plain.mpg", codec="mpeg2video", options=_BFRAMES),
    Clip(name="altref.webm", codec="libvpx", options={"auto-alt-ref": 1, "lag-in-frames": 16, "b": "200k"}),
    Clip(name="live.webm", codec="libvpx", live=True, format="webm"),
    Clip(name="plain.gif", codec="gif"),
    Clip(name="joined.ts", **_H264, after=lambda b: b + b, shown=_THIRTY * 2, seconds=_EVENLY(80)),
    Clip(name="trimmed.mp4", **_H264, after=edited((17, 31)), shown=tuple(range(17, 31))),
    Clip(name="mirrored.mp4", **_H264, after=with_matrix(-1, 0, 0, 1), turned=lambda f: f[:, ::-1]),
    Clip(name="cover.mkv", **_H264, cover=True),
    Clip(name="one-key.mp4", codec="libx264", options={"bf": 3, "b-pyramid": "strict"}, gop=250),
    Clip(name="intra.mp4", codec="libx264", gop=1),
    Clip(name="open-gop.mp4", codec="libx264", options={"bf": 2, "x264-params": "open-gop=1"}),
    Clip(name="open-gop.ts", codec="libx264", options={"bf": 2, "x264-params": "open-gop=1"}),
    Clip(name="hevc.mp4", codec="libx265", options={"x265-params": "log-level=none:keyint=12:bframes=3"}),
    Clip(name="hevc.mkv", codec="libx265", options={"x265-params": "log-level=none:keyint=12:bframes=3:open-gop=1"}),
    Clip(name="hevc.ts", codec="libx265", options={"x265-params": "log-level=none:keyint=12:bframes=3:open-gop=1"}),
    Clip(name="av1.mp4", codec="libsvtav1", options={"preset": 12}),
    Clip(name="av1.webm", codec="libsvtav1", options={"preset": 12}),
    Clip(name="mpeg4.mp4", codec="mpeg4", options=_BFRAMES),
    Clip(name="mpeg4.avi", codec="mpeg4"),
    Clip(name="packed.avi", codec="mpeg4", options=_BFRAMES),
    Clip(name="pictures.avi", codec="mjpeg"),
    Clip(name="pictures.mov", codec="mjpeg"),
    Clip(name="plain.mov", **_H264),
    Clip(name="plain.mkv", **_H264),
    Clip(name="live.mkv", **_H264, live=True, format="matroska"),
    Clip(name="mpeg2.mkv", codec="mpeg2video", options=_BFRAMES),
    Clip(name="vp9.webm", codec="libvpx-vp9", options={"auto-alt-ref": 1, "lag-in-frames": 16, "deadline": "realtime"}),
    Clip(name="vp9.mp4", codec="libvpx-vp9", options={"deadline": "realtime"}),
    Clip(name="live-vp9.webm", codec="libvpx-vp9", options={"deadline": "realtime"}, live=True, format="webm"),
    Clip(name="vp8.ogv", codec="libvpx", format="ogg"),
    Clip(name="vp8.ivf", codec="libvpx"),
    Clip(name="plain.flv", **_H264),
    Clip(name="flv1.flv", codec="flv"),
    Clip(name="mpeg2.ts", codec="mpeg2video", options=_BFRAMES),
    Clip(name="plain.m2ts", **_H264, format="mpegts", container={"mpegts_m2ts_mode": "1"}),
    Clip(name="plain.wmv", codec="wmv2", format="asf"),
    Clip(name="plain.mxf", codec="mpeg2video", options=_BFRAMES),
    Clip(name="plain.y4m", codec="rawvideo", format="yuv4mpegpipe"),
    Clip(name="pieces.mp4", **_H264, container={"movflags": "frag_keyframe+empty_moov"}),
    Clip(name="index-first.mp4", **_H264, container={"movflags": "faststart"}),
    Clip(name="plain.h264", **_H264),
    Clip(name="cut.ts", **_H264, after=lambda b: b[12 * 188 + 50 :], shown=tuple(range(11, 40))),
    Clip(name="broken-off.mkv", codec="libx264", gop=1, after=lambda b: b[: len(b) // 2], shown=tuple(range(21))),
    Clip(name="no-index.avi", codec="msmpeg4", after=lambda b: b[: b.index(b"idx1")]),
    Clip(name="hidden.webm", codec="libvpx", hidden=(5, 11, 30)),
    Clip(name="hidden.ivf", codec="libvpx", hidden=(1, 2, 38)),
    # edit lists
    Clip(name="trimmed-start.mp4", **_H264, after=edited((5, 40)), shown=tuple(range(5, 40))),
    Clip(name="trimmed-end.mp4", **_H264, after=edited((0, 20)), shown=tuple(range(20))),
    Clip(name="trimmed-intra.mp4", codec="mpeg4", after=edited((7, 30)), shown=tuple(range(7, 30))),
    Clip(
        name="two-edits.mp4", **_H264, after=edited((3, 9), (24, 36)), shown=(*range(3, 9), *range(24, 36)), seconds=_EVENLY(18)
    ),
    Clip(name="twice.mp4", codec="mpeg4", after=edited((0, 12), (0, 12)), shown=(*range(12), *range(12)), seconds=_EVENLY(24)),
    Clip(name="delayed.mp4", **_H264, after=edited((0, 40), delay=50)),
    # clocks
    Clip(name="uneven.mp4", **_H264, times=_UNEVEN),
    Clip(name="uneven.mkv", **_H264, times=_UNEVEN),
    Clip(name="uneven.webm", codec="libvpx", times=_UNEVEN),
    Clip(name="uneven.flv", codec="libx264", times=_UNEVEN),
    Clip(name="late.mp4", **_H264, times=tuple(40 * n + 7000 for n in range(40))),
    Clip(name="late.ts", **_H264, times=tuple(40 * n + 70000 for n in range(40))),
    Clip(name="late.mkv", codec="libx264", times=tuple(40 * n + 7000 for n in range(40))),
    Clip(name="joined.mpg", codec="mpeg2video", after=lambda b: b + b, shown=_THIRTY * 2, seconds=_EVENLY(80)),
    Clip(name="joined-three.ts", codec="mpeg2video", after=lambda b: b * 3, shown=_THIRTY * 3, seconds=_EVENLY(120)),
    # ways up
    Clip(name="turned-90.mp4", **_H264, after=with_matrix(0, 1, -1, 0), turned=lambda f: np.rot90(f, -1)),
    Clip(name="turned-180.mp4", **_H264, after=with_matrix(-1, 0, 0, -1), turned=lambda f: f[::-1, ::-1]),
    Clip(name="turned-270.mp4", **_H264, after=with_matrix(0, -1, 1, 0), turned=lambda f: np.rot90(f)),
    Clip(name="upside-down.mp4", **_H264, after=with_matrix(1, 0, 0, -1), turned=lambda f: f[::-1]),
    Clip(name="transposed.mp4", **_H264, after=with_matrix(0, 1, 1, 0), turned=lambda f: f.transpose(1, 0, 2)),
    Clip(
        name="transversed.mp4",
        **_H264,
        after=with_matrix(0, -1, -1, 0),
        turned=lambda f: f[::-1, ::-1].transpose(1, 0, 2),
    ),
]
QUICK = 11
