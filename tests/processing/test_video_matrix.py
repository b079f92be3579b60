"""Containers × codecs × key frames × B-frames × edit lists × joins × turns × clocks, by both backends: index i is the i-th
frame that a player presents, at its time, bit-equal to what decoding everything from the start gives."""

import sys
from itertools import pairwise

import numpy as np
import pytest
from tiers import fast_first

from smolvlm_jax.processing.decode import decode_video

from .conftest import need
from .video_matrix import CLIPS, QUICK, RATE, number_of

SAMPLINGS = {
    "all": lambda total: np.arange(total),
    "spread": lambda total: np.unique(np.linspace(0, total - 1, 7, dtype=int)),
    "scattered": lambda total: np.unique([1, total // 3, total // 3 + 1, 2 * total // 3, total - 1]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


def decoded_serially(path, clip):
    """Every frame, by the shortest program there is."""
    import av

    with av.open(str(path)) as container:
        film = container.streams.video[-1]  # a cover picture stands before it
        return [np.ascontiguousarray(clip.turned(frame.to_ndarray(format="rgb24"))) for frame in container.decode(film)]


@pytest.mark.parametrize("clip", fast_first(QUICK, CLIPS), ids=lambda clip: clip.name)
def test_frames_and_times(clip, folder):
    path = clip.write(folder)
    numbers, seconds = clip.numbers(), clip.presented()
    assert all(a < b for a, b in pairwise(seconds))
    truth = decoded_serially(path, clip)
    assert len(truth) == len(numbers), "the clip is not what its description says"
    for backend in ("pyav", "decord"):
        need(backend)
        for name, choose in SAMPLINGS.items():
            where = f"{clip.name} {backend} {name}"
            frames, metadata = decode_video(path, lambda m, choose=choose: choose(m.total_num_frames), backend=backend)
            assert metadata.total_num_frames == len(numbers), where
            assert metadata.frames_indices == choose(len(numbers)).tolist(), where
            for index, frame, time in zip(metadata.frames_indices, frames, metadata.frames_seconds, strict=True):
                assert np.array_equal(frame, truth[index]), f"{where}: frame {index}"
                assert abs(time - seconds[index]) < 2e-3, f"{where}: frame {index} at {time}, not {seconds[index]}"
            if not clip.uneven:
                assert np.allclose(metadata.timestamps, metadata.frames_seconds, atol=0.5 / RATE), f"{where}: {metadata.fps}"
            if clip.turned is CLIPS[0].turned:
                assert [number_of(frame) for frame in frames] == [numbers[i] for i in metadata.frames_indices], where


def test_there_are_enough_of_them():
    assert len(CLIPS) >= 30 and len({clip.name for clip in CLIPS}) == len(CLIPS)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-m", ""]))
