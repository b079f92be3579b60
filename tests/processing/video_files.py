"""Small video files for tests, written with PyAV: constant and variable rates, one frame, turned by a flag."""

import struct
from fractions import Fraction
from pathlib import Path

import pytest


def write_video(path: Path, frames, rate=25, codec="mpeg4", times=None) -> Path:
    """frames: uint8 (h, w, 3) with even sides. times: milliseconds of each frame, for a variable rate."""
    av = pytest.importorskip("av", reason="writes its videos with PyAV: pip install 'smolvlm-jax[pyav]'")
    if codec not in av.codecs_available:
        codec = "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(source: Path, target: Path, degrees: int) -> Path:
    """A copy of an mp4 whose track says that it is to be shown turned by 90, 180 or 270 degrees clockwise."""
    content = bytearray(source.read_bytes())
    place = content.index(b"tkhd") + 4
    place += 4 + (32 if content[place] == 1 else 20) + 16
    one = 1 << 16
    a, b, c, d = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(content)
    return target
