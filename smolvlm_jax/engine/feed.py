"""Requests before they are admitted: read and prepared in a thread, a bounded number ahead."""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from ..errors import InputError, describe
from ..generation_config import GenerationConfig, SamplingParams
from ..generation_notices import unread, warn
from ..model import SmolVLMForConditionalGeneration
from ..pictures import check_counts
from .finish import Ending
from .requests import Prepared, Request, continuation_ids, prepare
from .rings import RequestState
from .room import Room
from .settings import EngineShapes

__all__ = ["Feed", "Reception"]

_log = logging.getLogger(__name__)
_REQUEST = "Request(id, messages=…)"


class Reception:
    """Makes arrays of a request, and says what is wrong with it."""

    def __init__(self, model: SmolVLMForConditionalGeneration, processor, shapes: EngineShapes):
        self._config, self._processor, self._shapes = model.config, processor, shapes
        defaults = model.generation_config or GenerationConfig()
        self._sampling, self._stop_tokens = defaults.sampling, frozenset(defaults.stop_tokens)
        self._told: set[str] = set()
        if asked := defaults.of_a_call():
            said = ", ".join(f"{name}={value}" for name, value in asked.items())
            _log.warning(
                "generation_config.json: without effect here, where each request says how long its answer is: %s", said
            )

    def __call__(self, request: Request, *, continuations: bool = False) -> RequestState:
        """Whatever is wrong with the request, or with reading it, is its error.

        Args:
            request: what is asked.
            continuations: whether its continuation is to be scored, or else its prompt to be answered.
        """
        prepared = Prepared.of(np.zeros((0,), np.int32))
        continuation: tuple[int, ...] = ()
        try:
            if not isinstance(request, Request):
                raise InputError(f"a request is a {type(request).__name__}: pass {_REQUEST}")
            if not isinstance(request.params, SamplingParams):
                kind = type(request.params).__name__
                raise InputError(f"params is a {kind}: pass SamplingParams(max_new_tokens=64), say")
            if request.error is None:
                continuation = self._continuation(request, continuations)
                prepared = self._arrays(request, self._shapes.ring_lengths[-1] - _after(continuation))
                self._check(prepared, continuation)
                if continuation:
                    rest = np.asarray(continuation[:-1], np.int32)
                    prepared = replace(prepared, input_ids=np.concatenate([prepared.input_ids, rest]))
            return self._state(request, prepared, continuation)
        except Exception as failure:
            key = request.id if isinstance(request, Request) else None
            return self._state(Request(key, error=describe(failure)), prepared)

    def _continuation(self, request: Request, wanted: bool) -> tuple[int, ...]:
        """The tokens to score; none of a request that is to be answered."""
        given = request.continuation
        if not wanted:
            if given is not None:
                raise InputError("the request has a continuation, which generate() does not read: loglikelihood() scores it")
            return ()
        if given is None:
            raise InputError("the request has no continuation: loglikelihood() scores one, generate() answers")
        if request.params != SamplingParams():
            raise InputError("the request has sampling parameters: a continuation is scored by the model's own distribution")
        ids = np.asarray(continuation_ids(self._processor, given) if isinstance(given, str) and given else list(given))
        vocabulary, image = self._config.text_config.vocab_size, self._config.image_token_id
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocabulary:
            raise InputError(f"continuation must be a text, or a row of token ids in [0, {vocabulary}), and not empty")
        if (ids == image).any():
            raise InputError("the continuation has an image token, and no pictures of its own")
        return tuple(ids.tolist())

    def _state(self, request: Request, prepared: Prepared, continuation: tuple[int, ...] = ()) -> RequestState:
        decode = lambda ids: self._processor.decode(ids, skip_special_tokens=not self._shapes.keep_special_tokens)
        if request.error is None and not continuation:
            # What the prompt leaves is the limit. It is at least one token, as `_check` has found.
            limit = min(request.params.max_new_tokens, self._shapes.ring_lengths[-1] - len(prepared.input_ids))
            request = replace(request, params=replace(request.params, max_new_tokens=limit))
        sampling = request.params.sampling(self._sampling)
        idle = unread(sampling, request.params.without_effect(self._sampling))
        for name in [name for name in idle if name not in self._told]:  # once, and not with every request
            self._told.add(name)
            warn(idle[name])
        ending = Ending(request.params, self._stop_tokens, decode)
        return RequestState(request, prepared, sampling, ending, request.error, continuation=continuation)

    def _arrays(self, request: Request, longest: int) -> Prepared:
        """What the request asks, as arrays of the right kinds."""
        prepared = request.prepared
        if request.messages is not None:
            prepared = prepare(self._processor, request.messages, longest=longest)
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

    def _check(self, prepared: Prepared, continuation: tuple[int, ...]) -> None:
        """Raise InputError if this prompt can never be answered, or its continuation scored."""
        length, longest = len(prepared.input_ids), self._shapes.ring_lengths[-1]
        if length + _after(continuation) > longest:
            what = f"a continuation of {len(continuation)}" if continuation else "an answer of at least one"
            raise InputError(
                f"prompt too long: {length} tokens and {what} need {length + _after(continuation)} positions, and there are "
                f"{longest}"
            )
        check_counts(self._config, prepared.input_ids, prepared.tiles)


def _after(continuation: tuple[int, ...]) -> int:
    """Positions that are needed after a prompt: an answer has one token at least, the last of a continuation is not read."""
    return len(continuation) - 1 if continuation else 1


class Feed:
    """An iterable of requests as a queue of what `arrive` makes of them, at most `ahead` and `ahead_bytes` of arrays at a time.

    Attributes:
        exhausted: whether the last request was taken.
    """

    def __init__(self, requests: Iterable[Request], arrive: Callable[[Request], RequestState], ahead: int, ahead_bytes: int):
        if isinstance(requests, str | bytes | Mapping) or not (
            hasattr(requests, "__iter__") or hasattr(requests, "__getitem__")
        ):
            raise InputError(f"the requests are a {type(requests).__name__}: pass a list or an iterator of {_REQUEST}")
        self._room = Room(ahead_bytes)
        self._queue: queue.Queue[RequestState | None] = queue.Queue(ahead)
        self._leaving = threading.Event()
        self._failure: BaseException | None = None
        self.exhausted = False
        self._thread = threading.Thread(target=self._run, args=(iter(requests), arrive), daemon=True)
        self._thread.start()

    def _run(self, requests: Iterator[Request], arrive: Callable[[Request], RequestState]) -> None:
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

    def take(self, wait: bool, patience: float = 0.0) -> RequestState | None:
        """The next request; None if none has arrived within `patience` seconds or, with `wait`, if none is left. Raises what
        the iterator raised."""
        if self.exhausted:
            return None
        try:
            item = self._queue.get(block=wait or patience > 0, timeout=None if wait else patience)
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
