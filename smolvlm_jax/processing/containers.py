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
# Distances of the sync bytes of an MPEG transport stream: plain, with times (m2ts), with parity.
_TRANSPORT = (188, 192, 204)


def recognise(head: bytes) -> str:
    """FFmpeg's name of the container that a file with these first bytes is.

    Args:
        head: the first `HEAD` bytes, or all of a shorter file.

    Raises:
        MediaError: it is none of the containers known here.
    """
    if not head:
        raise MediaError("it is empty")
    if head[4:8] in _ATOMS and (int.from_bytes(head[:4], "big") >= 8 or head[:4] in (b"\0\0\0\0", b"\0\0\0\1")):
        return "mov"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return name
    if head[:4] == b"\0\0\0\1" and head[4:5]:
        # H.264 and HEVC without a container begin with a delimiter, a set of parameters or a message.
        if not head[4] & 0x80 and head[4] & 0x1F in (6, 7, 9):
            return "h264"
        if head[4] >> 1 in (32, 33, 35, 39) and head[5:6] == b"\1":
            return "hevc"
    if head[:3] == b"\x12\0\x0a":
        return "obu"
    if _is_transport_stream(head):
        return "mpegts"
    if head and all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        raise MediaError("it is text (a playlist?), not a video")
    raise MediaError(
        "it is no video of a kind that is read here: mp4/mov, Matroska/WebM, MPEG transport or program stream, AVI, FLV, Ogg, "
        "GIF, ASF/WMV, MXF, IVF, Y4M, H.264, HEVC or AV1 without a container"
    )


def _is_transport_stream(head: bytes) -> bool:
    """Whether there is a sync byte in each packet. A recording may begin in the middle of a packet; then more are asked for."""
    for size in _TRANSPORT:
        for first in range(size):
            sync = head[first::size]
            if len(sync) >= (2 if first in (0, 4) else 8) and sync == b"\x47" * len(sync):
                return True
    return False
