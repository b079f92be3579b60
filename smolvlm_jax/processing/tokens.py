"""The special tokens that stand for pictures and videos."""

# By the name of their attribute; a tokenizer's configuration may say others.
MEDIA_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "video_token": "<video>",
    "end_of_utterance_token": "<end_of_utterance>",
}
# Before each tile of a split picture, with its row and column from 1 on.
GRID_MARKER = "<row_{row}_col_{col}>"
GRID_PATTERN = r"<row_\d+_col_\d+>"
