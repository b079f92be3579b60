"""Requests before they are admitted: read and prepared in a thread, a bounded number ahead."""

import logging
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from ..errors import InputError, describe
from ..generation_config import GenerationConfig
from ..model import SmolVLMForConditionalGeneration
from ..pictures import check_counts
from .finish import Ending
from .requests import Prepared, Request, prepare
from .rings import RequestState
from .room import Room
from .settings import EngineShapes

__all__ = ["Feed", "Reception"]

_log = logging.getLogger(__name__)


class Reception:
    """Makes arrays of a request, and says what is wrong with it."""

    def __init__(self, model: SmolVLMForConditionalGeneration, processor, shapes: EngineShapes):
        self._config, self._processor, self._shapes = model.config, processor, shapes
        defaults = model.generation_config or GenerationConfig()
        self._sampling, self._stop_tokens = defaults.sampling, frozenset(defaults.stop_tokens)
        if asked := defaults.of_a_call():
            said = ", ".join(f"{name}={value}" for name, value in asked.items())
            _log.warning(
                "generation_config.json: without effect here, where each request says how long its answer is: %s", said
            )

    def __call__(self, request: Request) -> RequestState:
        """Whatever is wrong with the request, or with reading it, is its error."""
        prepared = Prepared.of(np.zeros((0,), np.int32))
        try:
            if request.error is None:
                prepared = self._arrays(request)
                self._check(prepared)
            return self._state(request, prepared)
        except Exception as failure:
            key = request.id if isinstance(request, Request) else None
            return self._state(Request(key, error=describe(failure)), prepared)

    def _state(self, request: Request, prepared: Prepared) -> RequestState:
        decode = lambda ids: self._processor.decode(ids, skip_special_tokens=not self._shapes.keep_special_tokens)
        if request.error is None:
            # What the prompt leaves is the limit. It is at least one token, as `_check` has found.
            limit = min(request.params.max_new_tokens, self._shapes.ring_lengths[-1] - len(prepared.input_ids))
            request = replace(request, params=replace(request.params, max_new_tokens=limit))
        sampling = request.params.sampling(self._sampling)
        ending = Ending(request.params, self._stop_tokens, decode)
        return RequestState(request, prepared, sampling, ending, request.error)

    def _arrays(self, request: Request) -> Prepared:
        """What the request asks, as arrays of the right kinds."""
        prepared = request.prepared
        if request.messages is not None:
            prepared = prepare(self._processor, request.messages, longest=self._shapes.ring_lengths[-1] - 1)
        if not isinstance(prepared, Prepared):
            raise InputError(f"prepared is a {type(prepared).__name__}; it needs a Prepared")
        ids, tiles, digests = np.asarray(prepared.input_ids), np.asarray(prepared.tiles), prepared.digests
        vocabulary, shape = self._config.text_config.vocab_size, self._config.vision_config.tile_shape
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocabulary:
            raise InputError(f"input_ids must be a row of at least one token in [0, {vocabulary})")
        if len(tiles) and (tiles.shape[1:] != shape or tiles.dtype != np.uint8):
            raise InputError(f"tiles are {tiles.dtype} of shape {tiles.shape[1:]}, the model reads uint8 of {shape}")
        if len(tiles) != len(digests) or not all(isinstance(digest, bytes) for digest in digests):
            raise InputError(f"{len(tiles)} tiles have {len(digests)} digests; each needs one")
        return Prepared(ids, tiles, digests)

    def _check(self, prepared: Prepared) -> None:
        """Raise InputError if this prompt can never be answered."""
        length, longest = len(prepared.input_ids), self._shapes.ring_lengths[-1]
        if length >= longest:
            raise InputError(
                f"prompt too long: {length} tokens and an answer of at least one need {length + 1} positions, and there are "
                f"{longest}"
            )
        check_counts(self._config, prepared.input_ids, prepared.tiles)


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
