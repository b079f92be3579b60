"""Videos whose times or sizes are not those that their first packets suggest, from both back ends."""

from fractions import Fraction

import numpy as np
import pytest

from smolvlm_jax.processing.decode import decode_video

from .conftest import need

pytestmark = pytest.mark.thorough
av = pytest.importorskip("av", reason="writes its videos with PyAV: pip install 'smolvlm-jax[pyav]'")


def encode(codec, number: int, time: int, size=(64, 48), last: bool = False):
    """The packets of a grey picture at a time in ticks."""
    frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), number * 15, np.uint8), format="rgb24")
    frame = frame.reformat(format="yuv420p")
    frame.pts, frame.time_base = time, Fraction(codec.time_base)
    return [*codec.encode(frame), *(codec.encode(None) if last else ())]


def write(path, codec: str, times, rate: int = 10, **options):
    """One stream with frames at these ticks of 1 / rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base, stream.bit_rate = Fraction(1, rate), 10**7
        for number, time in enumerate(times):
            container.mux(encode(stream.codec_context, number, time, last=number == len(times) - 1))
    return path


GAPS = [0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 20, 21, 22, 23, 24]


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("codec", "bf"), [("mpeg4", "2"), ("mpeg4", "0"), ("libx264", "2"), ("libx264", "3"), ("mpeg2video", "2")]
)
def test_frames_that_avi_leaves_out(tmp_path, codec, bf, backend):
    """AVI has times of decoding only, and FFmpeg knows of some frames alone that they are presented then."""
    need(backend)
    path = write(tmp_path / "a.avi", codec, GAPS, bf=bf)
    frames, metadata = decode_video(path, backend=backend)
    assert np.allclose(metadata.frames_seconds, np.array(GAPS) / 10)
    assert [round(float(frame.mean()) / 15) for frame in frames] == list(range(16))


@pytest.mark.parametrize("rate", [25, 50])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video"])
def test_the_rate_of_few_frames(tmp_path, codec, count, rate):
    _, metadata = decode_video(write(tmp_path / "a.mpg", codec, range(count), rate))
    assert metadata.fps == rate and np.allclose(metadata.frames_seconds, np.arange(count) / rate)
    assert metadata.duration == pytest.approx(count / rate)


SIZES = [("libvpx", "webm"), ("libvpx-vp9", "webm"), ("libvpx", "avi"), ("mpeg4", "avi"), ("libx264", "mkv")]


@pytest.mark.parametrize(("codec", "ending"), SIZES)
def test_a_video_that_changes_its_size(tmp_path, codec, ending):
    """decord would shrink what follows to the first size."""
    need("decord")
    path, sizes = tmp_path / f"a.{ending}", [(64, 48), (96, 80)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuv420p"
        stream.codec_context.open()
        for part, size in enumerate(sizes):
            encoder = av.CodecContext.create(codec, "w")
            encoder.width, encoder.height, encoder.pix_fmt = *size, "yuv420p"
            encoder.time_base, encoder.framerate = Fraction(1, 10), Fraction(10)
            for number in range(8 * part, 8 * part + 8):
                for packet in encode(encoder, number, number, size, last=number % 8 == 7):
                    packet.stream, packet.time_base = stream, Fraction(1, 10)
                    container.mux(packet)
    for backend in ("pyav", "decord"):
        frames, _ = decode_video(path, backend=backend)
        assert [frame.shape[:2] for frame in frames] == [(48, 64)] * 8 + [(80, 96)] * 8
        assert [round(float(frame.mean()) / 15) for frame in frames] == list(range(16))
