"""`Engine`: continuous batching over static shapes.

Prompts of many requests are packed into one row and run through the decoder together; each is then inserted into a slot of a
ring, where it decodes beside the others until it ends and the slot is given to the next. Tiles of many requests are encoded
at once into a pool of features on the device, identical ones once. The host reads tokens a chunk of steps at a time.
"""

import collections
import contextlib
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..attention import try_kernels
from ..compilation_cache import keep_compiled_programs
from ..errors import InputError
from ..habits import named_arguments
from ..logprobs import TokenLogprobs
from ..model import SmolVLMForConditionalGeneration
from ..parameters import laid_out
from ..pictures import encoder_batches
from ..quantization import is_quantized
from ..retrieval_model import require_text
from ..vision import try_encoder
from .compiled import Programs
from .counters import Counters
from .feed import Feed, Reception
from .finish import measured
from .packing import Pack
from .requests import Request, Result, Score
from .rings import RequestState, Ring
from .scoring import Scorer
from .settings import EngineConfig
from .tiles import TileFeatures

__all__ = ["Engine", "EngineConfig"]


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)


def _silent(doing: str, done: int | None = None, total: int | None = None) -> None:
    """Nobody is told what the engine is doing."""


@dataclass(frozen=True)
class _Event:
    """Something under way on the device: tokens that will be there, and the requests they belong to.

    Attributes:
        prefill: whether it is a prefill, or else a chunk of decode steps.
        tokens: of a prefill (D, S); the report of a chunk.
        logprobs: of the tokens, if one of the requests asks for them.
        owners: of a prefill ((lane, segment), request); of a chunk (slot, request).
        since: when the first of its programs was dispatched.
        doing: what the device does until then, in words.
    """

    prefill: bool
    tokens: jax.Array
    logprobs: TokenLogprobs | None
    owners: Sequence[tuple[Any, RequestState]]
    since: float
    doing: str


@named_arguments
class Engine:
    """Answers requests with one model on one device or mesh.

        engine = Engine.from_pretrained("tiny")
        for result in engine.generate(requests):
            ...

    An answer depends on its request alone: not on the requests beside it, its slot, or the order.

    Attributes:
        config: the shapes in use.
        stats: counters of what was done so far.
        programs: compiled programs.
    """

    def __init__(
        self,
        model: SmolVLMForConditionalGeneration,
        params,
        processor,
        config: EngineConfig | None = None,
        mesh: Mesh | None = None,
        report: Callable[..., None] | None = None,
    ):
        """Args:
        model: as `load` gives it.
        params: likewise.
        processor: as `SmolVLMProcessor.from_pretrained` gives it.
        config: shapes and sizes.
        mesh: where `params` were placed.
        report: called with what the engine is doing, in words, and where there are several of these, with two numbers: which
            one it is, and how many there are.
        """
        require_text(model)
        keep_compiled_programs()
        self.model, self.params, self.processor = model, laid_out(params), processor
        self.config = (config or EngineConfig()).resolve(model, mesh)
        self._report = report or _silent
        self.programs = Programs(model, self.params, self.config, mesh, self._report)
        self.stats = Counters()
        self._tiles = TileFeatures(self.programs, self.params, self.stats)
        self._arrive = Reception(model, processor, self.config)
        self._busy = threading.Lock()
        self._idle_since: float | None = None
        self._reset()

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        base: str | os.PathLike | None = None,
        dtype=None,
        mesh: Mesh | None = None,
        attention: str = "auto",
        check: bool = False,
        report: Callable[..., None] | None = None,
        **config,
    ) -> "Engine":
        """An engine for a checkpoint.

        Args:
            source: a bundled name, a directory, a Hub id, or a PEFT adapter.
            base: as in `load`.
            dtype: as in `load`.
            mesh: of the devices to use.
            attention: as in `load`.
            check: as in `load`.
            report: as above.
            **config: fields of `EngineConfig`.

        Returns:
            The engine, with the checkpoint's processor.

        Raises:
            CheckpointError: as `load` raises it.
            ConfigError: likewise.
            InputError: the sizes contradict the model or the mesh.
        """
        from ..checkpoint import load, resolve, resolve_file
        from ..processing import SmolVLMProcessor

        source = resolve_file(source)
        directory = resolve(source, base=base)
        (report or _silent)("loading the weights")
        with ThreadPoolExecutor(1) as thread:  # the tokenizer is read meanwhile
            processor = thread.submit(SmolVLMProcessor.from_pretrained, directory)
            model, params = load(source, base=base, dtype=dtype, mesh=mesh, attention=attention, check=check)
        return cls(model, params, processor.result(), EngineConfig(**config), mesh, report)

    def warm_up(self, report: Callable[[int, int], None] | None = None) -> None:
        """Compile every program that an answer can need; after this nothing is compiled any more, apart from what
        log-probabilities need, with the first requests that ask for them.

        Args:
            report: called with the numbers of programs done and to do.
        """
        try_kernels(self.model.attention)
        try_encoder(self.model.config.vision_config, self.model.execution, quantized=is_quantized(self.params))
        self.programs.warm_up(report)

    def summary(self) -> dict[str, float]:
        """Figures of what was done so far.

        Returns:
            What `Counters.summary` says, and the number of compilations and their seconds.
        """
        compiled = {"compilations": self.programs.compilations, "compile_seconds": self.programs.compile_seconds}
        return {**self.stats.summary(), **compiled}

    # ---- the loop

    def generate(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Answer requests.

        Args:
            requests: read lazily in a thread, at most `config.lookahead` and `config.lookahead_bytes` ahead of the device.

        Yields:
            Results in the order in which they end. What is wrong with one request, or raised while it is read,
            becomes its result's `error`. Leaving early drops what is under way.

        Raises:
            InputError: another call has not ended, or `requests` is no iterable of requests.
            BaseException: what the iterable raises.
        """
        with self._feed(requests) as feed:
            waiting: deque[RequestState] = deque()
            while True:
                yield from self._receive(feed, waiting)
                dispatched = self._admit(waiting)
                dispatched = self._decode(waiting) or dispatched
                while len(self._under_way) > (self.config.run_ahead if dispatched else 0):
                    yield from self._read(self._under_way.popleft())
                if not self._under_way and self._idle_since is None:
                    self._idle_since = self._clock()
                if not (dispatched or waiting or self._under_way) and feed.exhausted:
                    return

    def loglikelihood(self, requests: Iterable[Request]) -> Iterator[Score]:
        """How probable given continuations are: of each request its `continuation`, after its prompt.

        Prompts and continuations of many requests are packed into one row and run through the decoder once; identical tiles are
        encoded once. Logits exist a block of scored columns at a time. Programs are compiled when they are first needed.

        Args:
            requests: with a `continuation` each, and without sampling parameters; read as in `generate`.

        Yields:
            Scores in the order of the requests. What is wrong with one request becomes its score's `error`.

        Raises:
            InputError: another call has not ended, or `requests` is no iterable of requests.
            BaseException: what the iterable raises.
        """
        with self._feed(requests, continuations=True) as feed:
            yield from Scorer(self.programs, self.params, self._tiles, self.stats, self._clock).run(feed)

    @contextlib.contextmanager
    def _feed(self, requests: Iterable[Request], continuations: bool = False) -> Iterator[Feed]:
        """The requests of a call, while no other call is under way. One that fails or is left early keeps no request."""
        if not self._busy.acquire(blocking=False):
            raise InputError("this engine is already answering: one generate() or loglikelihood() at a time")
        begin = self._clock()
        self._idle_since = begin
        ended = False
        try:
            arrive = functools.partial(self._arrive, continuations=continuations)
            with contextlib.closing(Feed(requests, arrive, self.config.lookahead, self.config.lookahead_bytes // 2)) as feed:
                yield feed
            ended = True
        finally:
            self.stats.seconds += self._clock() - begin
            if not ended:  # also after a failure of the device, which may have taken donated arrays along
                self._reset()
            self._busy.release()

    def _reset(self) -> None:
        """Empty slots and places; what is on the device is forgotten."""
        c = self.config
        sizes = zip(c.ring_lengths, c.slots, strict=True)
        self._rings = [Ring(length, slots=slots, lanes=c.lanes) for length, slots in sizes]
        self._tiles.reset()
        self._under_way: deque[_Event] = deque()
        self._idle_since = None
        self._last_read = 0.0

    def _clock(self) -> float:
        """Seconds by a clock that is stopped while programs compile."""
        return time.perf_counter() - self.programs.compile_seconds

    def _receive(self, feed: Feed, waiting: deque[RequestState]) -> Iterator[Result]:
        """Move what has arrived to `waiting`; requests that cannot be answered yield their error. Waits for an arrival only if
        there is nothing else to do."""
        held = sum(state.prepared.nbytes for state in waiting)
        while not waiting or (len(waiting) < self.config.lookahead and held < self.config.lookahead_bytes // 2):
            nothing = not waiting and not self._under_way and all(ring.idle == ring.slots for ring in self._rings)
            if nothing:
                self._report("waiting for the next record")
            state = feed.take(wait=nothing)
            if state is None:
                return
            if state.error is None:
                waiting.append(state)
                held += state.prepared.nbytes
            else:
                self.stats.errors += 1
                yield state.result()

    # ---- admission

    def _ring_for(self, state: RequestState) -> Ring | None:
        """The shortest ring that holds the request; None if it wants one token only, which the prefill draws."""
        new = state.request.params.max_new_tokens
        need = len(state.prepared.input_ids) + new
        return None if new == 1 else next(ring for ring in self._rings if ring.length >= need)

    def _admit(self, waiting: deque[RequestState]) -> bool:
        """Give waiting requests slots, encode their tiles, prefill and insert them, as many as one packed row per lane
        holds. Returns whether anything was dispatched."""
        if not waiting or not self._worth_it(waiting):
            return False
        lanes = range(self.config.lanes)
        pack = Pack(len(lanes), self.programs.segments, self.config.prefill_tokens)
        for state in list(waiting):
            ring = self._ring_for(state)
            free = [lane for lane in lanes if ring is None or ring.free(lane)]
            if not free:
                continue  # a later request may want another ring
            lane = min(free, key=pack.fill.__getitem__)
            length = pack.length_with(lane, len(state.prepared.input_ids), ring)
            if length is None or not self._tiles.hold(state):
                break
            waiting.remove(state)
            state.started = time.perf_counter()
            pack.add(lane, state, ring, length)
        if not pack.placed:
            return False
        begin = self._clock()
        if self._tiles.new:
            self._tiles.look_ahead(waiting)
        self._compile_for(pack, waiting)
        tiles = len(self._tiles.new)
        self._tiles.encode()
        self._prefill(pack, begin, tiles)
        return True

    def _compile_for(self, pack: Pack, waiting: Sequence[RequestState]) -> None:
        """Compile what these prompts need first, several programs at a time; the others are compiled when they are needed."""
        rings = dict.fromkeys(p.ring for p in pack.placed if p.ring)
        asked = self.programs.alternatives(p.state.request.params.logprobs for p in pack.placed)
        sizes = set(encoder_batches(len(self._tiles.new), self.programs.encoder_batches()))
        keys: list[tuple] = [("encode", size) for size in sorted(sizes)]
        keys += [("prefill", pack.length, *asked), ("pool",)]
        for ring in rings:
            keys += [
                self._decode_key(ring, waiting),
                ("insert", self.programs.columns[pack.length], ring.length),
                ("ring", ring.length),
            ]
        self.programs.compile(keys, self._report)

    def _worth_it(self, waiting: deque[RequestState]) -> bool:
        """Whether to admit now, or to wait until a few more slots are free and share the cost of a prefill."""
        if all(ring.idle == ring.slots for ring in self._rings):
            return True
        return any(ring is None or ring.idle >= slots for ring, slots in self._wanted(waiting).items())

    def _wanted(self, waiting: deque[RequestState]) -> dict[Ring | None, int]:
        """For each ring that a request waits for, the free slots that make an admission worth its prefill."""
        waits = collections.Counter(map(self._ring_for, waiting))
        return {ring: 0 if ring is None else min(count, max(1, ring.slots // 8)) for ring, count in waits.items()}

    # ---- dispatch

    def _prefill(self, pack: Pack, begin: float, tiles: int) -> None:
        """Dispatch the prefill of a pack, and the insertion of its prompts into their rings."""
        t = pack.length
        wanted = self.programs.alternatives(p.state.request.params.logprobs for p in pack.placed)
        packed = pack.arrays(self._tiles.place, self.programs.places(t))
        out = self.programs.get("prefill", t, *wanted)(self.params, self._tiles.pool, packed)
        logprobs, out = out.logprobs, replace(out, logprobs=None)
        for placed in pack.placed:
            self._tiles.release(placed.state)
        for ring in self._rings:
            if any(p.ring is ring for p in pack.placed):
                if ring.state is None:
                    ring.state = self.programs.get("ring", ring.length)()
                put = self.programs.get("insert", self.programs.columns[t], ring.length)
                for arguments in pack.rounds(ring):
                    ring.state = put(ring.state, out, *arguments)
        owners = [((p.lane, p.segment), p.state) for p in pack.placed]
        doing = f"encoding {_number(tiles, 'tile')}" if tiles else f"reading {_number(sum(pack.fill), 'token')} of prompts"
        self._start(_Event(True, out.rows.token, logprobs, owners, begin, doing))
        self.stats.prompt_tokens += sum(pack.fill)
        self.stats.prefill_columns += t * self.config.lanes
        self.stats.tiles += sum(len(p.state.prepared.tiles) for p in pack.placed)
        for placed in pack.placed:
            placed.state.forget_pixels()

    def _decode(self, waiting: deque[RequestState]) -> bool:
        """Dispatch a chunk of steps for every ring with live rows."""
        dispatched = False
        wanted = self._wanted(waiting)
        for ring in self._rings:
            live = ring.live()
            if not live:
                continue
            # At least one: there may be enough free slots already, for prompts that did not fit into this prefill.
            missing = max(1, wanted[ring] - ring.idle) if ring in wanted else 0
            steps, begin = ring.steps(chunk=self.config.chunk, wanted=missing), self._clock()
            program = self.programs.get(*self._decode_key(ring, waiting))
            ring.state, report, logprobs = program(self.params, ring.state, np.asarray(steps, np.int32))
            self._start(_Event(False, report, logprobs, live, begin, f"generating {_number(len(live), 'answer')}"))
            dispatched = True
            self.stats.decode_steps += steps
            self.stats.decode_rows += steps * len(report)
            self.stats.decode_live_rows += steps * len(live)
            self.stats.cache_columns += steps * len(report) * ring.length
            self.stats.cache_live_columns += steps * ring.columns()
            for _, state in live:
                state.steps_left -= steps
                if state.steps_left <= 0:  # it ends with this chunk at the latest: the slot is free for the next
                    state.leave()
        return dispatched

    def _decode_key(self, ring: Ring, waiting: Sequence[RequestState]) -> tuple:
        """The key of the decode program that the ring's requests want."""
        live = ring.live()
        greedy = all(state.sampling.greedy for _, state in live)
        asked = self.programs.alternatives(state.request.params.logprobs for _, state in live)
        return self.programs.decode_key(ring.length, live[-1][0], greedy, *asked, more=bool(waiting))

    def _start(self, event: _Event) -> None:
        """Note what has been dispatched, and have its tokens copied to the host."""
        if self._idle_since is not None:
            self.stats.device_idle_seconds += event.since - self._idle_since
            self._idle_since = None
        for array in jax.tree.leaves((event.tokens, event.logprobs)):
            array.copy_to_host_async()
        self._under_way.append(event)

    # ---- results

    def _read(self, event: _Event) -> Iterator[Result]:
        """Wait for tokens and hand them to their requests."""
        self._report(event.doing)
        tokens, logprobs = jax.device_get((event.tokens, event.logprobs))
        now = self._clock()
        seconds, self._last_read = now - max(event.since, self._last_read), now
        if event.prefill:
            self.stats.prefill_seconds += seconds
        else:
            self.stats.decode_seconds += seconds
        for where, state in event.owners:
            ending = state.ending
            if ending.reason is not None:
                continue  # it has ended, and these steps were dispatched before that was known
            if event.prefill:
                count, new = 1, [int(tokens[where])]
            else:
                count = int(tokens[where, 0]) - len(ending.tokens)
                new = tokens[where, 1 : 1 + count].tolist()
            if ending.push(new, measured(logprobs, where, count, state.request.params.logprobs)):
                state.leave()
                self.stats.requests += 1
                self.stats.new_tokens += len(ending.tokens)
                yield state.result()
