"""`Engine`: continuous batching over static shapes.

Prompts of many requests are packed into one row and run through the decoder together; each is then inserted into a slot of a
ring, where it decodes beside the others until it ends and the slot is given to the next. Tiles of many requests are encoded
at once into a pool of features on the device, identical ones once. The host reads tokens a chunk of steps at a time.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..attention import try_kernels
from ..errors import InputError
from ..model import SmolVLMForConditionalGeneration
from ..pictures import check_counts
from .compiled import Programs, lanes_of, persistent_cache
from .feature_pool import FeaturePlaces
from .feed import Arrival, Feed
from .finish import Ending
from .packing import Pack
from .requests import Request, Result
from .rings import Active, Ring
from .settings import EngineConfig

__all__ = ["Engine", "EngineConfig"]


@dataclass(frozen=True)
class _Event:
    """Something under way on the device: tokens that will be there, and whose they are.

    A prefill's `tokens` are (D, S), and owners come as ((lane, segment), request); a chunk's are its report, owners as
    (slot, request). since: when the first of its programs was dispatched.
    """

    prefill: bool
    tokens: jax.Array
    owners: Sequence[tuple[Any, Active]]
    since: float


class Engine:
    """Answers requests with one model on one device or mesh.

        engine = Engine.from_pretrained("tiny")
        for result in engine.generate(requests):
            ...

    model, params, processor: as `load` and `SmolVLMProcessor.from_pretrained` give them. mesh: where `params` were placed.
    An answer depends on its request alone: not on its neighbours, its slot, or the order.
    """

    def __init__(
        self,
        model: SmolVLMForConditionalGeneration,
        params,
        processor,
        config: EngineConfig | None = None,
        mesh: Mesh | None = None,
    ):
        persistent_cache()
        self.model, self.params, self.processor = model, params, processor
        lanes = lanes_of(mesh)
        self.config = (config or EngineConfig()).resolve(model, params, mesh, lanes)
        self.programs = Programs(model, params, self.config, mesh)
        self._lanes = lanes
        self._stops = frozenset(model.generation_config.eos_token_id if model.generation_config else ())
        self._reset()
        self.stats = dict.fromkeys(_COUNTERS, 0)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, dtype=None, mesh: Mesh | None = None, attention: str = "auto", **config
    ) -> "Engine":
        """An engine for a bundled name, a directory or a Hub id; other keywords are fields of `EngineConfig`."""
        from ..checkpoint import load, resolve
        from ..processing import SmolVLMProcessor

        directory = resolve(source)
        model, params = load(directory, dtype=dtype, mesh=mesh, attention=attention)
        return cls(model, params, SmolVLMProcessor.from_pretrained(directory), EngineConfig(**config), mesh)

    def warm_up(self, report: Callable[[int, int], None] | None = None) -> None:
        """Compile every program that any request can need; after this nothing is compiled any more. `report` is called with
        the numbers of programs done and to do."""
        try_kernels(self.model.attention)
        self.programs.warm_up(report)

    def summary(self) -> dict[str, float]:
        """The counters of `stats`, and shares made of them: of prefill tokens, encoder tiles and decode rows that were
        padding, of cache bytes that live rows used, of the time that the device had nothing to do. Seconds are those of
        `generate` without compilation, which is counted apart."""
        s = self.stats
        share = lambda part, whole: part / whole if whole else 0.0
        padding = lambda used, all_of_it: 1 - used / all_of_it if all_of_it else 0.0
        return {
            **s,
            "compilations": self.programs.compilations,
            "compile_seconds": self.programs.compile_seconds,
            "prefill_padding_share": padding(s["prompt_tokens"], s["prefill_columns"]),
            "encoder_padding_share": padding(s["encoded_tiles"], s["encoder_rows"]),
            "decode_padding_share": padding(s["decode_live_rows"], s["decode_rows"]),
            "live_cache_share": share(s["cache_live_columns"], s["cache_columns"]),
            "device_idle_share": share(s["device_idle_seconds"], s["seconds"]),
        }

    # ---- the loop

    def generate(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Answer requests; results come in the order in which they end.

        requests: read lazily in a thread, at most `config.lookahead` ahead of the device. What is wrong with one request
        becomes its result's `error`; what the iterable raises is raised here. Leaving early drops what is under way. One
        call at a time.
        """
        if self._busy:
            raise InputError("this engine is already answering: one generate() at a time")
        self._busy = True
        begin = self._idle_since = self._clock()
        feed = Feed(requests, self.processor, self.config.lookahead)
        waiting: deque[Arrival] = deque()
        try:
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
        finally:
            feed.close()
            self.stats["seconds"] += self._clock() - begin
            if waiting or self._under_way or any(ring.live() for ring in self._rings):
                self._reset()
            self._busy = False

    def _reset(self) -> None:
        """Empty slots and places; what is on the device is forgotten."""
        c = self.config
        self._rings = [Ring(length, slots, self._lanes) for length, slots in zip(c.ring_lengths, c.slots, strict=True)]
        self._places = FeaturePlaces(c.feature_places)
        self._pool = None
        self._under_way: deque[_Event] = deque()
        self._busy = False
        self._idle_since: float | None = None
        self._last_read = 0.0

    def _clock(self) -> float:
        """Seconds by a clock that stands still while programs compile."""
        return time.perf_counter() - self.programs.compile_seconds

    def _receive(self, feed: Feed, waiting: deque[Arrival]) -> Iterator[Result]:
        """Move arrivals to `waiting`; those that cannot be answered yield their error. Waits only if there is nothing else
        to do."""
        while len(waiting) < self.config.lookahead:
            nothing = not waiting and not self._under_way and all(ring.idle == ring.slots for ring in self._rings)
            arrival = feed.take(wait=nothing)
            if arrival is None:
                return
            error = arrival.error or self._refuse(arrival)
            if error is None:
                waiting.append(arrival)
            else:
                self.stats["errors"] += 1
                tokens, tiles = 0, 0
                if arrival.prepared is not None:
                    tokens, tiles = len(arrival.prepared.input_ids), len(arrival.prepared.tiles)
                yield Result(arrival.request.id, None, error, "error", tokens, 0, tiles)

    def _refuse(self, arrival: Arrival) -> str | None:
        """Why this request can never be answered, if so."""
        prepared, new = arrival.prepared, arrival.request.params.max_new_tokens
        ids, config = prepared.input_ids, self.model.config
        longest = self.config.ring_lengths[-1]
        if len(ids) + new > longest:
            return (
                f"prompt too long: {len(ids)} tokens and a limit of {new} new ones need {len(ids) + new} positions, and there "
                f"are {longest}"
            )
        if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= config.text_config.vocab_size:
            return f"input_ids must be a row of at least one token in [0, {config.text_config.vocab_size})"
        if len(prepared.tiles) and prepared.tiles.shape[1:] != self.programs.tile_shape:
            return f"tiles have shape {prepared.tiles.shape[1:]}, the model reads {self.programs.tile_shape}"
        if len(prepared.tiles) != len(prepared.digests):
            return f"{len(prepared.tiles)} tiles have {len(prepared.digests)} digests"
        try:
            check_counts(config, ids, prepared.tiles)
        except InputError as error:
            return str(error)
        return None

    # ---- admission

    def _ring_for(self, arrival: Arrival) -> Ring | None:
        """The shortest ring that holds the request; None if it wants one token only, which the prefill draws."""
        new = arrival.request.params.max_new_tokens
        need = len(arrival.prepared.input_ids) + new
        return None if new == 1 else next(ring for ring in self._rings if ring.length >= need)

    def _admit(self, waiting: deque[Arrival]) -> bool:
        """Give waiting requests slots, encode their tiles, prefill and insert them, as many as one packed row per lane
        holds. Returns whether anything was dispatched."""
        if not waiting or not self._worth_it(waiting):
            return False
        pack = Pack(self._lanes, self.programs.segments, self.config.prefill_tokens)
        tiles: dict[bytes, np.ndarray] = {}
        for arrival in list(waiting):
            ring = self._ring_for(arrival)
            tokens = len(arrival.prepared.input_ids)
            lanes = [lane for lane in range(self._lanes) if ring is None or ring.free(lane)]
            if not lanes:
                continue  # a later request may want another ring
            lane = min(lanes, key=pack.fill.__getitem__)
            length = pack.bucket(lane, tokens, ring and ring.length)
            if length is None or not self._hold(arrival, tiles):
                break
            waiting.remove(arrival)
            active = self._activate(arrival)
            row = -1 if ring is None else ring.take(lane, active)
            pack.add(lane, active, ring, row, length)
        if not pack.placed:
            return False
        begin = self._clock()
        if tiles:
            self._look_ahead(waiting, tiles)
            self._encode(tiles)
        self._prefill(pack, begin)
        return True

    def _worth_it(self, waiting: deque[Arrival]) -> bool:
        """Whether to admit now, or to wait until a few more slots are free and share the cost of a prefill."""
        if all(ring.idle == ring.slots for ring in self._rings):
            return True
        return any(ring is None or ring.idle >= slots for ring, slots in self._wanted(waiting).items())

    def _wanted(self, waiting: deque[Arrival]) -> dict[Ring | None, int]:
        """For each ring that somebody waits for, the free slots that make an admission worth its prefill."""
        waits = Counter(map(self._ring_for, waiting))
        return {ring: 0 if ring is None else min(count, max(1, ring.slots // 8)) for ring, count in waits.items()}

    def _activate(self, arrival: Arrival) -> Active:
        params = arrival.request.params
        decode = lambda ids: self.processor.decode(ids, skip_special_tokens=not self.config.keep_special_tokens)
        return Active(
            arrival,
            params.sampling(self.model.generation_config),
            Ending(params.stop, params.repetition_window, decode),
            params.max_new_tokens - 1,
        )

    def _hold(self, arrival: Arrival, tiles: dict[bytes, np.ndarray], spare: int = 0) -> bool:
        """Hold a place for each of the request's tiles, noting in `tiles` what must be encoded; False, and nothing held, if
        that leaves less than `spare` places."""
        if arrival.held or not arrival.prepared.digests:
            return True
        unique = dict(zip(arrival.prepared.digests, arrival.prepared.tiles, strict=True))
        if self._places.cost(unique) + spare > self._places.room:
            return False
        for digest in [d for d in unique if self._places.hold(d)]:
            arrival.held.append(digest)
        for digest in unique.keys() - set(arrival.held):
            self._places.take(digest)
            arrival.held.append(digest)
            tiles[digest] = unique[digest]
        return True

    def _look_ahead(self, waiting: deque[Arrival], tiles: dict[bytes, np.ndarray]) -> None:
        """Fill the encoder's last batch with tiles of requests that wait for a slot, as long as half of the places stay free
        for those that come first."""
        most = self.programs.encoder_batches()[0]
        for arrival in waiting:
            if len(tiles) % most == 0 or len(tiles) + len(arrival.prepared.tiles) > -(-len(tiles) // most) * most:
                return
            if not self._hold(arrival, tiles, self.config.feature_places // 2):
                return

    # ---- dispatch

    def _encode(self, tiles: dict[bytes, np.ndarray]) -> None:
        """Encode tiles in batches of the sizes there are programs for, the largest first: only the last may need padding."""
        if self._pool is None:
            self._pool = self.programs.get("pool")()
        left, sizes = list(tiles), self.programs.encoder_batches()
        while left:
            size = next((n for n in sizes if n <= len(left)), sizes[-1])
            now, left = left[:size], left[size:]
            batch = np.zeros((size, *self.programs.tile_shape), np.uint8)
            batch[: len(now)] = np.stack([tiles[digest] for digest in now])
            nowhere = [self.config.feature_places] * (size - len(now))
            places = np.asarray([self._places.place(digest) for digest in now] + nowhere, np.int32)
            self._pool = self.programs.get("encode", size)(self.params, self._pool, batch, places)
            self.stats["encoded_tiles"] += len(now)
            self.stats["encoder_rows"] += size

    def _prefill(self, pack: Pack, begin: float) -> None:
        t = pack.length
        if self._pool is None:
            self._pool = self.programs.get("pool")()
        capacity = max(1, self._lanes * t // self.model.config.image_seq_len)
        arrays = pack.arrays(self.programs.segments[t], self._places.place, capacity)
        out = self.programs.get("prefill", t)(self.params, self._pool, *arrays)
        for placed in pack.placed:
            for digest in placed.active.arrival.held:
                self._places.release(digest)
            placed.active.arrival.held.clear()
        for ring in self._rings:
            if any(p.ring is ring for p in pack.placed):
                if ring.state is None:
                    ring.state = self.programs.get("ring", ring.length)()
                put = self.programs.get("insert", t, ring.length)
                for arguments in pack.rounds(ring):
                    ring.state = put(ring.state, out, *arguments)
        self._start(_Event(True, out.token, [((p.lane, p.segment), p.active) for p in pack.placed], begin))
        self.stats["prompt_tokens"] += sum(pack.fill)
        self.stats["prefill_columns"] += t * self._lanes
        self.stats["tiles"] += sum(len(p.active.arrival.prepared.tiles) for p in pack.placed)

    def _decode(self, waiting: deque[Arrival]) -> bool:
        """Dispatch a chunk of steps for every ring with live rows."""
        dispatched = False
        wanted = self._wanted(waiting)
        for ring in self._rings:
            live = ring.live()
            if not live:
                continue
            # At least one: there may be slots enough already, and what did not fit into the last prefill waits for the next.
            missing = max(1, wanted[ring] - ring.idle) if ring in wanted else 0
            steps, begin = ring.steps(self.config.chunk, missing), self._clock()
            greedy = all(active.sampling.greedy for _, active in live)
            program = self.programs.get("decode", ring.length, greedy)
            ring.state, report = program(self.params, ring.state, np.asarray(steps, np.int32))
            self._start(_Event(False, report, live, begin))
            dispatched = True
            s = self.stats
            s["decode_steps"] += steps
            s["decode_rows"] += steps * ring.slots
            s["decode_live_rows"] += steps * len(live)
            s["cache_columns"] += steps * ring.slots * ring.length
            s["cache_live_columns"] += steps * ring.columns()
            for _, active in live:
                active.left -= steps
                if active.left <= 0:  # it ends with this chunk whatever it says: the slot is free for the next
                    active.leave()
        return dispatched

    def _start(self, event: _Event) -> None:
        if self._idle_since is not None:
            self.stats["device_idle_seconds"] += event.since - self._idle_since
            self._idle_since = None
        event.tokens.copy_to_host_async()
        self._under_way.append(event)

    # ---- results

    def _read(self, event: _Event) -> Iterator[Result]:
        """Wait for tokens and hand them to their requests."""
        tokens = np.asarray(event.tokens)
        now = self._clock()
        phase = "prefill_seconds" if event.prefill else "decode_seconds"
        self.stats[phase] += now - max(event.since, self._last_read)
        self._last_read = now
        for where, active in event.owners:
            if active.done:
                continue
            if event.prefill:
                new = [int(tokens[where])]
            else:
                count = int(tokens[where, 0]) - len(active.ending.tokens)
                new = tokens[where, 2 : 2 + count].tolist()
            reason = self._push(active, new)
            if reason is not None:
                active.done = True
                active.leave()
                yield self._result(active, reason)

    def _push(self, active: Active, tokens: list[int]) -> str | None:
        params = active.arrival.request.params
        for token in tokens:
            ended = active.ending.push(token)
            if token in self._stops and not params.ignore_eos:
                return "stop"
            if ended:
                return active.ending.reason
            if len(active.ending.tokens) == params.max_new_tokens:
                return "length"
        return None

    def _result(self, active: Active, reason: str) -> Result:
        arrival, tokens = active.arrival, active.ending.tokens
        self.stats["requests"] += 1
        self.stats["new_tokens"] += len(tokens)
        return Result(
            id=arrival.request.id,
            text=active.ending.text(self._stops).strip(),
            error=None,
            finish_reason=reason,
            prompt_tokens=len(arrival.prepared.input_ids),
            new_tokens=len(tokens),
            tiles=len(arrival.prepared.tiles),
            token_ids=tuple(tokens),
            seconds=time.perf_counter() - active.started,
        )


_COUNTERS = (
    "requests", "errors", "prompt_tokens", "new_tokens", "tiles", "encoded_tiles", "encoder_rows", "prefill_columns",
    "decode_steps", "decode_rows", "decode_live_rows", "cache_columns", "cache_live_columns", "seconds",
    "prefill_seconds", "decode_seconds", "device_idle_seconds",
)  # fmt: skip
