"""The engine's programs, compiled once for each shape and called as such: nothing is ever compiled behind one's back."""

import os
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..model import SmolVLMForConditionalGeneration
from ..sampling import RowSampling
from ..sharding import activate, batch_sharding
from . import programs
from .settings import EngineConfig

__all__ = ["Programs", "lanes_of", "persistent_cache"]


def lanes_of(mesh: Mesh | None) -> int:
    """How many shards the batch has."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def persistent_cache() -> None:
    """Keep compiled programs on disk, unless the user has said where, or that they do not want it."""
    if jax.config.jax_compilation_cache_dir is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "smolvlm_jax" / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class Programs:
    """Compiled programs by name and shape. `compilations` counts them, `compile_seconds` is what they took, one by one."""

    def __init__(self, model: SmolVLMForConditionalGeneration, params, config: EngineConfig, mesh: Mesh | None):
        self.model, self.config, self.mesh = model, config, mesh
        self.lanes = lanes_of(mesh)
        self.compilations, self.compile_seconds = 0, 0.0
        self._lock = threading.Lock()
        self._done: dict[Hashable, Any] = {}
        self._params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        self.buckets = _prefill_buckets(config)
        self.segments = {t: max(1, min(32, t // 16)) for t in self.buckets}

    # ---- shapes

    def _array(self, shape, dtype, sharding=None) -> jax.ShapeDtypeStruct:
        if self.mesh is not None and sharding is None:
            sharding = batch_sharding(self.mesh, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _replicated(self, shape, dtype) -> jax.ShapeDtypeStruct:
        return self._array(shape, dtype, None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec()))

    def _on_mesh(self, tree):
        """Abstract arrays with the shardings that their class asks for."""
        if self.mesh is None:
            return tree
        put = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec))
        return jax.tree.map(put, tree, tree.specs(self.mesh))

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        vision = self.model.config.vision_config
        return (vision.image_size, vision.image_size, vision.num_channels)

    def _pool(self) -> jax.ShapeDtypeStruct:
        c = self.model.config
        return self._replicated((self.config.feature_places, c.image_seq_len, c.text_config.hidden_size), self.model.dtype)

    def ring(self, length: int) -> programs.RingState:
        slots = self.config.slots[self.config.ring_lengths.index(length)]
        return self._on_mesh(jax.eval_shape(partial(programs.RingState.create, self.model, slots, length)))

    def _rows(self, shape) -> programs.Rows:
        of = partial(self._array, shape)
        f32, i32 = np.float32, np.int32
        return programs.Rows(
            RowSampling(of(bool), of(f32), of(i32), of(f32), of(f32), of(f32), of(np.uint32)), of(i32), of(bool)
        )

    def _prefill_inputs(self, t: int) -> tuple:
        d, s = self.lanes, self.segments[t]
        places = max(1, d * t // self.model.config.image_seq_len)
        packed = self._array((d, t), np.int32)
        return (
            *(self._params, self._pool(), packed, packed),
            *(self._replicated((places,), np.int32), self._replicated((), np.int32)),
            *(self._array((d, s), np.int32), self._rows((d, s))),
        )

    # ---- the programs

    def get(self, *key):
        """The program `key`: ("pool",), ("ring", L), ("encode", N), ("prefill", T), ("insert", T, L), ("decode", L, greedy)."""
        program = self._done.get(key)
        if program is None:
            begin = time.perf_counter()
            with activate(self.mesh) if self.mesh is not None else nullcontext():
                program = self.lower(*key).compile()
            with self._lock:
                self._done[key] = program
                self.compilations += 1
                self.compile_seconds += time.perf_counter() - begin
        return program

    def lower(self, kind: str, *size: int):
        """The program before compilation, for whichever platform the shardings of its arguments are on."""
        return getattr(self, f"_{kind}_program")(*size)

    def _jit(self, function: Callable, out, donate: tuple[int, ...] = ()):
        if self.mesh is None:
            return jax.jit(function, donate_argnums=donate)
        return jax.jit(function, donate_argnums=donate, out_shardings=jax.tree.map(lambda x: x.sharding, out))

    def _pool_program(self):
        pool = self._pool()
        return self._jit(lambda: jnp.zeros(pool.shape, pool.dtype), pool).lower()

    def _ring_program(self, length: int):
        ring = self.ring(length)
        return self._jit(partial(programs.RingState.create, self.model, ring.token.shape[0], length), ring).lower()

    def _encode_program(self, tiles: int):
        pool = self._pool()
        function = self._jit(partial(programs.encode, self.model), pool, donate=(1,))
        slots = self._replicated((tiles,), np.int32)
        return function.lower(self._params, pool, self._array((tiles, *self.tile_shape), np.uint8), slots)

    def prefilled(self, t: int) -> programs.Prefilled:
        inputs = self._prefill_inputs(t)
        return self._on_mesh(jax.eval_shape(partial(programs.prefill, self.model), *inputs))

    def _prefill_program(self, t: int):
        inputs = self._prefill_inputs(t)
        return self._jit(partial(programs.prefill, self.model), self.prefilled(t)).lower(*inputs)

    def _insert_program(self, t: int, length: int):
        ring, lane = self.ring(length), self._array((self.lanes,), np.int32)
        function = self._jit(partial(programs.insert, self.model, self.mesh), ring, donate=(0,))
        return function.lower(ring, self.prefilled(t), lane, lane, lane, lane)

    def _decode_program(self, length: int, greedy: bool):
        ring = self.ring(length)
        report = self._array((ring.token.shape[0], 2 + self.config.chunk), np.int32)
        function = self._jit(partial(programs.decode, self.model, self.config.chunk, greedy), (ring, report), donate=(1,))
        return function.lower(self._params, ring, self._replicated((), np.int32))

    # ---- warm-up

    def encoder_batches(self) -> list[int]:
        """Numbers of tiles the encoder is compiled for, descending."""
        most = self.config.encoder_tiles
        return [self.lanes << k for k in range(most.bit_length() - 1, -1, -1)]

    def keys(self) -> list[tuple]:
        """Every program that any request can need."""
        lengths, lower = self.config.ring_lengths, [0, *self.buckets]
        keys: list[tuple] = [
            ("pool",),
            *(("encode", n) for n in self.encoder_batches()),
            *(("prefill", t) for t in self.buckets),
        ]
        for length in lengths:
            # A packed row beyond `prefill_tokens` holds a single prompt, which needs a ring longer than itself.
            fits = [
                t for t, below in zip(self.buckets, lower, strict=False) if t <= self.config.prefill_tokens or below < length
            ]
            keys += [
                ("ring", length),
                *(("decode", length, greedy) for greedy in (True, False)),
                *(("insert", t, length) for t in fits),
            ]
        return keys

    def warm_up(self, report: Callable[[int, int], None] | None = None) -> None:
        """Compile everything, several programs at a time. `report` is told how many of how many are done."""
        keys = [key for key in self.keys() if key not in self._done]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for done, _ in enumerate(pool.map(lambda key: self.get(*key), keys), 1):
                if report is not None:
                    report(done, len(keys))


def _prefill_buckets(config: EngineConfig) -> list[int]:
    """Lengths of packed rows, ascending: powers of two, `prefill_tokens`, and beyond it what the rings can hold."""
    longest = config.ring_lengths[-1]
    sizes = {config.prefill_tokens, longest, *(n for n in config.ring_lengths if n > config.prefill_tokens)}
    size = 64
    while size < longest:
        sizes.add(size)
        size *= 2
    return sorted(n for n in sizes if n <= longest)
