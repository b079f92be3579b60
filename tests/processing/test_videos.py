"""Videos: two decoders that agree, unusual files, and frames in every form."""

import hashlib
import os
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from smolvlm_jax.errors import InputError, MediaError, MissingExtraError
from smolvlm_jax.processing import MediaLimits, SmolVLMVideoProcessor, VideoMetadata, decode, isolation
from smolvlm_jax.processing.decode import choose_backend, decode_video
from smolvlm_jax.processing.prompts import _notice_rate

from .conftest import need, tri_video
from .video_files import turn, write_video


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """name → path of small videos with the frames of tri_video(n, 48, 64)."""
    folder = tmp_path_factory.mktemp("clips")
    frames = tri_video(40, 48, 64)
    times = np.cumsum(np.random.default_rng(0).integers(20, 120, 40)).tolist()
    paths = {
        "constant": write_video(folder / "constant.mp4", frames, codec="libx264"),
        "mpeg4": write_video(folder / "mpeg4.mp4", frames),
        "webm": write_video(folder / "webm.webm", frames, codec="libvpx-vp9"),
        "variable": write_video(folder / "variable.mp4", frames, codec="libx264", times=times),
        "variable mkv": write_video(folder / "variable.mkv", frames, codec="libx264", times=times),
        "one frame": write_video(folder / "one.mp4", frames[:1], codec="libx264"),
        "odd size": write_video(folder / "odd.mp4", tri_video(5, 38, 50), codec="libx264"),
        "odd sides": write_video(folder / "odd.avi", tri_video(9, 47, 65)),
    }
    for degrees in (90, 180, 270):
        paths[f"turned {degrees}"] = turn(paths["constant"], folder / f"turned{degrees}.mp4", degrees)
    return paths


def spread(metadata):
    return np.unique(np.linspace(0, metadata.total_num_frames - 1, 7, dtype=int))


def test_backends_agree(clips, data):
    """decord and PyAV give the same frames, rates and numbers, turned and variable files included."""
    need("decord"), need("pyav")
    for name, path in {**clips, "avi": data / "clip.avi"}.items():
        (one, first), (two, second) = (decode_video(path, spread, backend=backend) for backend in ("decord", "pyav"))
        assert len(one) == len(two) and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True)), name
        first.video_backend = second.video_backend = None
        assert first == second, name


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_clocks_that_are_coarse_or_have_gaps(backend, tmp_path):
    """Frames that share a millisecond, and an AVI whose clock goes on where frames were left out, keep their times."""
    need(backend)
    frames = tri_video(20, 48, 64)
    _, fast = decode_video(write_video(tmp_path / "fast.mkv", frames, rate=2500), backend=backend)
    assert np.allclose(fast.frames_seconds, np.arange(20) / 2500, atol=1.1e-3) and fast.duration < 0.02
    gap = [40 * n + (400 if n > 9 else 0) for n in range(20)]
    for codec in ("mpeg4", "libx264"):
        _, gone_on = decode_video(write_video(tmp_path / f"{codec}.avi", frames, codec=codec, times=gap), backend=backend)
        assert np.allclose(np.sort(np.diff(gone_on.frames_seconds)), np.sort(np.diff(gap)) / 1000, atol=2e-3), codec


def test_pyav_reads_on_where_decord_fails(tmp_path):
    """Key frames that are not marked: decord gives up only when it is asked for frames."""
    need("decord"), need("pyav")
    import av

    source, path = write_video(tmp_path / "a.mkv", tri_video(20, 48, 64), codec="libx264"), tmp_path / "unmarked.mkv"
    with av.open(str(source)) as given, av.open(str(path), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream, packet.is_keyframe = stream, False
                made.mux(packet)
    (one, _), (two, _) = (decode_video(path, backend=backend) for backend in ("decord", "pyav"))
    assert len(one) == 20 and np.array_equal(one, two)


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_isolated_is_in_process(clips, backend):
    """In a process of its own, since two libraries with an FFmpeg each conflict in one process."""
    need(backend)
    code = (
        "import sys, hashlib; from smolvlm_jax.processing import MediaLimits; "
        "from smolvlm_jax.processing.decode import decode_video\n"
        "for path in sys.argv[2:]:\n"
        "    frames, metadata = decode_video(path, backend=sys.argv[1], limits=MediaLimits(isolate=False))\n"
        "    print(metadata.fps, metadata.frames_indices, *(hashlib.sha1(frame).hexdigest() for frame in frames))"
    )
    paths = [str(clips[name]) for name in ("constant", "turned 90", "variable")]
    found = subprocess.run([sys.executable, "-c", code, backend, *paths], capture_output=True, text=True, check=True)
    wanted = ""
    for path in paths:
        frames, metadata = decode_video(path, backend=backend)
        digests = (hashlib.sha1(frame).hexdigest() for frame in frames)
        wanted += " ".join([str(metadata.fps), str(metadata.frames_indices), *digests]) + "\n"
    assert found.stdout == wanted


def test_upright(clips):
    """The rotation flag is applied, so that a frame is as a player shows it."""
    plain = decode_video(clips["constant"], spread)[0][3]
    for degrees in (90, 180, 270):
        frames, metadata = decode_video(clips[f"turned {degrees}"], spread)
        assert np.array_equal(frames[3], np.rot90(plain, -degrees // 90))
        assert (metadata.height, metadata.width) == frames[3].shape[:2]


def test_right_frames(clips):
    """Frame i is the i-th of the source, wherever the key frames are."""
    source = tri_video(40, 48, 64).astype(int)
    frames, metadata = decode_video(clips["webm"], lambda m: np.array([0, 13, 14, 39]))
    for index, frame in zip(metadata.frames_indices, frames, strict=True):
        distances = [np.abs(frame - other).mean() for other in source]
        assert int(np.argmin(distances)) == index


def test_timestamps_are_source_index_over_source_rate(clips):
    """A variable rate included."""
    for name in ("constant", "variable"):
        _, metadata = decode_video(clips[name], spread)
        assert metadata.timestamps == [index / metadata.fps for index in spread(metadata)]
        assert metadata.duration == metadata.total_num_frames / metadata.fps
    assert metadata.fps != 25 and abs(metadata.duration - 2.75) < 0.3  # 40 frames, 70 ms apart on average


def test_one_frame(clips, processor):
    content = [{"type": "video", "path": str(clips["one frame"])}, {"type": "text", "text": "Q?"}]
    out = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="np"
    )
    assert out["pixel_values"].shape == (1, 1, 3, 32, 32)
    assert "series of one frames from a 0:00:00" in processor.decode(out["input_ids"][0])


def test_fifteen_and_sixteen_frames(small_video):
    """Videos of different lengths make one batch; the padding is zero and not counted."""
    videos = [tri_video(15, 36, 64), tri_video(16, 36, 64)]
    out = small_video(videos, return_tensors="np")
    assert out["pixel_values"].shape == (2, 16, 3, 32, 32) and out["pixel_attention_mask"].all()
    assert not out["pixel_values"][0, 15].any() and out["pixel_values"][0, 14].any()
    flat = small_video(videos, pixel_format="uint8")
    assert flat["num_tiles"] == 31 == len(flat["pixel_values"])


def test_words_count_padding(processor):
    """As the reference writes it: both videos say sixteen, and list the frames they have."""
    videos = [tri_video(15, 36, 64), tri_video(16, 36, 64)]
    out = processor(videos=[videos], text=["<video>A<video>B"], return_tensors="np")
    text = processor.decode(out["input_ids"][0])
    assert text.count("sixteen frames") == 2 and text.count("Frame from") == 31


def test_memory_is_what_is_kept(tmp_path, small_video):
    """Of a long file with large frames only the chosen ones are held in memory, as tiles."""
    path = write_video(tmp_path / "large.mp4", [np.full((720, 1280, 3), 9 * n % 256, np.uint8) for n in range(60)])
    tracemalloc.start()
    out = small_video(path, do_sample_frames=True, num_frames=60, fps=60, pixel_format="uint8")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert out["num_tiles"] == 60
    assert peak < 6 * 720 * 1280 * 3  # one frame here and there, not sixty


def test_ten_hours(small_video, tmp_path):
    total, rate = 36_000 * 30, 30.0
    found = small_video.sample_frames({"total_num_frames": total, "fps": rate, "duration": total / rate}, 64, 1)
    assert len(found) == 64 and found[0] == 30 and found[-1] == total - 30
    # and a file: ten hours at a frame a second
    path = write_mjpeg(tmp_path / "ten-hours.avi", tri_video(1, 16, 16)[0], 36_000)
    out = small_video(path, do_sample_frames=True, return_metadata=True)
    (metadata,) = out["video_metadata"]
    assert metadata.duration == 36_000 and out["pixel_values"].shape == (1, 64, 3, 32, 32)
    assert metadata.timestamps[-1] == 35_999


def write_mjpeg(path, frame, count):
    """An AVI of the same picture, once a second."""
    import io
    import struct

    jpeg = io.BytesIO()
    Image.fromarray(frame).save(jpeg, "JPEG")
    jpeg = jpeg.getvalue() + b"\0" * (len(jpeg.getvalue()) % 2)
    height, width = frame.shape[:2]

    def chunk(name, content):
        return name + struct.pack("<I", len(content)) + content

    header = struct.pack("<14I", 10**6, 0, 0, 16, count, 0, 1, len(jpeg), width, height, 0, 0, 0, 0)
    numbers = (0, 0, 0, 0, 1, 1, 0, count, len(jpeg), 2**32 - 1, 0, 0, 0, width, height)
    stream = b"vidsMJPG" + struct.pack("<IHHIIIIIIIIHHHH", *numbers)
    form = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", width * height * 3, 0, 0, 0, 0)
    lists = chunk(b"avih", header) + chunk(b"LIST", b"strl" + chunk(b"strh", stream) + chunk(b"strf", form))
    frames = chunk(b"00dc", jpeg) * count
    index = b"".join(b"00dc" + struct.pack("<III", 16, 4 + n * (len(jpeg) + 8), len(jpeg)) for n in range(count))
    body = b"AVI " + chunk(b"LIST", b"hdrl" + lists) + chunk(b"LIST", b"movi" + frames) + chunk(b"idx1", index)
    path.write_bytes(chunk(b"RIFF", body))
    return path


def test_too_many_frames(clips):
    with pytest.raises(MediaError, match=r"40 frames.*limit of 10.*do_sample_frames"):
        SmolVLMVideoProcessor(limits=MediaLimits(max_frames=10))(str(clips["constant"]))
    with pytest.raises(MediaError, match=r"constant.mp4.*64×48.*limit"):
        SmolVLMVideoProcessor(limits=MediaLimits(max_pixels=100))(str(clips["constant"]))


def test_containers(small_video, clips):
    """Every nesting of the reference: arrays, lists of frames, of paths, of frame paths."""
    video = tri_video(4, 36, 64)
    pixels = small_video(video)["pixel_values"]
    frames = [Image.fromarray(frame) for frame in video]
    for same in (video[None], [video], [[video]], list(video), [list(video)], frames, [frames], tuple(frames)):
        assert np.array_equal(small_video(same)["pixel_values"], pixels)
    assert small_video(frames[0])["pixel_values"].shape[:2] == small_video(video[0])["pixel_values"].shape[:2] == (1, 1)
    path = str(clips["odd size"])
    once = small_video(path)["pixel_values"]
    assert np.array_equal(small_video([[path], [path]])["pixel_values"], np.concatenate([once, once]))
    mixed = small_video([path, video, frames])
    assert mixed["pixel_values"].shape == (3, 5, 3, 32, 32)


def test_frame_paths(small_video, tmp_path):
    video = tri_video(3, 36, 64)
    paths = []
    for number, frame in enumerate(video):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(frame).save(paths[-1])
    assert np.array_equal(small_video([[paths]])["pixel_values"], small_video(video)["pixel_values"])
    with pytest.raises(InputError, match="do_sample_frames=False"):
        small_video([[paths]], do_sample_frames=True)


@pytest.mark.parametrize(
    "video",
    [
        np.zeros((4, 36, 64), np.float32)[..., None].repeat(3, -1),  # not uint8
        np.zeros((4, 36, 64, 2), np.uint8),
        [np.zeros((36, 64), np.uint8)] * 2,
        [Image.new("L", (64, 36))] * 2,
        [Image.new("LA", (64, 36)), Image.new("L", (64, 36))],
        [Image.new("RGB", (64, 36)), Image.new("RGB", (60, 36))],
        np.zeros((0, 36, 64, 3), np.uint8),
        np.zeros((2, 3), np.uint8),
        [np.zeros((36, 64, 3), np.uint8), np.zeros((4, 36, 64, 3), np.uint8)],
        7,
    ],
)
def test_refused(small_video, video):
    with pytest.raises(InputError):
        small_video(video)


def test_metadata(small_video, processor):
    video = tri_video(12, 36, 64)
    meta = {"total_num_frames": 12, "fps": 4.0, "duration": 3.0}
    (found,) = small_video(video, video_metadata=meta, return_metadata=True)["video_metadata"]
    assert found.frames_indices == list(range(12)) and (found.height, found.width) == (36, 64) and dict(found)["fps"] == 4
    mine = VideoMetadata(**meta)
    out = small_video([video], video_metadata=[[mine]], do_sample_frames=True, return_metadata=True)
    assert out["video_metadata"][0].timestamps == [0.0, 1.25, 2.75] and mine.frames_indices is None
    # frames that were chosen already, from a source of another length: their indices have to be given
    with pytest.raises(InputError, match=r"frames_indices"):
        processor(text="<video>", videos=video[:3], video_metadata=meta)
    chosen = {**meta, "frames_indices": [0, 5, 11]}
    text = processor.decode(processor(text="<video>", videos=video[:3], video_metadata=chosen)["input_ids"][0])
    assert "three frames from a 0:00:03" in text and "00:02" in text
    for wrong in ([meta, meta], {**meta, "fsp": 1}, {"fps": 4.0}, {**meta, "frames_indices": [0]}):
        with pytest.raises(InputError):
            small_video(video, video_metadata=wrong)
    with pytest.raises(InputError, match="12 frames"):
        small_video(video[:4], video_metadata=meta, do_sample_frames=True)


def test_rate_unknown(processor, caplog):
    """The reference assumes 24 frames a second; so do we, with a warning, and a switch refuses such videos."""
    video = tri_video(3, 36, 64)
    _notice_rate.cache_clear()  # said once in a process
    processor(text="<video>", videos=video)
    processor(text="<video>", videos=video)
    assert caplog.text.count("24 frames a second") == 1
    try:
        processor.default_fps = None
        with pytest.raises(InputError, match="fps"):
            processor(text="<video>", videos=video)
    finally:
        processor.default_fps = 24


def test_video_size_is_overridden_by_size():
    """As in the reference; a switch takes the size that the checkpoint names."""
    sampling = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}}
    files = {"size": {"longest_edge": 2048}, "video_sampling": sampling}
    assert SmolVLMVideoProcessor(**files).size == {"longest_edge": 2048}
    assert SmolVLMVideoProcessor(**files, use_video_size=True).size == {"longest_edge": 512}
    assert SmolVLMVideoProcessor(video_sampling=files["video_sampling"]).size == {"longest_edge": 512}
    assert (SmolVLMVideoProcessor(**files).num_frames, SmolVLMVideoProcessor(**files).fps) == (64, 1)
    assert SmolVLMVideoProcessor().num_frames is None


@pytest.mark.skipif(not isolation.AVAILABLE, reason="no helper processes on this system")
@pytest.mark.parametrize(("how", "why"), [(signal.SIGKILL, "crashed"), (signal.SIGSTOP, "did not answer within")])
def test_crash_and_hang_of_the_decoder(clips, monkeypatch, how, why):
    """What kills or stops a helper is an error, and the next video is decoded nevertheless."""
    busy = []
    true_take = isolation._take

    def take(backend):
        busy.append(true_take(backend))
        return busy[-1]

    def disturb(metadata):
        os.kill(busy[0]._process.pid, how)
        return np.arange(3)

    with monkeypatch.context() as patch, pytest.raises(MediaError, match=rf"constant.mp4.*{why}"):
        patch.setattr(isolation, "_take", take)
        decode_video(clips["constant"], disturb, limits=MediaLimits(decode_seconds=0.5))
    assert not busy[0].alive()
    frames, _ = decode_video(clips["constant"], spread)
    assert len(frames) == 7


def test_missing_backends(monkeypatch):
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None)
    for backend in (None, "decord", "pyav"):
        with pytest.raises(MissingExtraError, match=r"pip install 'smolvlm-jax\[pyav\]'"):
            choose_backend(backend)
    with pytest.raises(InputError, match="decord, pyav"):
        choose_backend("opencv")


def test_nothing_heavy_at_import():
    """No jax, no decoder, no tokenizer library and no urllib until one is needed."""
    heavy = ["jax", "flax", "torch", "transformers", "decord", "av", "tokenizers", "jinja2", "urllib.request", "num2words"]
    code = f"import sys, smolvlm_jax.processing; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
