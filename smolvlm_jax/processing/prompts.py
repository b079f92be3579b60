"""The text that stands for a picture or a video in a prompt. These strings are what the checkpoints were trained on."""

import functools
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ..errors import InputError
from .metadata import VideoMetadata
from .numwords import number_to_words

# Before each tile of a split picture, with its row and column from 1 on.
GRID_MARKER = "<row_{row}_col_{col}>"
GRID_PATTERN = r"<row_\d+_col_\d+>"
VIDEO_INTRO = "You are provided the following series of {words} frames from a {duration} [H:MM:SS] video.\n"
FRAME_INTRO = "\nFrame from {minutes:02d}:{seconds:02d}:"
VIDEO_OUTRO = "\n\n"
# A picture of the published sizes has 17. Damaged sizes in a file would ask for millions, of a pixel each.
_MOST_TILES = 8192

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MediaTokens:
    """The special tokens that stand for pictures and videos, and how many image tokens one tile takes.

    A tokenizer's configuration may say others than the defaults.
    """

    image_seq_len: int
    image_token: str = "<image>"
    fake_image_token: str = "<fake_token_around_image>"
    global_image_token: str = "<global-img>"
    video_token: str = "<video>"
    end_of_utterance_token: str = "<end_of_utterance>"

    def single(self) -> str:
        """The block of one tile: a picture that is not split, or a frame."""
        fake, slots = self.fake_image_token, self.image_token * self.image_seq_len
        return f"{fake}{self.global_image_token}{slots}{fake}"

    def picture(self, rows: int, cols: int) -> str:
        """The block of a picture: its tiles row by row, each after its marker, then the global view.

        A tokenizer without a marker for a row or column (the published ones stop at 6) reads it as plain text.

        Raises:
            InputError: no checkpoint has a use for so many tiles.
        """
        if not rows and not cols:
            return self.single()
        if rows * cols > _MOST_TILES:
            raise InputError(
                f"a picture of {rows} × {cols} tiles, above the limit of {_MOST_TILES}: lower the processor's size, "
                "or raise its max_image_size"
            )
        text, slots = "", self.image_token * self.image_seq_len
        for row in range(1, rows + 1):
            for col in range(1, cols + 1):
                text += self.fake_image_token + GRID_MARKER.format(row=row, col=col) + slots
            text += "\n"
        return text + "\n" + self.single()

    def pictures(self, samples: Iterable[Sequence[tuple[int, int]]]) -> list[str]:
        """The blocks of all pictures of a batch, in order, from the rows and columns of each sample's pictures."""
        return [self.picture(*grid) for sample in samples for grid in sample]

    def videos(self, clips: list[VideoMetadata], default_fps: float | None) -> list[str]:
        """The blocks of the videos of a batch.

        Args:
            clips: what is known about each; one without fps gets `default_fps`, one without duration (in seconds) the time
                of its last frame.
            default_fps: frames per second of such a video; None refuses it.

        Raises:
            InputError: the times of a video's frames are not known.
        """
        for clip in clips:
            if clip.fps is None:
                if default_fps is None:
                    raise InputError("a video without fps has no timestamps; pass video_metadata with its fps")
                _notice_rate(default_fps)
                clip.fps = default_fps
        times = [clip.timestamps for clip in clips]
        # The count in words includes padding frames, as the reference writes it.
        most = max(map(len, times))
        texts = []
        for clip, seconds in zip(clips, times, strict=True):
            duration = timedelta(seconds=int(seconds[-1] if clip.duration is None else clip.duration))
            text = VIDEO_INTRO.format(words=number_to_words(most), duration=duration)
            for time in seconds:
                text += FRAME_INTRO.format(minutes=int(time // 60), seconds=int(time % 60)) + self.single()
            texts.append(text + VIDEO_OUTRO)
        return texts

    def check_counts(self, texts: list[str], samples: Sequence[Sequence] | None, num_videos: int) -> None:
        """Raise InputError unless each text has a token for each of its pictures, and all texts one for each video.

        Args:
            texts: the prompts, not expanded yet.
            samples: the pictures of each text; None where no pictures were passed.
            num_videos: of all texts together.
        """
        slots = [text.count(self.image_token) for text in texts]
        given = [0] * len(texts) if samples is None else [len(sample) for sample in samples]
        if slots != given:
            way_out = _way_out(slots, given, self.image_token)
            raise InputError(
                f"{self.image_token} occurs {_shorten(slots)} times in the texts, but they come with "
                f"{_shorten(given)} images; the counts have to agree text by text (a flat list is one text's){way_out}"
            )
        wanted = sum(text.count(self.video_token) for text in texts)
        if wanted != num_videos:
            raise InputError(f"{self.video_token} occurs {wanted} times in the texts, but {num_videos} videos were passed")


@dataclass(frozen=True, kw_only=True)
class NanoTokens(MediaTokens):
    """The blocks of nanoVLM, whose tokens are followed by their tile and nothing else.

    Attributes:
        whole: the whole picture stands first; otherwise there is the grid alone, of one tile at least.
    """

    whole: bool = True

    def single(self) -> str:
        return self.picture(0, 0)

    def picture(self, rows: int, cols: int) -> str:
        slots = self.image_token * self.image_seq_len
        text = self.global_image_token + slots if self.whole else ""
        if not rows and not cols and self.whole:
            return text
        grid = ((row, col) for row in range(1, max(rows, 1) + 1) for col in range(1, max(cols, 1) + 1))
        return text + "".join(GRID_MARKER.format(row=row, col=col) + slots for row, col in grid)

    def pictures(self, samples: Iterable[Sequence[tuple[int, int]]]) -> list[str]:
        """Where a sample has several pictures, each is numbered."""
        blocks = []
        for sample in samples:
            numbered = (f"<image: {number}>" if len(sample) > 1 else "" for number in range(len(sample)))
            blocks += [number + self.picture(*grid) for number, grid in zip(numbered, sample, strict=True)]
        return blocks

    def videos(self, clips: list[VideoMetadata], default_fps: float | None) -> list[str]:
        raise InputError("nanoVLM has no form for videos: pass frames as pictures")


def media_tokens(tiling: str, **tokens: Any) -> MediaTokens:
    """The blocks that go with a tiling, one of `geometry.TILINGS`."""
    return MediaTokens(**tokens) if tiling == "smolvlm" else NanoTokens(whole=tiling == "nanovlm", **tokens)


# The default of each token, by the name of its attribute.
MEDIA_TOKENS: dict[str, str] = {name: token for name, token in vars(MediaTokens).items() if name.endswith("_token")}


@functools.cache
def _notice_rate(default_fps: float) -> None:
    """Once in a process: a data set of lists of frames has a million such videos."""
    _log.warning("a video without fps: its timestamps assume %s frames a second", default_fps)


def expand(texts: list[str], token: str, blocks: Iterable[str]) -> list[str]:
    """`texts` with each `token`, text after text, replaced by the next of `blocks`."""
    rest = iter(blocks)
    return [re.sub(re.escape(token), lambda _: next(rest), text) for text in texts]


def _way_out(slots: list[int], given: list[int], token: str) -> str:
    """What to do where texts and pictures disagree in number, for the first text that does."""
    if len(given) == 1 < len(slots):
        count = iter(range(1, given[0] + 1))
        each = slots if sum(slots) == given[0] else [1] * len(slots)
        if len(slots) > 4 or sum(each) != given[0]:
            return "; pass a list of pictures for each text, images=[[…], […]]"
        lists = ", ".join(f"[{', '.join(f'im{next(count)}' for _ in range(some))}]" for some in each)
        return f"; pass images=[{lists}]" + ("" if each == slots else f", and write {token} in each text, as encode_chat does")
    if len(given) > len(slots):
        return f"; pass a text for each of the {len(given)} lists of pictures"
    wanted, found = next((pair for pair in zip(slots, given, strict=False) if pair[0] != pair[1]), (0, 0))
    if wanted < found:
        return f"; write {token} where a picture belongs, which encode_chat(messages) does, or leave the picture out"
    return f"; pass the pictures, images=[…], or in messages {{'type': 'image', 'image': PATH}}, or leave {token} out"


def _shorten(counts: list[int]) -> str:
    return str(counts if len(counts) <= 16 else [*counts[:16], "…"])
