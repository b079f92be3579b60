"""The text that stands for a picture or a video in a prompt. These strings are what the checkpoints were trained on."""

from dataclasses import dataclass
from datetime import timedelta

from .numwords import number_to_words

VIDEO_INTRO = "You are provided the following series of {words} frames from a {duration} [H:MM:SS] video.\n"
FRAME_INTRO = "\nFrame from {minutes:02d}:{seconds:02d}:"
VIDEO_OUTRO = "\n\n"


@dataclass(frozen=True)
class MediaTokens:
    """The marker strings of a tokenizer, and how many image tokens one tile takes."""

    image_seq_len: int
    fake_image_token: str = "<fake_token_around_image>"
    image_token: str = "<image>"
    global_image_token: str = "<global-img>"

    def single(self) -> str:
        """The block of one tile: a picture that is not split, or a frame."""
        fake, slots = self.fake_image_token, self.image_token * self.image_seq_len
        return f"{fake}{self.global_image_token}{slots}{fake}"

    def picture(self, rows: int, cols: int) -> str:
        """The block of a picture: its tiles row by row, each after its <row_r_col_c> marker, then the global view.

        A tokenizer without a marker for a row or column (the published ones stop at 6) reads it as plain text.
        """
        if not rows and not cols:
            return self.single()
        fake, slots = self.fake_image_token, self.image_token * self.image_seq_len
        lines = ("".join(f"{fake}<row_{row + 1}_col_{col + 1}>{slots}" for col in range(cols)) + "\n" for row in range(rows))
        return "".join(lines) + "\n" + self.single()

    def video(self, num_frames: int, timestamps: list[float], duration: float | None) -> str:
        """The block of a video. num_frames is spelled in words and counts padding frames too, as the reference does;
        timestamps are seconds, one per real frame; without a duration the last timestamp is taken."""
        seconds = int(duration) if duration is not None else int(timestamps[-1])
        text = VIDEO_INTRO.format(words=number_to_words(num_frames), duration=timedelta(seconds=seconds))
        for time in timestamps:
            text += FRAME_INTRO.format(minutes=int(time // 60), seconds=int(time % 60)) + self.single()
        return text + VIDEO_OUTRO
