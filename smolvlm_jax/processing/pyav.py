"""Videos by PyAV, frame by frame as a player presents them.

Seeks are not used: in containers without an index they end at an unknown place. The packets are read in order
twice: first for their times alone, which is cheap, then again, when those that no wanted frame depends on are not decoded.
Every frame that the decoder gives is compared with the times that were announced. Where the times cannot be known from the
packets, or turn out wrong, the whole video is decoded once to count its frames, in the order in which they come.
"""

import contextlib
import os
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np

from ..errors import MediaError
from .containers import HEAD, recognise
from .work import RefusedError, Work

__all__ = ["Misread", "PyAVReader"]

# Codecs whose key frames are not marked reliably, so that everything before a frame is decoded.
_DECODE_THROUGH = {"gif"}
_READ_BYTES = 1 << 16
# Codecs of which any frame may have another size than the one before.
_ANY_SIZE = {"vp9", "libvpx-vp9", "av1", "libdav1d", "libaom-av1"}
# PyAV's number of a picture that is decoded without others.
_INTRA = 1
# Threads of one decoder, by its name; one for all others, since what they make of damaged frames depends on their number.
_THREADS = {"libdav1d": 4}
# What other versions of FFmpeg turn into the same RGB.
_PLAIN_COLOURS = ("yuv420p", "yuvj420p", "yuvj444p")


class Misread(MediaError):
    """The frames are not those that the packets announced: open the video with serial=True."""


class PyAVReader:
    """A video opened by PyAV: a VideoReader like that of readers.py.

    Args:
        path: of the file.
        work: what may be read and decoded.
        serial: count the frames by decoding them all.
        vouch: look at a frame to find out whether the video is `plain`.

    Attributes:
        total: number of frames that are presented.
        fps: frames a second on average; 0, infinite or NaN if it is not known.
        seconds: float64 (total,): when each frame is presented, counted from the first.
        plain: another library may be trusted with it, if it finds the same times: every packet is a frame that is shown,
            nothing is mirrored, the size stays the same, and the colours are ordinary. False without `vouch`.

    Raises:
        MediaError: there is no film in the file.
        LimitError: it exceeds `work`.
    """

    def __init__(self, path: str, work: Work, *, serial: bool = False, vouch: bool = False):
        from av.video.reformatter import VideoReformatter

        self._path, self._work, self._serial = path, work, serial
        self._to_rgb = VideoReformatter()
        with open(path, "rb") as file:
            self._format = recognise(file.read(HEAD))
        self.plain = False
        with self._opened() as (container, stream):
            rate = stream.average_rate or stream.guessed_rate or stream.base_rate
            self.fps, guessed = float(rate) if rate else 0.0, not stream.average_rate
            self._base = float(stream.time_base or 0)
            if not serial:
                self._read_packets(container, stream)
        if guessed:  # from a few packets FFmpeg takes the rate of fields for that of frames
            self.fps = self._coded_rate() or self.fps
        if self._serial:
            self._decode_all()
        self.total = len(self.seconds)
        self.plain = self.plain and vouch and self._looks_plain()

    def frames(self, indices: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """The frames of these indices, uint8 (h, w, 3), each as it is decoded."""
        wanted = [int(index) for index in indices]
        if not wanted:
            return
        if not all(0 <= index < self.total for index in wanted):
            raise MediaError(f"there are {self.total} frames, and others are asked for")
        last = {index: place for place, index in enumerate(wanted)}  # where each is asked for the last time
        held: dict[int, np.ndarray] = {}
        place = 0
        for index, frame in self._serial_frames(set(wanted)) if self._serial else self._chosen_frames(sorted(set(wanted))):
            held[index] = frame
            while place < len(wanted) and wanted[place] in held:
                index = wanted[place]
                yield held[index] if place < last[index] else held.pop(index)
                place += 1
            if place == len(wanted):
                return
        raise Misread(f"frame {wanted[place]} of {self.total} does not decode")

    def close(self) -> None:
        """Nothing: the file is open only while it is read."""

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its film. FFmpeg reads through `file` alone: every protocol and every other file is refused."""
        import av

        av.logging.set_level(av.logging.PANIC)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(self._path, "rb"))
            options = {"protocol_whitelist": "none", "enable_drefs": "0"}
            try:
                container = av.open(file, format=self._format, buffer_size=_READ_BYTES, options=options, io_open=_refuse)
            except (av.InvalidDataError, av.EOFError) as error:
                raise RefusedError(f"its {self._format} container is damaged: {error.strerror}") from error
            stack.enter_context(container)
            # PyAV asks for invented times where a file has none; times that are not known have to be known as such.
            container.flags &= ~int(av.container.Flags.gen_pts.value)  # type: ignore[call-overload]
            stream = _film(container)
            threads = min(_THREADS.get(stream.codec_context.name, 1), os.cpu_count() or 1)
            stream.thread_type, stream.codec_context.thread_count = "SLICE", threads
            self._work.frame(stream.width or 0, stream.height or 0)
            stream.codec_context.options = {"max_pixels": str(self._work.max_pixels)}
            yield container, stream

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """The packets of the film. Damage that cannot be read past is the end, as for a player."""
        import av

        with contextlib.suppress(av.InvalidDataError):
            for packet in container.demux(stream):
                self._work.packet()
                if packet.size:
                    yield packet

    def _decode(self, stream: Any, packet: Any) -> Iterator[Any]:
        """The frames that come with a packet, or at the end (None). A damaged packet has none."""
        import av

        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError:
            return
        for frame in frames:
            self._work.frame(frame.width, frame.height)
            yield frame

    def _pixels(self, frame: Any) -> np.ndarray:
        """uint8 (h, w, 3) as it is to be seen."""
        pixels = self._to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return _turned(pixels, _display_matrix(frame))

    # ---- by the packets' times

    def _read_packets(self, container: Any, stream: Any) -> None:
        codec = stream.codec_context.name
        hides = _HIDDEN.get(codec, lambda packet: False)
        self._times = times = array("q")  # of each packet, in the order of the file
        self._shown = shown = bytearray()
        keys: list[int] = []
        previous = None
        for packet in self._packets(container, stream):
            if (
                packet.pts is None
                or packet.is_corrupt
                or (packet.dts is not None and previous is not None and packet.dts < previous)
            ):
                self._serial = True  # no times, or a clock that starts again
                return
            previous = packet.dts if packet.dts is not None else previous
            if packet.is_keyframe and (not keys or codec not in _DECODE_THROUGH):
                keys.append(len(times))
            times.append(packet.pts)
            shown.append(not (packet.is_discard or hides(packet)))
        self._keys = keys
        places = sorted((time, place) for place, time in enumerate(times) if shown[place])
        # Frames that start before a key frame at the beginning cannot be decoded, and two of one time not be told apart.
        distinct = all(a[0] < b[0] for a, b in pairwise(places))
        if not places or not distinct or not keys or keys[0] != 0 or places[0][0] < times[0]:
            self._serial = True
            return
        self._frames = array("q", [time for time, _ in places])
        self._places = array("q", [place for _, place in places])  # which packet each frame is
        self.seconds = (np.array(self._frames, np.float64) - self._frames[0]) * self._base
        alone = len(container.streams.video) == 1 and stream.codec_context.pix_fmt in _PLAIN_COLOURS
        even = not (stream.width % 2 or stream.height % 2)  # at odd edges, versions of FFmpeg round colours differently
        self.plain = alone and even and len(places) == len(times)

    def _chosen_frames(self, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(index, frame) of increasing indices, from stretches of packets that each begin with a key frame."""
        stretches: list[list[int]] = []
        for begin, end in sorted((self._key_of(index), self._places[index]) for index in wanted):
            if stretches and begin <= stretches[-1][1] + 1:
                stretches[-1][1] = max(stretches[-1][1], end)
            else:
                stretches.append([begin, end])
        wants = {self._frames[index]: index for index in wanted}
        with self._opened() as (container, stream):
            packets = enumerate(self._packets(container, stream))
            for begin, end in stretches:
                # Pictures between a key frame and those before it may need both; those are never wanted from this key frame.
                first = self._times[begin]
                due = sorted(self._times[place] for place in range(begin, end + 1) if self._shown[place])
                due = due[bisect_left(due, first) :]
                count = 0
                for frame in self._stretch(packets, stream, begin, end):
                    if frame.pts is not None and frame.pts < first:
                        continue
                    if count == len(due) or frame.pts != due[count]:
                        raise Misread("its frames do not come at the times that its packets have")
                    if not count and not (frame.key_frame or frame.pict_type == _INTRA):  # AVI without an index says so of all
                        raise Misread("its key frames are none")
                    count += 1
                    if frame.is_corrupt:  # how it looks depends on what was decoded before
                        raise Misread("some of its frames are damaged")
                    if frame.pts in wants:
                        yield wants[frame.pts], self._pixels(frame)
                if count < len(due):
                    raise Misread("some of its packets hold no frame")

    def _stretch(self, packets: Iterator[tuple[int, Any]], stream: Any, begin: int, end: int) -> Iterator[Any]:
        stream.codec_context.flush_buffers()
        for place, packet in packets:
            if packet.pts != self._times[place]:
                raise Misread("it does not read the same twice")
            if place >= begin:
                yield from self._decode(stream, packet)
            if place == end:
                break
        yield from self._decode(stream, None)

    def _key_of(self, index: int) -> int:
        """The packet from which the frame of this index can be decoded: the last key frame before it in both orders."""
        place, time = self._places[index], self._frames[index]
        for key in reversed(self._keys[: bisect_right(self._keys, place)]):
            if self._times[key] <= time:
                return key
        return 0

    def _looks_plain(self) -> bool:
        """Whether its frames are not mirrored and all of one size, which but for some codecs changes at key frames only."""
        sizes = set()
        with self._opened() as (container, stream):
            if stream.codec_context.name in _ANY_SIZE:
                return False
            stream.codec_context.skip_frame = "NONKEY"
            for packet in chain(self._packets(container, stream), (None,)):
                for frame in self._decode(stream, packet):
                    matrix = _display_matrix(frame)
                    if matrix is not None and matrix[0] * matrix[3] < matrix[1] * matrix[2]:
                        return False
                    sizes.add((frame.width, frame.height))
                    if len(sizes) > 1:
                        return False
        return True

    def _coded_rate(self) -> float:
        """The rate that the codec itself states, which is known once a frame is decoded; 0 if there is none."""
        with self._opened() as (container, stream):
            for packet in chain(self._packets(container, stream), (None,)):
                if next(self._decode(stream, packet), None) is not None:
                    return float(stream.codec_context.framerate or 0)
        return 0.0

    # ---- by decoding everything

    def _all_frames(self) -> Iterator[Any]:
        with self._opened() as (container, stream):
            for packet in self._packets(container, stream):
                yield from self._decode(stream, packet)
            yield from self._decode(stream, None)

    def _decode_all(self) -> None:
        both = [(frame.pts, frame.dts) for frame in self._all_frames()]
        timed = any(pts is not None for pts, _ in both)
        # AVI has times of decoding only, with gaps where frames were left out: a decoder gives its frames at these. Of some
        # codecs FFmpeg knows that a part of the frames is presented then.
        same = all(pts in (None, dts) for pts, dts in both)
        times = [dts if same else pts for pts, dts in both]
        stated = 1 / self.fps if 0 < self.fps < float("inf") else 0.0
        steps = [b - a for a, b in pairwise(times) if a is not None and b is not None and b > a]
        usual = float(np.median(steps)) * self._base if steps and not (timed and stated) else stated
        # Frames may share a tick of a coarse clock; a clock that never moves is none.
        least = 0 if steps else 1
        seconds, previous = [0.0] * len(times), None
        for place, time in enumerate(times):
            if place:
                known = time is not None and previous is not None and time - previous >= least
                seconds[place] = seconds[place - 1] + ((time - previous) * self._base if known else usual)
            previous = time
        self.seconds = np.array(seconds)

    def _serial_frames(self, wanted: set[int]) -> Iterator[tuple[int, np.ndarray]]:
        left = len(wanted)
        for index, frame in enumerate(self._all_frames()):
            if index in wanted:
                yield index, self._pixels(frame)
                left -= 1
            if not left:
                return


def _refuse(url: str, flags: int, options: dict[str, str]) -> Any:
    raise PermissionError("a video may not open another file or address")


def _film(container: Any) -> Any:
    """The stream that a player shows: FFmpeg's choice, but never a cover picture where there is anything else."""
    streams = [stream for stream in container.streams.video if not _is_picture(stream)]
    if not streams:
        raise RefusedError("there is no video stream in it" + (", only a picture" if container.streams.video else ""))
    best = container.streams.best("video")
    moving = [stream for stream in streams if stream.frames != 1] or streams
    return best if best in moving else moving[0]


def _is_picture(stream: Any) -> bool:
    kinds = type(stream.disposition)
    return bool(stream.disposition & (kinds.attached_pic | kinds.timed_thumbnails))


def _hidden_vp8(packet: Any) -> bool:
    return not memoryview(packet)[0] & 0x10


def _hidden_vp9(packet: Any) -> bool:
    data = memoryview(packet)
    if data[-1] & 0xE0 == 0xC0:  # several frames in one packet, of which the last is shown
        return False
    bits = f"{data[0]:08b}"
    bits = bits[4:] if bits[2:4] != "11" else bits[5:]  # behind the marker and the profile
    return bits[0] == "0" and bits[2] == "0"


# By codec: whether a packet holds a frame that is decoded and never shown.
_HIDDEN = {"vp8": _hidden_vp8, "libvpx": _hidden_vp8, "vp9": _hidden_vp9, "libvpx-vp9": _hidden_vp9}


def _turned(pixels: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """A frame, uint8 (h, w, 3), as it is to be seen: turned and mirrored as the display matrix says."""
    if matrix is None:
        return pixels
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        across, down = a < 0, d < 0
    else:
        pixels = pixels.transpose(1, 0, 2)
        across, down = c < 0, b < 0
    return np.ascontiguousarray(pixels[:: -1 if down else 1, :: -1 if across else 1])


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """Where the picture's axes point: x to (a, b), y to (c, d); None if they stay."""
    found = frame.side_data.get("DISPLAYMATRIX")
    if found is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(found)[:36])
    return a, b, c, d
