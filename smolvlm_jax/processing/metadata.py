"""What is known about a video besides its pixels."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import InputError


@dataclass
class VideoMetadata(Mapping[str, Any]):
    """What is known about a video. A mapping as well as an object: metadata["fps"] is metadata.fps.

    Attributes:
        total_num_frames: frames of the source.
        fps: its (average) rate, frames per second.
        width: in pixels.
        height: in pixels.
        duration: in seconds.
        video_backend: the library that decoded it.
        frames_indices: which of the source's frames were kept.
        frames_seconds: when each of them is presented, in seconds from the first frame of the source. For a constant rate these
            are `timestamps`; for a variable one the prompt has `timestamps`, as in the reference.
    """

    total_num_frames: int
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    duration: float | None = None
    video_backend: str | None = None
    frames_indices: list[int] | None = None
    frames_seconds: list[float] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))

    def __getitem__(self, name: str) -> Any:
        return vars(self)[name]

    @property
    def timestamps(self) -> list[float]:
        """Seconds of each kept frame, which is its index / fps. Raises InputError where either is not known."""
        if self.fps is None or self.frames_indices is None:
            raise InputError("the times of a video's frames need its fps and frames_indices; pass them in its video_metadata")
        return [index / self.fps for index in self.frames_indices]


def to_metadata(value: Any) -> VideoMetadata:
    """A new VideoMetadata from a mapping, or from an object with such attributes.

    Raises:
        InputError: a key is unknown, or total_num_frames is missing.
    """
    names = [field.name for field in fields(VideoMetadata)]
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - set(names))
        if unknown:
            raise InputError(f"video_metadata has the unknown keys {unknown}; it has {names}")
        found = dict(value)
    else:
        found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    if found.get("total_num_frames") is None:
        raise InputError("video_metadata needs total_num_frames")
    return VideoMetadata(**found)
