"""SmolVLMVideoProcessor: videos to one tile per frame, and which frames to take."""

import os
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from PIL import Image

from ..errors import InputError
from .assemble import STANDARD_MEAN, STANDARD_STD, check_return_tensors, check_stock_pixels, video_layout
from .batch import BatchFeature
from .configured import Configured
from .decode import decode_video
from .fetch import load_image
from .geometry import MAX_IMAGE_SIZE, longest_edge_size, normalize_size, tile_edge
from .limits import MediaLimits
from .metadata import VideoMetadata, to_metadata
from .pixels import is_array
from .threads import map_threads


class SmolVLMVideoProcessor(Configured):
    """Videos to tiles: every frame becomes one tile of max_image_size["longest_edge"] pixels a side, never more.

    The arguments are those of SmolVLMImageProcessor where the names are the same. do_sample_frames: choose frames by
    `sample_frames` instead of taking all. num_frames, fps: the most frames, and frames a second, to choose; None until
    `video_sampling` = {"max_frames", "fps", "video_size"} of a checkpoint sets them.
    video_sampling["video_size"] is overridden by `size` where both are given, as in the reference: the published
    checkpoints say 512 and mean 2048. use_video_size=True takes the video_size instead.
    """

    DEFAULTS: ClassVar[dict] = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": 4 * 364},
        "resample": 1,
        "max_image_size": {"longest_edge": 364},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": STANDARD_MEAN,
        "image_std": STANDARD_STD,
        "do_pad": True,
        "do_sample_frames": False,
        "num_frames": None,
        "fps": None,
        "video_sampling": None,
        "use_video_size": False,
    }
    OWN = ("use_video_size",)
    INIT_ONLY = ("limits", "num_threads", "backend")
    NEUTRAL: ClassVar[dict] = {
        "data_format": ("channels_first",),
        "device": ("cpu",),
        "default_to_square": (True, False),
        "do_center_crop": (False,),
        "crop_size": (),
    }
    TYPE_KEY = "video_processor_type"
    FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
    NESTED_KEY = "video_processor"
    model_input_names = ("pixel_values", "pixel_attention_mask")

    def __init__(
        self,
        *,
        limits: MediaLimits | None = None,
        num_threads: int | None = None,
        backend: str | None = None,
        **kwargs,
    ):
        sampling, size = kwargs.get("video_sampling"), kwargs.get("size")
        super().__init__(**kwargs)
        if sampling:
            if not isinstance(sampling, Mapping):
                raise InputError("video_sampling needs the form {'max_frames': n, 'fps': r, 'video_size': {...}}")
            self.video_sampling = sampling = dict(sampling)
            if size is not None and not self.use_video_size:
                sampling["video_size"] = dict(normalize_size(size))
            if kwargs.get("num_frames") is None:
                self.num_frames = sampling.get("max_frames")
            if kwargs.get("fps") is None:
                self.fps = sampling.get("fps")
            if sampling.get("video_size"):
                self.size = dict(normalize_size(sampling["video_size"], "video_size"))
        self.limits = limits or MediaLimits()
        self.num_threads = num_threads
        self.backend = backend
        self.image_mean, self.image_std = (tuple(v) if isinstance(v, list) else v for v in (self.image_mean, self.image_std))

    def sample_frames(self, metadata, num_frames=None, fps=None, skip_secs=1, **_) -> np.ndarray:
        """Indices, int (n,), of the frames to look at: `fps` a second, at most `num_frames`, evenly spread.

        metadata: a mapping or object with total_num_frames, fps and duration. skip_secs are left out at either end of
        a video longer than num_frames·fps + 2·skip_secs seconds (that product is the reference's; with fps=2 and 64
        frames nothing is skipped below 130 s). Raises InputError where metadata, its rate or its duration is missing.
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

    def __call__(self, videos, **kwargs) -> BatchFeature:
        """See `preprocess`."""
        return self.preprocess(videos, **kwargs)

    def preprocess(
        self,
        videos,
        *,
        video_metadata=None,
        return_metadata: bool = False,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        pixel_format: str = "float32",
        skip_secs: float = 1,
        num_threads: int | None = None,
        limits: MediaLimits | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Frames of `videos`: a 4-D array (f, h, w, c) or (f, c, h, w), a list of pictures, a path, a URL, a list of
        frame paths inside two lists, or lists of those.

        video_metadata: one mapping or VideoMetadata per video. Returns, with pixel_format="float32", pixel_values
        float32 (videos, f, 3, T, T), shorter videos filled with all-zero frames, and pixel_attention_mask int64
        (videos, f, T, T) of ones; with "uint8": pixel_values uint8 (N, T, T, 3), the real frames in order, and
        num_tiles. With return_metadata also video_metadata, a VideoMetadata per video.
        Raises InputError and MediaError as SmolVLMImageProcessor.preprocess does.
        """
        check_return_tensors(return_tensors)
        options = self._options(kwargs)
        limits = limits or self.limits
        flat = flatten_videos(videos)
        given = _per_video(video_metadata, len(flat))

        def work(item):
            number, video, metadata = item
            where = f"videos[{number}]"
            return self._one(where, video, metadata, options, input_data_format, skip_secs, limits)

        items = [(number, *pair) for number, pair in enumerate(zip(flat, given, strict=True))]
        results = map_threads(work, items, num_threads or self.num_threads)
        frames, metadata = [frames for frames, _ in results], [meta for _, meta in results]
        if pixel_format == "uint8":
            check_stock_pixels(options)
            pixels = np.concatenate(frames)
            batch = BatchFeature(pixel_values=pixels, num_tiles=np.int32(len(pixels)))
        elif pixel_format == "float32":
            batch = video_layout(frames, options)
        else:
            raise InputError(f"pixel_format is {pixel_format!r}; it is 'float32' or 'uint8'")
        if return_metadata:
            batch["video_metadata"] = metadata
        return batch

    def _one(self, where, video, metadata, options, input_data_format, skip_secs, limits):
        """(uint8 (f, T, T, 3), VideoMetadata) of one video."""

        def choose(meta):
            return self.sample_frames(meta, options["num_frames"], options["fps"], skip_secs)

        def keep(frame):
            return _resize_frame(frame, options)

        sampled = options["do_sample_frames"]
        if isinstance(video, (str, os.PathLike)):
            kept, metadata = decode_video(video, choose if sampled else None, keep=keep, backend=self.backend, limits=limits)
            return _stack(where, kept), metadata
        if isinstance(video, list) and isinstance(video[0], (str, os.PathLike)):
            if sampled:
                raise InputError(f"{where}: cannot sample from a list of frame files; pass do_sample_frames=False")
            video = [load_image(path, limits) for path in video]
        frames = _frames(where, video, input_data_format)
        total = len(frames)
        if metadata is None:
            if sampled:
                choose(None)
            metadata = VideoMetadata(total, frames_indices=list(range(total)))
        metadata = to_metadata(metadata)
        if sampled:
            metadata.frames_indices = choose(metadata)
            if metadata.frames_indices[-1] >= total:
                raise InputError(f"{where}: metadata speaks of {metadata.total_num_frames} frames, there are {total}")
            frames = [frames[index] for index in metadata.frames_indices]
        elif metadata.frames_indices is None and metadata.total_num_frames == total:
            metadata.frames_indices = list(range(total))
        if metadata.frames_indices is not None and len(metadata.frames_indices) != len(frames):
            raise InputError(f"{where}: {len(frames)} frames, but metadata.frames_indices names {len(metadata.frames_indices)}")
        metadata.height, metadata.width = frames[0].shape[:2]
        return _stack(where, [keep(frame) for frame in frames]), metadata


def _stack(where: str, frames: list[np.ndarray]) -> np.ndarray:
    if len({frame.shape for frame in frames}) > 1:
        raise InputError(f"{where}: frames of different sizes; leave do_resize on")
    return np.stack(frames)


def _get(metadata, name):
    return metadata.get(name) if isinstance(metadata, Mapping) else getattr(metadata, name, None)


def _per_video(video_metadata, count: int) -> list:
    if video_metadata is None:
        return [None] * count
    if isinstance(video_metadata, Mapping) or not isinstance(video_metadata, (list, tuple)):
        video_metadata = [video_metadata]
    flat = []
    for entry in video_metadata:
        flat.extend(entry if isinstance(entry, (list, tuple)) else [entry])
    if len(flat) != count:
        raise InputError(f"{count} videos, but {len(flat)} entries of video_metadata; pass one for each")
    return flat


def _is_frame(value) -> bool:
    return isinstance(value, Image.Image) or (is_array(value) and value.ndim == 3)


def _is_path(value) -> bool:
    return isinstance(value, (str, os.PathLike))


def flatten_videos(videos) -> list:
    """One entry per video: a 4-D array, a list of frames, a path, or a list of frame paths.

    A list of frames is one video; so is a 4-D array; a 5-D array is several; lists nest freely around them. Paths in
    one or two lists are a video each, in three lists the frames of one. Raises InputError for anything else.
    """
    if _is_path(videos):
        return [videos]
    if isinstance(videos, Image.Image):
        return [[videos]]
    if is_array(videos):
        if videos.ndim == 3:
            return [[videos]]
        if videos.ndim == 4:
            return [videos]
        if videos.ndim == 5:
            return list(videos)
        raise InputError(f"a video array of shape {tuple(videos.shape)}; it needs (frames, height, width, channels)")
    if not isinstance(videos, (list, tuple)):
        raise InputError(f"a video of type {type(videos).__name__}; pass an array, a list of frames, a path or a URL")
    if not videos:
        return []
    if all(_is_frame(entry) for entry in videos):
        return [list(videos)]
    flat = []
    for entry in videos:
        nested = isinstance(entry, (list, tuple)) and entry and isinstance(entry[0], (list, tuple))
        if nested and all(_is_path(path) for frames in entry for path in frames):
            flat.extend(list(frames) for frames in entry)
        elif _is_frame(entry):
            raise InputError("frames and whole videos in one list; put the frames of a video in a list of their own")
        else:
            flat.extend(flatten_videos(entry))
    return flat


def _frames(where: str, video, input_data_format) -> list[np.ndarray]:
    """uint8 (h, w, 3) frames, layout decided once per video."""
    if not len(video):
        raise InputError(f"{where} has no frames")
    frames = [np.asarray(frame) for frame in video]
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1:
        raise InputError(f"{where} has frames of different shapes: {sorted(shapes)}")
    (shape,) = shapes
    if frames[0].dtype != np.uint8:
        raise InputError(f"{where} has frames of dtype {frames[0].dtype}; they need uint8 from 0 to 255")
    name = None if input_data_format is None else str(getattr(input_data_format, "value", input_data_format))
    if len(shape) == 3 and (name == "channels_first" or (name is None and shape[0] in (1, 3))):
        frames = [np.moveaxis(frame, 0, -1) for frame in frames]
    elif len(shape) != 3 or (name is None and shape[2] not in (1, 3)):
        raise InputError(f"{where} has frames of shape {shape}; they need three channels, first or last")
    if frames[0].shape[-1] == 1:
        frames = [np.repeat(frame, 3, axis=-1) for frame in frames]
    return frames


def _resize_frame(frame: np.ndarray, options: dict) -> np.ndarray:
    """uint8 (T, T, 3): long edge to `size`, then to the square, by Pillow, uint8 in between."""
    image = Image.fromarray(np.ascontiguousarray(frame))
    if options["do_resize"]:
        size = normalize_size(options["size"])
        if "longest_edge" in size:
            height, width = longest_edge_size(*frame.shape[:2], min(MAX_IMAGE_SIZE, size["longest_edge"]))
        else:
            height, width = size["height"], size["width"]
        tile = tile_edge(options["max_image_size"])
        for wanted in ((width, height), (tile, tile)):
            if image.size != wanted:
                image = image.resize(wanted, resample=options["resample"])
    return np.asarray(image)
