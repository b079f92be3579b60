"""SmolVLMVideoProcessor: videos to one tile per frame, and the choice of frames."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError, MediaError
from .assemble import PIXEL_FORMATS, arrange, flat_uint8, video_layout
from .batch import BatchFeature, as_tensors, check_return_tensors
from .choices import one_of
from .decode import decode_video
from .fetch import is_source, load_image, loaded
from .geometry import MAX_IMAGE_SIZE, longest_edge_size, normalize_size, tile_edge
from .layout import flatten_videos, metadata_of_videos
from .media import MediaProcessor
from .metadata import VideoMetadata, to_metadata
from .pixels import Picture, channel_axis, flatten_alpha, has_alpha, to_rgb
from .threads import map_threads


class SmolVLMVideoProcessor(MediaProcessor):
    """Videos to tiles: every frame becomes exactly one tile.

    Args:
        do_convert_rgb: accepted as in the reference; frames are RGB in any case.
        do_resize: resize frames as `size` says, then to the tile.
        size: {"longest_edge": pixels} or {"height", "width"}: the first of the two resizes. It overrides
            video_sampling["video_size"] where both are given, as in the reference: the published checkpoints say 512
            there, and are run with the 2048 of `size`.
        resample, max_image_size, do_rescale, rescale_factor, do_normalize, image_mean, image_std: as in SmolVLMImageProcessor.
        do_pad: make one array of the batch, with all-zero frames where a video is shorter than others.
        do_sample_frames: choose frames with `sample_frames` instead of taking all.
        num_frames: the largest number of frames to choose; None takes video_sampling["max_frames"].
        fps: frames per second to choose; None takes video_sampling["fps"].
        video_sampling: a checkpoint's {"max_frames", "fps", "video_size"}.
        use_video_size: take video_sampling["video_size"] even where `size` is given. Not in the reference.
        limits: what may be read for a video given as a path or URL.
        num_threads: videos worked on at once; None takes the processors there are, at most 8.
        backend: the decoding library, "decord" or "pyav"; None takes PyAV
            where it is installed. Where the one cannot read a video, the other is tried.

    Raises:
        InputError: an argument is unknown, or has a value that is not supported.
    """

    do_sample_frames: bool = False
    num_frames: int | None = None
    fps: float | None = None
    video_sampling: dict[str, Any] | None = None
    use_video_size: bool = False
    backend: str | None = None

    OWN = ("use_video_size",)
    UNSAVED = (*MediaProcessor.UNSAVED, "backend")
    TYPE_KEY = "video_processor_type"
    FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
    NESTED_KEY = "video_processor"

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        sampling = kwargs.get("video_sampling")
        if not sampling:
            return
        if not isinstance(sampling, Mapping):
            raise InputError("video_sampling needs the form {'max_frames': n, 'fps': r, 'video_size': {...}}")
        self.video_sampling = sampling = dict(sampling)
        if kwargs.get("size") is not None and not self.use_video_size:
            sampling["video_size"] = normalize_size(kwargs["size"])
        if self.num_frames is None:
            self.num_frames = sampling.get("max_frames")
        if self.fps is None:
            self.fps = sampling.get("fps")
        if sampling.get("video_size"):
            self.size = normalize_size(sampling["video_size"], "video_size")

    def sample_frames(
        self,
        metadata: Mapping[str, Any] | VideoMetadata | None,
        num_frames: int | None = None,
        fps: float | None = None,
        skip_secs: float = 1,
        **_: Any,
    ) -> np.ndarray:
        """Which frames of a video to look at: `fps` per second, at most `num_frames`, evenly spread.

        Args:
            metadata: a mapping or object with total_num_frames, fps and duration (seconds).
            num_frames: the largest number of frames; None takes this object's.
            fps: frames per second; None takes this object's.
            skip_secs: seconds left out at either end of a video longer than num_frames·fps + 2·skip_secs seconds. The
                product is the reference's: with fps=2 and 64 frames nothing is skipped below 130 s.

        Returns:
            Indices in increasing order, int (n,).

        Raises:
            InputError: the metadata, its rate or its duration is missing, or there is no num_frames or fps.
        """
        if metadata is None or _get(metadata, "fps") is None:
            raise InputError(
                "sampling frames needs the video's metadata with its fps; pass video_metadata, or do_sample_frames=False"
            )
        total, rate, duration = (_get(metadata, name) for name in ("total_num_frames", "fps", "duration"))
        if duration is None:
            raise InputError("sampling frames needs the video's duration; pass duration = total_num_frames / fps")
        if not total or total < 1:
            raise InputError(f"sampling frames needs at least one frame; total_num_frames is {total}")
        num_frames = self.num_frames if num_frames is None else num_frames
        fps = self.fps if fps is None else fps
        if num_frames is None or fps is None:
            raise InputError("sampling frames needs num_frames and fps; this checkpoint has no video_sampling that says them")
        count = max(1, min(round(fps * duration), num_frames))
        first, last = 0, total - 1
        if skip_secs > 0 and duration - 2 * skip_secs > num_frames * fps:
            first = max(0, int(skip_secs * rate))
            last = min(int(total - skip_secs * rate), total - 1)
        if first >= last:
            first, last = 0, total - 1
        return np.unique(np.linspace(first, last, count, dtype=int))

    def preprocess(
        self,
        videos: Any,
        *,
        video_metadata: Any = None,
        return_metadata: bool = False,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        data_format: str | None = None,
        pixel_format: str = "float32",
        skip_secs: float = 1,
        sample_lists: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """The tiles of a batch of videos.

        Args:
            videos: a 4-D array (f, h, w, c) or (f, c, h, w) of uint8, a list of pictures, a path, a URL, base64 text,
                the bytes of a file, a list of frame files inside two lists, or lists of those (see `layout.flatten_videos`).
            video_metadata: a mapping or VideoMetadata for each video that is not a file; files bring their own.
            return_metadata: return `video_metadata`.
            return_tensors: None, "np" or "jax"; without it arrays are numpy arrays too.
            input_data_format: "channels_first" or "channels_last" for arrays; None decides by the shape.
            data_format: "channels_last" for float32 pixel_values (videos, f, T, T, 3); None or "channels_first" for the
                reference's.
            pixel_format: "float32" for the reference's layout, "uint8" for the real frames alone.
            skip_secs: see `sample_frames`.
            sample_lists: with do_sample_frames, sample lists of frames without metadata too, which is an error since their rate
                is not known. False takes such lists whole.
            **kwargs: arguments of the constructor, for this call. None for limits, num_threads, backend, num_frames or fps
                takes this object's setting.

        Returns:
            With pixel_format="float32": pixel_values, float32 (videos, f, 3, T, T), and pixel_attention_mask, int64
            (videos, f, T, T) of ones. With "uint8": pixel_values, uint8 (N, T, T, 3), the frames of all videos in order,
            and num_tiles = N, an int32 scalar. On request also video_metadata, a VideoMetadata for each video.

        Raises:
            InputError: arguments, arrays or metadata that make no sense.
            MediaError: a file that cannot be read or decoded, or exceeds the limits.
        """
        kind = check_return_tensors(return_tensors)
        one_of("pixel_format", pixel_format, PIXEL_FORMATS)
        # For these two None means "as the checkpoint says", not "none".
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in ("num_frames", "fps")}
        call = self._for_call(kwargs)
        flat = flatten_videos(videos)
        if not flat:
            raise InputError("no videos in the whole batch; leave videos out")
        given = metadata_of_videos(video_metadata, len(flat))

        def work(item: tuple[int, Any, Any]) -> tuple[np.ndarray, VideoMetadata]:
            number, video, metadata = item
            return call._clip(
                f"videos[{number}]",
                video,
                metadata,
                input_data_format=input_data_format,
                skip_secs=skip_secs,
                sample_lists=sample_lists,
            )

        clips = map_threads(work, zip(range(len(flat)), flat, given, strict=True), call.num_threads)
        tiles = [frames for frames, _ in clips]
        if pixel_format == "uint8":
            batch = flat_uint8(tiles, call)
        else:
            batch = arrange(video_layout(tiles, call, do_pad=call.do_pad), data_format)
        if return_metadata:
            batch["video_metadata"] = [metadata for _, metadata in clips]
        return as_tensors(batch, kind)

    __call__ = preprocess

    @classmethod
    def get_video_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What processor_config.json, video_preprocessor_config.json and preprocessor_config.json say of videos.

        Args:
            pretrained_model_name_or_path: where they are, as in `from_pretrained`.
            **kwargs: likewise.

        Returns:
            (the mapping, {} where there is none of them; the keywords that do not say where they are).

        Raises:
            CheckpointError, InputError: as `from_pretrained` raises them.
        """
        return cls._read("get_video_processor_dict", pretrained_model_name_or_path, kwargs)

    def _clip(
        self,
        where: str,
        video: Any,
        metadata: Any,
        *,
        input_data_format: str | None,
        skip_secs: float,
        sample_lists: bool,
    ) -> tuple[np.ndarray, VideoMetadata]:
        """The tiles, uint8 (f, T, T, 3), and the metadata of one video, called `where` in messages."""

        def choose(metadata: VideoMetadata | None) -> np.ndarray:
            return self.sample_frames(metadata, skip_secs=skip_secs)

        sampled = self.do_sample_frames and (sample_lists or metadata is not None or is_source(video))
        if is_source(video):
            kept, found = decode_video(
                video, choose if sampled else None, keep=self._tile, backend=self.backend, limits=self.limits
            )
            return _stack(where, kept), found
        if isinstance(video, (list, tuple)):
            if sampled and any(map(is_source, video)):
                raise InputError(f"{where}: cannot sample from a list of frame files; pass do_sample_frames=False")
            video = [self._opened(where, frame, len(video)) for frame in video]
        frames = _frames(where, video, input_data_format)
        total = len(frames)
        metadata = to_metadata(VideoMetadata(total) if metadata is None else metadata)
        if sampled:
            metadata.frames_indices = choose(metadata).tolist()
            if metadata.frames_indices[-1] >= total:
                raise InputError(f"{where}: metadata speaks of {metadata.total_num_frames} frames, there are {total}")
            frames = [frames[index] for index in metadata.frames_indices]
        elif metadata.frames_indices is None and metadata.total_num_frames == total:
            metadata.frames_indices = list(range(total))
        if metadata.frames_indices is not None and len(metadata.frames_indices) != len(frames):
            raise InputError(f"{where}: {len(frames)} frames, but metadata.frames_indices names {len(metadata.frames_indices)}")
        metadata.height, metadata.width = frames[0].shape[:2]
        return _stack(where, [self._tile(frame) for frame in frames]), metadata

    def _opened(self, where: str, frame: Any, count: int) -> Any:
        """One of `count` frames of a list, decoded if it is a file or a Pillow image that is not decoded yet."""
        if is_source(frame):
            if count > self.limits.max_frames:
                raise MediaError(f"{where}: {count} frames are above the limit of {self.limits.max_frames}")
            return load_image(frame, self.limits)
        if not isinstance(frame, Image.Image):
            return frame
        frame = loaded(frame, self.limits)
        return flatten_alpha(frame) if has_alpha(frame) else frame

    def _tile(self, frame: np.ndarray) -> np.ndarray:
        """uint8 (T, T, 3): the long edge to `size`, then to the square, by Pillow, rounded to uint8 after each."""
        picture = Picture(Image.fromarray(np.ascontiguousarray(frame)))
        if self.do_resize:
            size = normalize_size(self.size)
            if "longest_edge" in size:
                first = longest_edge_size(picture.image.size[::-1], min(MAX_IMAGE_SIZE, size["longest_edge"]))
            else:
                first = size["height"], size["width"]
            tile = tile_edge(self.max_image_size)
            picture = picture.resize(first, self.resample).resize((tile, tile), self.resample)
        return picture.pixels()


def _stack(where: str, frames: list[np.ndarray]) -> np.ndarray:
    if len({frame.shape for frame in frames}) > 1:
        raise InputError(f"{where}: frames of different sizes; leave do_resize on")
    return np.stack(frames)


def _get(metadata: Any, name: str) -> Any:
    return metadata.get(name) if isinstance(metadata, Mapping) else getattr(metadata, name, None)


def _frames(where: str, video: Sequence[Any] | np.ndarray, input_data_format: str | None) -> list[np.ndarray]:
    """The frames as uint8 (h, w, 3), what is transparent laid over white. Where channels are is decided once per video."""
    if not len(video):
        raise InputError(f"{where} has no frames")
    frames = [np.asarray(frame) for frame in video]
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1:
        raise InputError(f"{where} has frames of different shapes: {sorted(shapes)}")
    (shape,) = shapes
    if frames[0].dtype != np.uint8:
        raise InputError(f"{where} has frames of dtype {frames[0].dtype}; they need uint8 from 0 to 255")
    try:
        axis = channel_axis(shape, input_data_format=input_data_format, channels=(1, 3, 4))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if axis == 0:
        frames = [np.moveaxis(frame, 0, -1) for frame in frames]
    return [to_rgb(frame) for frame in frames]
