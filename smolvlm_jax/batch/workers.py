"""Preparing records: payloads to requests with their arrays, in a child process or in the job's own. Imports no jax."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..child import parent
from ..config import SmolVLMConfig
from ..engine.requests import Request, prepare
from ..errors import InputError, JobError, SmolVLMError, describe
from ..generation_config import Sampling, SamplingParams
from ..media_options import PictureOptions
from ..processing import SmolVLMProcessor
from ..processing.options import call_options, open_processor
from ..processing.pdf_pages import with_pages
from ..records.record import Record, with_overrides
from ..records.sources.base import Parser
from .own import Own
from .remarks import notes_of

__all__ = ["LOST", "NO_MEMORY", "OUT_OF_MEMORY", "Preparer", "Setup", "limit_memory", "longest_prompt", "serve"]

# The exit code of a worker that a record took beyond its limit, and the error of the record.
OUT_OF_MEMORY = 77
# With it begins the error of a record that is no fault of the record's: the job ends.
LOST = "the job cannot go on: "
NO_MEMORY = "takes more memory than a record may (--record-memory)"


@dataclass(frozen=True)
class Setup:
    """What all workers of a job are told.

    Attributes:
        directory: Of the checkpoint, for its processor.
        parse: The source's, payload to Record.
        sampling: The job's; the seed of each record is made from its seed.
        pictures: Overrides of the checkpoint's processor.
        longest: Tokens of a prompt, at most; None: the engine decides.
        memory: Bytes that a worker may take for a record; None: any number.
        own: Which columns of a record its row has too.
        defaults: The checkpoint's sampling, which tells what settings of a record have an effect.
    """

    directory: str
    parse: Parser
    sampling: SamplingParams = field(default_factory=SamplingParams)
    pictures: PictureOptions = field(default_factory=PictureOptions)
    longest: int | None = None
    memory: int | None = None
    own: Own = field(default_factory=Own)
    defaults: Sampling | None = None

    def processor(self) -> SmolVLMProcessor:
        """The checkpoint's processor with the job's picture options. Raises InputError and CheckpointError."""
        return open_processor(self.directory, self.pictures)


def longest_prompt(directory: str | os.PathLike, ring_lengths: Sequence[int] | None = None) -> int:
    """Tokens of a prompt, at most, to which a checkpoint has an answer. ring_lengths: as in EngineConfig."""
    positions = SmolVLMConfig.from_pretrained(directory).text_config.max_position_embeddings
    return min(positions, max(ring_lengths or (positions,))) - 1


class Preparer:
    """Makes a request of a payload. Whatever is wrong with the record is the request's error."""

    def __init__(self, setup: Setup):
        self._parse, self._sampling, self._processor = setup.parse, setup.sampling, setup.processor()
        self._own, self._defaults = setup.own, setup.defaults
        self._options = {"longest": setup.longest, **call_options(setup.pictures)}
        # One worker per core: threads inside a worker would only compete with the other workers.
        self._processor.image_processor.num_threads = self._processor.video_processor.num_threads = 1

    def __call__(self, payload: Any) -> Request:
        """The prepared request, under the record's id."""
        try:
            record = self._parse(payload)
        except MemoryError:
            return Request(None, error=NO_MEMORY)
        try:
            own = self._own.of(record.given)
        except InputError as error:
            return Request(record.id, error=str(error))
        except MemoryError:
            return Request(record.id, error=NO_MEMORY)
        return replace(self._request(record), own=own)

    def _request(self, record: Record) -> Request:
        if record.messages is None:
            return Request(record.id, error=record.error)
        try:
            params = with_overrides(self._sampling, record)
            messages = with_pages(record.messages, self._processor.image_processor.limits)
            prepared = prepare(self._processor, messages, **self._options)
            notes = tuple(notes_of(record, self._own.columns, params, self._defaults))
            return Request(record.id, prepared=prepared, params=params, unread=record.unread, notes=notes)
        except MemoryError:
            return Request(record.id, error=NO_MEMORY)
        except JobError as error:
            return Request(record.id, error=LOST + describe(error))
        except Exception as error:  # an unforeseen failure of one record must not end the job
            return Request(record.id, error=describe(error))


def serve() -> None:
    """In the child: answer the Setup with None or with what is wrong with it, then each payload with its request."""
    channel = parent()
    setup = channel.receive()
    try:
        preparer = Preparer(setup)
    except SmolVLMError as error:
        return channel.send(str(error))
    if setup.memory is not None:
        limit_memory(setup.memory)
    channel.send(None)
    with contextlib.suppress(ConnectionError):  # the job has ended
        for payload in channel.messages():
            request = preparer(payload)
            if request.error == NO_MEMORY:
                os._exit(OUT_OF_MEMORY)  # what an earlier record left here may be why: the next worker tries again
            channel.send(request)


def limit_memory(size: int) -> None:
    """Let this process, and those that it starts, take so many bytes more than it has now. Only on Linux this has an effect."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/status") as status:
            (used,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = used + int(size) if most == resource.RLIM_INFINITY else min(used + int(size), most)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
