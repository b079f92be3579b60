"""Golden cases G22–G24: frames chosen exactly, pixels within 3/255 of the reference's."""

import numpy as np
import pytest
from PIL import Image

from smolvlm_jax.errors import InputError
from smolvlm_jax.processing import VideoMetadata
from smolvlm_jax.processing.decode import decode_video

from .conftest import need, sha, tri_video


class _Thing:
    """Metadata as an object of a foreign class."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


@pytest.mark.parametrize("form", [dict, VideoMetadata, _Thing])
def test_sampling(golden, small_video, form):
    for case in golden["G22_frame_sampling"]:
        metadata = form(total_num_frames=case["total"], fps=case["fps"], duration=case["duration"])
        found = small_video.sample_frames(
            metadata, num_frames=case["num_frames"], fps=case["target_fps"], skip_secs=case["skip_secs"]
        )
        assert found.tolist() == case["indices"], case


def test_pixels(golden, golden_arrays, small_video):
    video = tri_video(4, 36, 64)
    inputs = {
        "chan_last": video,
        "chan_first": video.transpose(0, 3, 1, 2).copy(),
        "pil_frames": [Image.fromarray(frame) for frame in video],
    }
    outputs = {name: small_video(value, return_tensors="np") for name, value in inputs.items()}
    expected = golden_arrays["G23_pixel_values"]
    for name, out in outputs.items():
        wanted = golden["G23_video_pixels"][name]
        assert list(out["pixel_values"].shape) == wanted["pixel_values"]["shape"]
        assert out["pixel_values"].dtype == np.float32
        assert np.abs(out["pixel_values"] - expected).max() <= 3 / 127.5
        mask = out["pixel_attention_mask"]
        assert mask.dtype == np.int64 and sha(mask) == wanted["mask"]["sha256"]
    for name, value in (("odd", tri_video(3, 37, 90)), ("portrait", tri_video(2, 64, 36))):
        out, wanted = small_video(value), golden["G23_video_pixels"][name]
        assert list(out["pixel_values"].shape) == wanted["pixel_values"]["shape"]
        assert abs(float(out["pixel_values"].mean(dtype=np.float64)) - wanted["pixel_values"]["mean"]) < 1e-3


def test_pixels_are_lanczos_twice(small_video):
    """Two Pillow passes, uint8 between them, and the same table as for pictures."""
    for shape in ((4, 36, 64), (3, 37, 90), (2, 64, 36)):
        video = tri_video(*shape)
        height, width = (64, 36) if shape[1] > shape[2] else ({36: 36, 37: 26}[shape[1]], 64)
        for frame, got in zip(video, small_video(video, pixel_format="uint8")["pixel_values"], strict=True):
            first = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
            assert np.array_equal(np.asarray(first.resize((32, 32), Image.Resampling.LANCZOS)), got)


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_file(golden, data, small_video, backend):
    need(backend)

    def choose(metadata):
        return small_video.sample_frames(metadata, num_frames=64, fps=1)

    frames, metadata = decode_video(data / "clip.avi", choose, backend=backend)
    wanted = golden["G24_decord_file"]
    assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (wanted["total"], wanted["fps"], wanted["duration"])
    assert metadata.frames_indices == wanted["indices"]
    assert metadata.timestamps == wanted["timestamps"]
    assert metadata.video_backend == backend and (metadata.height, metadata.width) == (48, 64)
    frames = np.stack(frames)
    assert list(frames.shape) == wanted["frames"]["shape"]
    assert sha(frames) == wanted["frames"]["sha256"]


def test_sampling_needs_metadata(small_video):
    for metadata in (None, {"total_num_frames": 5, "duration": 1.0}, {"total_num_frames": 5, "fps": 5.0}):
        with pytest.raises(InputError):
            small_video.sample_frames(metadata, num_frames=4, fps=1)
    with pytest.raises(InputError, match="metadata"):
        small_video(tri_video(3, 36, 64), do_sample_frames=True)
