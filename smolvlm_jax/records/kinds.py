"""The endings of files that are taken for pictures, for videos and for documents, whose pages are pictures."""

import importlib.util
import os

__all__ = ["HEIF", "PDFS", "PICTURES", "VIDEOS", "is_media"]

# Read where pillow-heif is installed (the extra `heif`).
HEIF = (".heic", ".heif", ".hif")
PICTURES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif",
    *(HEIF if importlib.util.find_spec("pillow_heif") else ()),
)  # fmt: skip
VIDEOS = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv",
    ".ts", ".mts", ".m2ts", ".vob", ".y4m",
)  # fmt: skip
# Read where pypdfium2 is installed (the extra `documents`), and wanted in any case.
PDFS = (".pdf",)


def is_media(name: str) -> bool:
    """Whether a file with this name may be a picture, a video or a PDF: by its ending, or because it has none."""
    ending = os.path.splitext(name)[1].lower()
    return not ending or ending in (*PICTURES, *VIDEOS, *PDFS)
