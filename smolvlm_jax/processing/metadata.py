"""What is known about a video besides its pixels."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..errors import InputError


@dataclass
class VideoMetadata(Mapping):
    """total_num_frames: frames of the source. fps: its (average) rate. width, height: in pixels. duration: seconds.
    video_backend: what decoded it. frames_indices: which of the source's frames were kept.

    A mapping as well as an object: metadata["fps"] is metadata.fps.
    """

    total_num_frames: int
    fps: float | None = None
    width: int | None = None
    height: int | None = None
    duration: float | None = None
    video_backend: str | None = None
    frames_indices: list[int] | None = None

    def __iter__(self):
        return (field.name for field in fields(self))

    def __len__(self):
        return len(fields(self))

    def __getitem__(self, name):
        if name not in {field.name for field in fields(self)}:
            raise KeyError(name)
        return getattr(self, name)

    @property
    def timestamps(self) -> list[float]:
        """Seconds of each kept frame: source index / source rate."""
        if self.fps is None or self.frames_indices is None:
            raise InputError("timestamps need the fps and the frames_indices of the video's metadata")
        return [index / self.fps for index in self.frames_indices]


def to_metadata(value) -> VideoMetadata:
    """A VideoMetadata of our own from a mapping or an object with such attributes; the caller's is left alone."""
    names = [field.name for field in fields(VideoMetadata)]
    if isinstance(value, Mapping):
        unknown = set(value) - set(names)
        if unknown:
            raise InputError(f"video_metadata has the unknown keys {sorted(unknown)}; it has {names}")
        found = dict(value)
    else:
        found = {name: getattr(value, name) for name in names if hasattr(value, name)}
    if found.get("total_num_frames") is None:
        raise InputError("video_metadata needs total_num_frames")
    return VideoMetadata(**found)
