"""What a video may cost, which library reads it, and what happens where one of them cannot."""

import contextlib
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from smolvlm_jax.errors import MediaError
from smolvlm_jax.processing import MediaLimits, decode, work
from smolvlm_jax.processing.decode import decode_video
from smolvlm_jax.processing.work import LimitError, RefusedError, Work

from .conftest import need
from .video_matrix import HEIGHT, WIDTH, Clip, number_of

FRAME = WIDTH * HEIGHT
LAST = lambda metadata: np.array([metadata.total_num_frames - 1])


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    return {
        "near keys": Clip(name="near.mp4", codec="libx264", gop=4).write(folder),
        "one key": Clip(name="far.mp4", codec="libx264", gop=250).write(folder),
        "stream": Clip(name="stream.ts", codec="libx264", gop=250).write(folder),
    }


def test_the_budget_is_work(clips):
    """Frames that have to be decoded count, wanted or not; those that nothing depends on do not."""
    few = MediaLimits(max_decoded_pixels=10 * FRAME)
    frames, _ = decode_video(clips["near keys"], LAST, limits=few)
    assert number_of(frames[0]) == 39
    for name in ("one key", "stream"):
        with pytest.raises(MediaError, match=r"(far.mp4|stream.ts).*pixels to decode.*max_decoded_pixels"):
            decode_video(clips[name], LAST, limits=few)
        decode_video(clips[name], LAST, limits=MediaLimits(max_decoded_pixels=50 * FRAME))


def test_a_slow_decoder_that_gets_on_says_so(monkeypatch):
    """A clock that runs a thousand times too fast changes nothing but how often it says so."""
    now, reports = [0.0], []
    monkeypatch.setattr(work.time, "monotonic", lambda: now[0])
    counted = Work(max_pixels=FRAME, max_decoded_pixels=100 * FRAME, report=lambda: reports.append(now[0]))
    for _ in range(100):
        now[0] += 50
        counted.packet()
        counted.frame(WIDTH, HEIGHT)
    assert len(reports) == 100
    with pytest.raises(LimitError):
        counted.frame(WIDTH, HEIGHT)
    with pytest.raises(LimitError, match="65×48"):
        counted.frame(WIDTH + 1, HEIGHT)


def test_one_library_stands_in_for_the_other(clips, monkeypatch):
    """In both directions; what exceeds a limit or is damaged is not tried again, and the error is that of the first."""
    need("decord"), need("pyav")
    true, tried = decode._reader, []

    def broken(*names, error=MediaError):
        def reader(name, *arguments, **options):
            tried.append(name)
            if name in names:
                raise error(f"{name} cannot")
            return true(name, *arguments, **options)

        monkeypatch.setattr(decode, "_reader", reader)

    for name, other in (("pyav", "decord"), ("decord", "pyav")):
        broken(name)
        frames, metadata = decode_video(clips["one key"], backend=name)
        assert metadata.video_backend == other and [number_of(frame) for frame in frames] == list(range(40))
    broken("pyav", "decord")
    with pytest.raises(MediaError, match=r"far.mp4.*pyav cannot"):
        decode_video(clips["one key"])
    tried.clear()
    for error in (LimitError, RefusedError):
        broken("pyav", error=error)
        with pytest.raises(MediaError, match="pyav cannot"):
            decode_video(clips["one key"])
    assert tried == ["pyav", "pyav"]


def test_decord_alone(clips, monkeypatch):
    """Without PyAV it reads in order from the first frame, and refuses what it is known to read wrongly."""
    need("decord")
    monkeypatch.setattr(decode, "_installed", lambda name: name == "decord")
    frames, metadata = decode_video(clips["one key"], lambda m: np.array([3, 30, 12]))
    assert [number_of(frame) for frame in frames] == [3, 30, 12] and metadata.video_backend == "decord"
    assert np.allclose(metadata.frames_seconds, [0.12, 1.2, 0.48], atol=1e-3)
    with pytest.raises(MediaError, match=r"stream.ts.*pip install 'smolvlm-jax\[pyav\]'"):
        decode_video(clips["stream"])


def test_frames_in_any_order(clips):
    for name in ("near keys", "stream"):
        wanted = [30, 2, 2, 39, 0, 30]
        frames, metadata = decode_video(clips[name], lambda m, wanted=wanted: np.array(wanted))
        assert [number_of(frame) for frame in frames] == metadata.frames_indices == wanted
    assert decode_video(clips["stream"], lambda m: np.array([], int))[0] == []
    with pytest.raises(MediaError, match="40 frames"):
        decode_video(clips["stream"], lambda m: np.array([40]))


@pytest.mark.parametrize("seed", range(4))
def test_damaged_videos_are_as_a_player_shows_them(seed, tmp_path):
    """Frames that are missing, and frames that look as they do because of those before them."""
    av = pytest.importorskip("av", reason="the reference decodes with PyAV")
    rng = np.random.default_rng(seed)
    path = Clip(name=("a.mp4", "a.ts", "a.mkv", "a.wmv")[seed], codec="mpeg4", gop=8).write(tmp_path)
    content = np.fromfile(path, np.uint8)
    content[rng.integers(len(content) // 4, 3 * len(content) // 4, 12)] ^= 0x5A
    content.tofile(path)
    truth = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            with contextlib.suppress(av.FFmpegError):
                truth += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
    for choose in (lambda m: np.arange(m.total_num_frames), lambda m: np.arange(3, m.total_num_frames, 9)):
        frames, metadata = decode_video(path, choose)
        assert metadata.total_num_frames == len(truth)
        assert all(np.array_equal(frame, truth[i]) for i, frame in zip(metadata.frames_indices, frames, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process that hangs in C")
def test_a_hung_decoder_ends_with_a_killed_process(clips, tmp_path):
    """The library hangs in C, with the interpreter's lock, in a helper of a process that is killed."""
    psutil = pytest.importorskip("psutil", reason="finds the helper: pip install 'smolvlm-jax[test]'")
    (tmp_path / "av.py").write_text("import ctypes; ctypes.PyDLL(None).sleep(1000)\n")
    code = f"from smolvlm_jax.processing.decode import decode_video; decode_video({str(clips['one key'])!r}, backend='pyav')"
    paths = [str(tmp_path), *filter(None, sys.path)]
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
    helpers, deadline = [], time.monotonic() + 60
    while not helpers and time.monotonic() < deadline:
        time.sleep(0.05)
        helpers = psutil.Process(process.pid).children(recursive=True)
    time.sleep(1)  # until it hangs
    process.kill()
    process.wait()
    assert helpers and not psutil.wait_procs(helpers, timeout=20)[1]
