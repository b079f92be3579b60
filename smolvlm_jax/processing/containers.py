"""Which kind of file a video is, from its first bytes alone.

A demuxer that is chosen by guessing can be led to playlists, session descriptions and other texts that name further files and
addresses. So a video must begin with the signature of one of these containers, and is opened as that container only.
"""

from ..errors import MediaError

__all__ = ["HEAD", "recognise"]

HEAD = 4096
"""How many bytes of a file `recognise` wants to see."""

# The first atom of an mp4 or QuickTime file.
_ATOMS = {b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"}
# Signature at the start of the file: FFmpeg's name of the container.
_SIGNATURES = {
    b"\x1a\x45\xdf\xa3": "matroska",
    b"\x00\x00\x01\xba": "mpeg",
    b"FLV\x01": "flv",
    b"OggS\x00": "ogg",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "asf",
    b"DKIF\x00\x00\x20\x00": "ivf",
    b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02\x01\x01\x02": "mxf",
    b"\x00\x00\x01\xb3": "mpegvideo",
    b"YUV4MPEG2 ": "yuv4mpegpipe",
}
# Distances of the sync bytes of an MPEG transport stream, and where the first stands: plain, with times (m2ts), with parity.
_TRANSPORT = ((188, 0), (192, 4), (204, 0))


def recognise(head: bytes) -> str:
    """FFmpeg's name of the container that a file with these first bytes is.

    Args:
        head: the first `HEAD` bytes, or all of a shorter file.

    Raises:
        MediaError: it is none of the containers known here.
    """
    if head[4:8] in _ATOMS and (int.from_bytes(head[:4], "big") >= 8 or head[:4] in (b"\0\0\0\0", b"\0\0\0\1")):
        return "mov"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return name
    for size, first in _TRANSPORT:
        sync = head[first::size]
        if len(head) >= 2 * size and sync == b"\x47" * len(sync):
            return "mpegts"
    if head and all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        raise MediaError("it is text (a playlist?), not a video")
    raise MediaError(
        "it is no video of a kind that is read here: mp4/mov, Matroska/WebM, MPEG transport or program stream, AVI, FLV, Ogg, "
        "GIF, ASF/WMV, MXF, IVF, Y4M"
    )
