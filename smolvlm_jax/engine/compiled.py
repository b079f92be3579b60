"""The engine's programs, compiled ahead of time for each shape, so that what is compiled, and when, is known."""

import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..cache import CacheFormat, check_kv_cache_dtype
from ..decoding import DecodeState, RowSettings, Rules
from ..garbage import rare_collections
from ..generation_config import GenerationConfig, Sampling, SamplingParams
from ..model import SmolVLMForConditionalGeneration
from ..parameters import laid_out
from ..quantization import is_quantized
from ..sharding import activate, batch_sharding
from . import programs
from .settings import EngineShapes

__all__ = ["Programs"]


# Prompts of a packed row: one for so many tokens, up to so many.
_SEGMENT_TOKENS = 16
_MOST_SEGMENTS = 32
# Lengths of packed rows between powers of two.
_BETWEEN = (1280, 1536, 1792)
# Alternatives to a token: a program for so many, and for each power of two beyond.
_LEAST_ALTERNATIVES = 8


# A function, its abstract arguments, and the numbers of those that are donated.
_Program = tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]


class Programs:
    """Compiled programs by name and shape.

    Attributes:
        buckets: lengths of packed rows, ascending.
        columns: for each of them, how many columns of keys and values a prefill returns, with zeros behind the row. These are
            few numbers, since each has insertion programs of its own.
        segments: for each of them, how many prompts a row holds at most.
        compilations: how many programs were compiled.
        compile_seconds: that were spent waiting for them.

    Args:
        model, params, mesh: as in `Engine`.
        config: the shapes.
        report: called with "compiling", the number of the program, and how many are wanted at the time.
    """

    def __init__(
        self,
        model: SmolVLMForConditionalGeneration,
        params,
        config: EngineShapes,
        mesh: Mesh | None,
        report: Callable[..., None] | None = None,
    ):
        self.model, self.config, self.mesh = model, config, mesh
        self.compilations, self.compile_seconds = 0, 0.0
        self._lock, self._report = threading.Lock(), report
        self._done: dict[Hashable, Any] = {}
        self._params = laid_out(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params))
        self.columns = _prefill_columns(config)
        self.buckets = list(self.columns)
        self.segments = {t: max(1, min(_MOST_SEGMENTS, t // _SEGMENT_TOKENS)) for t in self.buckets}

    # ---- shapes

    def places(self, t: int) -> int:
        """The most tiles that packed rows of `t` tokens can hold."""
        return max(1, self.config.lanes * t // self.model.config.image_seq_len)

    def few(self, length: int) -> int:
        """How many rows the smaller decode program of a ring has; 0 if there is none."""
        return dict(zip(self.config.ring_lengths, self.config.few, strict=False)).get(length, 0)

    def ring(self, length: int) -> DecodeState:
        """The abstract state of the ring of this length."""
        return self.returns("ring", length)

    def rules(self, *, greedy: bool, logprobs: int | None = None) -> Rules:
        """What a program is compiled for: `greedy` if all rows take the best token without penalty, else rows that each have
        sampling settings of their own; `logprobs` as in `Rules`."""
        rules = Rules.of(self.model.generation_config or GenerationConfig())
        return replace(rules, sampling=Sampling() if greedy else None, logprobs=logprobs)

    def alternatives(self, asked: Iterable[int | None]) -> tuple[()] | tuple[int]:
        """What log-probabilities add to the key of a program: nothing if none of its requests asks for them, else how many
        alternatives to each token it returns, which is one of few numbers.

        Args:
            asked: how many alternatives each request asks for; None for no log-probabilities.
        """
        most = max((count for count in asked if count is not None), default=None)
        if not most:
            return () if most is None else (0,)
        return (min(1 << max(most - 1, _LEAST_ALTERNATIVES - 1).bit_length(), self.model.config.text_config.vocab_size),)

    def _array(self, shape, dtype) -> jax.ShapeDtypeStruct:
        """An abstract array with a first dimension of lanes, rows or tiles."""
        sharding = None if self.mesh is None else batch_sharding(self.mesh, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _replicated(self, shape, dtype) -> jax.ShapeDtypeStruct:
        return self._on_mesh(jax.ShapeDtypeStruct(shape, dtype), replicate=True)

    def _on_mesh(self, tree, *, replicate: bool = False):
        """Abstract arrays with their shardings."""
        mesh = self.mesh
        if mesh is None:
            return tree
        specs = jax.tree.map(lambda _: PartitionSpec(), tree) if replicate else programs.specs(tree, mesh)
        put = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        return jax.tree.map(put, tree, specs)

    # ---- the programs

    def get(self, *key):
        """The program `key`: ("pool",), ("ring", L), ("encode", N), ("prefill", T), ("insert", columns[T], L), ("decode", L,
        greedy), ("decode_few", L, greedy), ("score", T). Prefill and decode have one number more where log-probabilities are
        asked for, see `alternatives`."""
        if key not in self._done:
            self.compile([key], self._report)
        return self._done[key]

    def compile(self, keys: Iterable[tuple], report: Callable[..., None] | None) -> None:
        """Compile what is not compiled yet of some programs, several at a time.

        Args:
            keys: of the programs, as `get` takes them.
            report: as in the constructor.
        """
        missing = [key for key in dict.fromkeys(keys) if key not in self._done]
        begin = time.perf_counter()

        def one(key: tuple) -> None:
            with activate(self.mesh):
                program = self.lower(*key).compile()
            with self._lock:
                self._done[key] = program
                self.compilations += 1

        tell = report or (lambda *_: None)
        if missing:
            tell("compiling", 1, len(missing))
            with rare_collections(), ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(missing))) as pool:
                for done, _ in enumerate(pool.map(one, missing), 1):
                    tell("compiling", min(done + 1, len(missing)), len(missing))
            self.compile_seconds += time.perf_counter() - begin

    def decode_key(self, length: int, last: int, *rest: Any, more: bool) -> tuple:
        """The key of the decode program for a ring of which slot `last` is the last one that is taken.

        The program for the first slots alone is taken where it suffices, unless it would have to be compiled although the other
        one is there, or will be needed soon.

        Args:
            length: of the ring.
            last: number of the slot.
            *rest: of the key.
            more: whether requests wait for slots.
        """
        every, few = ("decode", length, *rest), ("decode_few", length, *rest)
        suffices = last < self.few(length)
        return few if suffices and (few in self._done or not (more or every in self._done)) else every

    def _decode_kinds(self, length: int) -> tuple[str, ...]:
        return ("decode", "decode_few") if self.few(length) else ("decode",)

    def parts(self, kind: str, *size: int) -> _Program:
        """A program's function, its abstract arguments, and the numbers of those that are donated."""
        return getattr(self, f"_{kind}")(*size)

    def lower(self, kind: str, *size: int):
        """The program before compilation, for whichever platform the shardings of its arguments are on."""
        function, arguments, donated = self.parts(kind, *size)
        shardings = None
        if self.mesh is not None:
            shardings = jax.tree.map(lambda x: x.sharding, self.returns(kind, *size))
        options = self._options(kind)
        return jax.jit(function, donate_argnums=donated, out_shardings=shardings, compiler_options=options).lower(*arguments)

    def _options(self, kind: str) -> dict[str, Any] | None:
        """What the compiler is told about a kind of program.

        On NVIDIA's GPUs the products of a decode step go to cuBLAS, which adds the residual by itself: a kernel less in each
        layer. Weights and caches in 8 bits stay with Triton, which converts them on the way; for cuBLAS they would be converted
        before.
        """
        devices = jax.devices() if self.mesh is None else self.mesh.devices.flat
        bytes_only = is_quantized(self._params) or self.config.kv_cache_dtype is not None
        by_cublas = kind == "decode" and devices[0].platform == "gpu" and not bytes_only
        return {"xla_gpu_enable_triton_gemm": False} if by_cublas else None

    def returns(self, kind: str, *size: int):
        """What a program returns, as abstract arrays."""
        function, arguments, _ = self.parts(kind, *size)
        return self._on_mesh(jax.eval_shape(function, *arguments), replicate=kind in ("pool", "encode"))

    # Each of these gives a program's function, its abstract arguments, and which of them are donated.

    def _pool(self) -> _Program:
        c = self.model.config
        shape = (self.config.feature_places, c.image_seq_len, c.text_config.hidden_size)
        return lambda: jnp.zeros(shape, self.model.dtype), (), ()

    def _ring(self, length: int) -> _Program:
        slots = self.config.slots[self.config.ring_lengths.index(length)]
        text, quantized = self.model.config.text_config, check_kv_cache_dtype(self.config.kv_cache_dtype)
        stored = CacheFormat.choose(text, length, self.model.dtype, quantized=quantized, mesh=self.mesh)
        return partial(programs.empty_ring, self.model, self.rules(greedy=False), slots, length, stored), (), ()

    def _encode(self, tiles: int) -> _Program:
        batch, places = (
            self._array((tiles, *self.model.config.vision_config.tile_shape), np.uint8),
            self._replicated((tiles,), np.int32),
        )
        return partial(programs.encode, self.model), (self._params, self.returns("pool"), batch, places), (1,)

    def _tokens(self, t: int) -> programs.PackedTokens:
        tokens = self._array((self.config.lanes, t), np.int32)
        places, num_tiles = self._replicated((self.places(t),), np.int32), self._replicated((), np.int32)
        return programs.PackedTokens(tokens, tokens, places, num_tiles)

    def _prefill(self, t: int, logprobs: int | None = None) -> _Program:
        d, s = self.config.lanes, self.segments[t]
        prompts = self._array((d, s), np.int32)
        settings = jax.tree.map(lambda x: self._array((d, s), x.dtype), RowSettings.of([(SamplingParams(), Sampling())]))
        packed = programs.Packed(self._tokens(t), prompts, prompts, settings)
        function = partial(programs.prefill, self.model, self.rules(greedy=False, logprobs=logprobs), self.columns[t])
        return function, (self._params, self.returns("pool"), packed), ()

    def _score(self, t: int) -> _Program:
        targets = self._array((self.config.lanes, programs.target_columns(t)), np.int32)
        wanted = programs.Targets(targets, targets, self._replicated((), np.int32))
        return partial(programs.score, self.model), (self._params, self.returns("pool"), self._tokens(t), wanted), ()

    def _insert(self, t: int, length: int) -> _Program:
        lane = self._array((self.config.lanes,), np.int32)
        return partial(programs.insert, self.mesh), (self.ring(length), self.returns("prefill", t), lane, lane), (0,)

    def _decode_few(self, length: int, greedy: bool, logprobs: int | None = None) -> _Program:
        function, arguments, donated = self._decode(length, greedy, logprobs)
        return partial(function, first=self.few(length)), arguments, donated

    def _decode(self, length: int, greedy: bool, logprobs: int | None = None) -> _Program:
        rules = self.rules(greedy=bool(greedy), logprobs=logprobs)
        function = partial(programs.decode_chunk, self.model, rules, self.config.chunk)
        return function, (self._params, self.ring(length), self._replicated((), np.int32)), (1,)

    # ---- warm-up

    def encoder_batches(self) -> list[int]:
        """Numbers of tiles the encoder is compiled for, descending."""
        most = self.config.encoder_tiles
        return [self.config.lanes << k for k in range(most.bit_length() - 1, -1, -1)]

    def keys(self) -> list[tuple]:
        """Every program that an answer without log-probabilities can need."""
        inserted = list(dict.fromkeys(self.columns.values()))
        lengths, lower = self.config.ring_lengths, [0, *inserted]
        keys: list[tuple] = [
            ("pool",),
            *(("encode", n) for n in self.encoder_batches()),
            *(("prefill", t) for t in self.buckets),
        ]
        for length in lengths:
            # A packed row beyond `prefill_tokens` holds a single prompt, which needs a ring longer than itself.
            fits = [t for t, below in zip(inserted, lower, strict=False) if t <= self.config.prefill_tokens or below < length]
            keys += [
                ("ring", length),
                *((kind, length, greedy) for kind in self._decode_kinds(length) for greedy in (True, False)),
                *(("insert", t, length) for t in fits),
            ]
        return keys

    def warm_up(self, report: Callable[[int, int], None] | None = None) -> None:
        """Compile everything, several programs at a time.

        Args:
            report: called with the numbers of programs done and to do.
        """
        self.compile(self.keys(), None if report is None else lambda _, done, total: report(done, total))


def _prefill_columns(config: EngineShapes) -> dict[int, int]:
    """Lengths of packed rows, ascending, each with the columns of what its prefill returns.

    Powers of two, `prefill_tokens`, and beyond it what the rings can hold; and steps of a quarter between 1,024 and 2,048,
    where the prompts of split pictures lie: one of them seldom leaves room for another in a row, which would be half padding.
    """
    longest = config.ring_lengths[-1]
    sizes = {config.prefill_tokens, longest, *(n for n in config.ring_lengths if n > config.prefill_tokens)}
    size = 64
    while size < longest:
        sizes.add(size)
        size *= 2
    returned = sorted(n for n in sizes if n <= longest)
    between = [n for n in _BETWEEN if n < longest and n not in sizes]
    return {t: next(n for n in returned if n >= t) for t in sorted([*returned, *between])}
