"""Preparing records: payloads to requests with their arrays, in a child process or in the job's own. Imports no jax."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..child import parent
from ..engine.requests import Request, prepare
from ..errors import SmolVLMError, describe
from ..generation_config import SamplingParams
from ..processing import SmolVLMProcessor
from ..records.record import Record, with_overrides
from .config import PictureOptions

__all__ = ["Preparer", "Setup", "serve"]


@dataclass(frozen=True)
class Setup:
    """What all workers of a job are told.

    Attributes:
        directory: Of the checkpoint, for its processor.
        parse: The source's, payload to Record.
        sampling: The job's; the seed of each record is made from its seed.
        pictures: Overrides of the checkpoint's processor.
    """

    directory: str
    parse: Callable[[Any], Record]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    pictures: PictureOptions = field(default_factory=PictureOptions)

    def processor(self) -> SmolVLMProcessor:
        """The checkpoint's processor with the job's picture options. Raises InputError and CheckpointError."""
        return SmolVLMProcessor.from_pretrained(self.directory, **self.pictures.given())


class Preparer:
    """Makes a request of a payload. Whatever is wrong with the record is the request's error."""

    def __init__(self, setup: Setup):
        self._parse, self._sampling, self._processor = setup.parse, setup.sampling, setup.processor()
        # One worker per core: threads inside a worker would only compete with the other workers.
        self._processor.image_processor.num_threads = self._processor.video_processor.num_threads = 1

    def __call__(self, payload: Any) -> Request:
        """The prepared request, under the record's id."""
        record = self._parse(payload)
        if record.messages is None:
            return Request(record.id, error=record.error)
        try:
            params = with_overrides(self._sampling, record)
            prepared = prepare(self._processor, record.messages)
            return Request(record.id, prepared=prepared, params=params, unread=record.unread)
        except Exception as error:  # an unforeseen failure of one record must not end the job
            return Request(record.id, error=describe(error))


def serve() -> None:
    """In the child: answer the Setup with None or with what is wrong with it, then each payload with its request."""
    channel = parent()
    try:
        preparer = Preparer(channel.receive())
    except SmolVLMError as error:
        return channel.send(str(error))
    channel.send(None)
    with contextlib.suppress(ConnectionError):  # the job has ended
        for payload in channel.messages():
            channel.send(preparer(payload))
