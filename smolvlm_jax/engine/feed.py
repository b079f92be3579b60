"""Requests before they are admitted: read and prepared in a thread, a bounded number ahead."""

import queue
import threading
from collections.abc import Iterable, Iterator

import numpy as np

from ..errors import InputError, SmolVLMError
from ..generation_config import GenerationConfig
from ..model import SmolVLMForConditionalGeneration
from ..pictures import check_counts
from .finish import Ending
from .requests import Prepared, Request, prepare
from .rings import RequestState
from .room import Room
from .settings import EngineShapes

__all__ = ["Feed", "Reception"]


class Reception:
    """Makes arrays of a request, and says what is wrong with it."""

    def __init__(self, model: SmolVLMForConditionalGeneration, processor, shapes: EngineShapes):
        self._config, self._processor, self._shapes = model.config, processor, shapes
        defaults = model.generation_config or GenerationConfig()
        self._sampling, self._stop_tokens = defaults.sampling, frozenset(defaults.stop_tokens)

    def __call__(self, request: Request) -> RequestState:
        params, prepared, error = request.params, request.prepared, request.error
        try:
            if request.messages is not None:
                prepared = prepare(self._processor, request.messages, longest=self._shapes.ring_lengths[-1] - 1)
            if prepared is not None:
                self._check(prepared, params.max_new_tokens)
        except SmolVLMError as failure:
            error = str(failure)
        decode = lambda ids: self._processor.decode(ids, skip_special_tokens=not self._shapes.keep_special_tokens)
        return RequestState(
            request,
            prepared or Prepared.of(np.zeros((0,), np.int32)),
            params.sampling(self._sampling),
            Ending(params, self._stop_tokens, decode),
            error,
        )

    def _check(self, prepared: Prepared, new: int) -> None:
        """Raise InputError if this prompt with so many new tokens can never be answered."""
        ids, tiles = prepared.input_ids, prepared.tiles
        vocabulary, longest = self._config.text_config.vocab_size, self._shapes.ring_lengths[-1]
        shape = self._config.vision_config.tile_shape
        if len(ids) + new > longest:
            raise InputError(
                f"prompt too long: {len(ids)} tokens and a limit of {new} new ones need {len(ids) + new} positions, and there "
                f"are {longest}"
            )
        if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= vocabulary:
            raise InputError(f"input_ids must be a row of at least one token in [0, {vocabulary})")
        if len(tiles) and tiles.shape[1:] != shape:
            raise InputError(f"tiles have shape {tiles.shape[1:]}, the model reads {shape}")
        if len(tiles) != len(prepared.digests):
            raise InputError(f"{len(tiles)} tiles have {len(prepared.digests)} digests")
        check_counts(self._config, ids, tiles)


class Feed:
    """An iterable of requests as a queue of what `arrive` makes of them, at most `ahead` and `ahead_bytes` of arrays at a time.

    Attributes:
        exhausted: whether the last request was taken.
    """

    def __init__(self, requests: Iterable[Request], arrive: Reception, ahead: int, ahead_bytes: int):
        self._room = Room(ahead_bytes)
        self._queue: queue.Queue[RequestState | None] = queue.Queue(ahead)
        self._leaving = threading.Event()
        self._failure: BaseException | None = None
        self.exhausted = False
        self._thread = threading.Thread(target=self._run, args=(iter(requests), arrive), daemon=True)
        self._thread.start()

    def _run(self, requests: Iterator[Request], arrive: Reception) -> None:
        try:
            for request in requests:
                if not self._put(arrive(request)):
                    return
        except BaseException as error:  # of the caller's iterator: raised where the results are read
            self._failure = error
        finally:
            self._put(None)

    def _put(self, item: RequestState | None) -> bool:
        if item is not None:
            self._room.take(item.prepared.nbytes, self._leaving.is_set)
        while not self._leaving.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def take(self, wait: bool) -> RequestState | None:
        """The next request; None if none has arrived yet or, with `wait`, if none is left. Raises what the iterator raised."""
        if self.exhausted:
            return None
        try:
            item = self._queue.get(block=wait)
        except queue.Empty:
            return None
        if item is not None:
            self._room.give(item.prepared.nbytes)
        else:
            self.exhausted = True
            if self._failure is not None:
                raise self._failure
        return item

    def close(self) -> None:
        """End the thread, unless the caller's iterator blocks it."""
        self._leaving.set()
        self._thread.join(timeout=1)
