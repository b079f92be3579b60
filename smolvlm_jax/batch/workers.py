"""A worker: a process of its own that makes arrays of records. It imports no jax, and may be killed at any moment.

Over one socket it is told how (Setup), says that it is ready, and then answers each payload with a Made. Tiles follow their
Made as raw bytes. Nothing lies in shared memory, so nothing is left behind, whoever dies.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..engine.requests import Prepared, prepare
from ..errors import SmolVLMError
from ..generation_config import SamplingParams
from ..records.record import Record, with_overrides

__all__ = ["Made", "Preparer", "Setup", "receive", "serve"]


@dataclass(frozen=True)
class Setup:
    """What every worker of a job does. directory: of the checkpoint, for its processor. parse: the source's, payload to
    Record. sampling: the job's, whose seed each record's own is made from. picture_options: overrides of the processor."""

    directory: str
    parse: Callable[[Any], Record]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    picture_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """A record after preparation: either error is None, or prepared is."""

    id: str | int
    params: SamplingParams
    prepared: Prepared | None
    error: str | None = None


class Preparer:
    """The work itself, wherever it runs: a payload to a Made, whatever is wrong with the record."""

    def __init__(self, setup: Setup):
        from ..processing import SmolVLMProcessor

        self._parse, self._sampling = setup.parse, setup.sampling
        self._processor = SmolVLMProcessor.from_pretrained(setup.directory, **setup.picture_options)
        # One worker per core: threads inside would only get in each other's way.
        self._processor.image_processor.num_threads = self._processor.video_processor.num_threads = 1

    def __call__(self, payload: Any) -> Made:
        record = self._parse(payload)
        if record.error is not None:
            return Made(record.id, self._sampling, None, record.error)
        try:
            params = with_overrides(self._sampling, record)
            return Made(record.id, params, prepare(self._processor, record.messages))
        except SmolVLMError as error:
            return Made(record.id, self._sampling, None, str(error))
        except Exception as error:  # one record must not end the job, whatever it brings to light
            return Made(record.id, self._sampling, None, f"{type(error).__name__}: {error}")


def serve(descriptor: int) -> None:
    """The worker's life, on one end of a socket pair: until the other end is closed."""
    from multiprocessing.connection import Connection

    _die_with_parent()
    connection = Connection(descriptor)
    try:
        try:
            preparer = Preparer(connection.recv())
        except SmolVLMError as error:
            return connection.send(str(error))
        connection.send(None)
        while True:
            _send(connection, preparer(connection.recv()))
    except (EOFError, ConnectionError):
        pass  # the job is gone


def _send(connection, made: Made) -> None:
    tiles = None if made.prepared is None else made.prepared.tiles
    if tiles is None or not tiles.size:
        connection.send((made, None))
        return
    # Pixels go past the pickler and straight into an array on the other side: megabytes for every picture.
    light = replace(made, prepared=replace(made.prepared, tiles=np.zeros((0, 0, 0, 3), np.uint8)))
    connection.send((light, tiles.shape))
    view = memoryview(np.ascontiguousarray(tiles)).cast("B")
    while view:
        view = view[os.write(connection.fileno(), view) :]


def receive(connection) -> Made:
    """The other side of `_send`."""
    made, shape = connection.recv()
    if shape is None:
        return made
    tiles = np.empty(shape, np.uint8)
    view = memoryview(tiles).cast("B")
    while view:
        count = os.readv(connection.fileno(), [view])
        if not count:
            raise EOFError
        view = view[count:]
    return replace(made, prepared=replace(made.prepared, tiles=tiles))


def _die_with_parent() -> None:
    """A job that is killed takes its workers along, even one that hangs in a decoder.

    Linux does it for us; elsewhere a thread waits for the end of standard input, which nobody ever writes to.
    """
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        except (OSError, AttributeError):
            pass

    def watch():
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
