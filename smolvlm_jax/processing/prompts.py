"""The text that stands for a picture or a video in a prompt. These strings are what the checkpoints were trained on."""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from ..errors import InputError
from .metadata import VideoMetadata
from .numwords import number_to_words
from .tokens import GRID_MARKER

VIDEO_INTRO = "You are provided the following series of {words} frames from a {duration} [H:MM:SS] video.\n"
FRAME_INTRO = "\nFrame from {minutes:02d}:{seconds:02d}:"
VIDEO_OUTRO = "\n\n"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MediaTokens:
    """The markers of a tokenizer, and how many image tokens one tile takes."""

    image_seq_len: int
    fake_image_token: str
    image_token: str
    global_image_token: str
    video_token: str
    end_of_utterance_token: str

    def single(self) -> str:
        """The block of one tile: a picture that is not split, or a frame."""
        fake, slots = self.fake_image_token, self.image_token * self.image_seq_len
        return f"{fake}{self.global_image_token}{slots}{fake}"

    def picture(self, rows: int, cols: int) -> str:
        """The block of a picture: its tiles row by row, each after its marker, then the global view.

        A tokenizer without a marker for a row or column (the published ones stop at 6) reads it as plain text.
        """
        if not rows and not cols:
            return self.single()
        text, slots = "", self.image_token * self.image_seq_len
        for row in range(1, rows + 1):
            for col in range(1, cols + 1):
                text += self.fake_image_token + GRID_MARKER.format(row=row, col=col) + slots
            text += "\n"
        return text + "\n" + self.single()

    def video(self, num_frames: int, timestamps: list[float], duration: float | None) -> str:
        """The block of a video.

        Args:
            num_frames: spelled in words; it counts padding frames too, as in the reference.
            timestamps: seconds of each real frame.
            duration: in seconds; without it the last timestamp is taken.
        """
        seconds = int(duration) if duration is not None else int(timestamps[-1])
        text = VIDEO_INTRO.format(words=number_to_words(num_frames), duration=timedelta(seconds=seconds))
        for time in timestamps:
            text += FRAME_INTRO.format(minutes=int(time // 60), seconds=int(time % 60)) + self.single()
        return text + VIDEO_OUTRO

    def videos(self, clips: list[VideoMetadata], default_fps: float | None) -> list[str]:
        """The blocks of the videos of a batch.

        Args:
            clips: what is known about each; one without fps gets `default_fps`.
            default_fps: frames per second of such a video; None refuses it.

        Raises:
            InputError: the times of a video's frames are not known.
        """
        for number, clip in enumerate(clips):
            if clip.frames_indices is None:
                raise InputError(f"videos[{number}]: its frames have no times; pass frames_indices in its video_metadata")
            if clip.fps is None:
                if default_fps is None:
                    raise InputError("a video without fps has no timestamps; pass video_metadata with its fps")
                _log.warning("a video without fps: its timestamps assume %s frames a second", default_fps)
                clip.fps = default_fps
        times = [clip.timestamps for clip in clips]
        # The count in words includes padding frames, as the reference writes it.
        most = max(map(len, times))
        return [self.video(most, seconds, clip.duration) for clip, seconds in zip(clips, times, strict=True)]

    def check_counts(self, texts: list[str], samples: Sequence[Sequence] | None, num_videos: int) -> None:
        """Raise InputError unless each text has a token for each of its pictures, and all texts one for each video.

        Args:
            texts: the prompts, not expanded yet.
            samples: the pictures of each text; None where no pictures were passed.
            num_videos: of all texts together.
        """
        slots = [text.count(self.image_token) for text in texts]
        if samples is None and any(slots):
            raise InputError(f"{self.image_token} occurs {sum(slots)} times in the texts, but no images were passed")
        given = slots if samples is None else [len(sample) for sample in samples]
        if slots != given:
            raise InputError(
                f"{self.image_token} occurs {_shorten(slots)} times in the texts, but they come with "
                f"{_shorten(given)} images; the counts have to agree text by text (a flat list is one text's)"
            )
        wanted = sum(text.count(self.video_token) for text in texts)
        if wanted != num_videos:
            raise InputError(f"{self.video_token} occurs {wanted} times in the texts, but {num_videos} videos were passed")


def expand(texts: list[str], token: str, blocks: Iterable[str]) -> list[str]:
    """`texts` with each `token`, text after text, replaced by the next of `blocks`."""
    rest = iter(blocks)
    return [re.sub(re.escape(token), lambda _: next(rest), text) for text in texts]


def _shorten(counts: list[int]) -> str:
    return str(counts if len(counts) <= 16 else [*counts[:16], "…"])
