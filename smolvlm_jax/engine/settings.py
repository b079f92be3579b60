"""The shapes the engine compiles for: `EngineConfig` as a user gives it, `EngineShapes` with nothing left open."""

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..cache import CacheFormat, check_kv_cache_dtype
from ..errors import InputError
from ..field_types import check_types
from ..generation_notices import warn
from ..habits import named_arguments
from ..model import SmolVLMForConditionalGeneration
from ..pictures import encoder_batch

__all__ = ["ANY_SLOTS", "FREE_MEMORY_SHARE", "RINGS", "EngineConfig", "EngineShapes"]

# Powers of four, and what a split picture wants: up to 17 tiles, 1,200 to 1,500 tokens, and an answer.
RINGS = (256, 1024, 2048, 4096)
_MOST_SLOTS = 256  # by default
# On NVIDIA's GPUs the compiler pads products of other numbers of rows, five kernels more a layer.
_GPU_ROWS = 8
# A ring of so many slots has, on a CPU, a decode program of its own for the first ones, one in so many.
_MANY_SLOTS, _FEW = 16, 8
ANY_SLOTS = 2**16  # at most: the host keeps a list of them
_CPU_CACHE_BYTES = 2 * 10**9
# Fields of `EngineConfig` that are numbers from 1 on.
_FROM_ONE = ("cache_bytes", "prefill_tokens", "encoder_tiles", "chunk", "lookahead", "lookahead_bytes", "feature_places")
FREE_MEMORY_SHARE = 0.6
# Default of a field that `resolve` fills in: None in what a user gives, never in what `resolve` returns.
_CHOSEN: Any = None


@named_arguments
@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine. Every field may be left out: it is then chosen by the model, the memory and the backend.

    Attributes:
        ring_lengths: columns of each KV cache ring, ascending; a request goes to the shortest one that holds its prompt and
            its limit on new tokens, as far as the longest one has room. Default: 256, 1,024, 2,048, 4,096, the model's limit.
        slots: rows of each ring, multiples of the mesh's data shards. Default: what the memory holds, at most 256 a shard, on
            CPU 32. On NVIDIA's GPUs multiples of 8 a shard are faster.
        cache_bytes: of all rings together, from which `slots` follows. Default: 2 GB on CPU, 60 % of what is free elsewhere.
        kv_cache_dtype: "int8" stores keys and values in 8 bits, with a float32 scale for each row, head and column. Default: as
            the model computes.
        prefill_tokens: several prompts are packed into a row of up to so many tokens; longer ones stand alone. Default: 2,048,
            on CPU 512.
        encoder_tiles: tiles that the encoder takes at once, per data shard, a power of two. Default: 16, on CPU 4, and 1 of
            large ones.
        chunk: decode steps per dispatch. Default: 16, on CPU 4.
        run_ahead: chunks that may be under way before the host reads the oldest. Default: 1, on CPU 0.
        lookahead: requests that are read, and whose pictures may be encoded, before there is a slot for them.
        lookahead_bytes: of the arrays of such requests, whatever their number.
        feature_places: tiles whose features are kept on the device, where identical tiles are found again. Default: 128; at
            least twice what the largest request can want.
        keep_special_tokens: whether special tokens, apart from the one that ended the answer, appear in its text.

    Raises:
        ConfigError: a value has the wrong type.
    """

    ring_lengths: tuple[int, ...] = _CHOSEN
    slots: tuple[int, ...] = _CHOSEN
    cache_bytes: int | None = None
    kv_cache_dtype: str | None = None
    prefill_tokens: int = _CHOSEN
    encoder_tiles: int = _CHOSEN
    chunk: int = _CHOSEN
    run_ahead: int = _CHOSEN
    lookahead: int = 128
    lookahead_bytes: int = 2**28
    feature_places: int = _CHOSEN
    keep_special_tokens: bool = False

    def __post_init__(self):
        check_types(self)

    def resolve(self, model: SmolVLMForConditionalGeneration, mesh: Mesh | None) -> "EngineShapes":
        """The sizes for a model on a mesh.

        Args:
            model: as `load` returns it.
            mesh: where its parameters are; None for one device.

        Returns:
            The sizes, none of them left out.

        Raises:
            InputError: for what contradicts the model or the mesh.
        """
        text = model.config.text_config
        # The mesh's own platform: its devices may be ones to compile for only.
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        cpu = platform == "cpu"
        lanes = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        most = text.max_position_embeddings
        lengths = tuple(sorted(set(self.ring_lengths or [n for n in (*RINGS, most) if n < most] + [most])))
        if lengths[0] < 2 or lengths[-1] > most:
            raise InputError(f"ring_lengths must lie between 2 and the model's {most} positions, got {lengths!r:.80}")
        if self.ring_lengths is not None and not self.ring_lengths:
            raise InputError("ring_lengths is empty: name a length, or leave it out")
        if self.ring_lengths and tuple(self.ring_lengths) != lengths:
            raise InputError(
                f"ring_lengths ascend, each of them once, as slots goes by: {lengths}, not {self.ring_lengths!r:.80}"
            )
        if self.slots is not None and self.cache_bytes is not None:
            raise InputError("slots and cache_bytes both say how large the caches are: leave one out")
        for name in _FROM_ONE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.run_ahead is not None and self.run_ahead < 0:
            raise InputError(f"run_ahead must be at least 0, got {self.run_ahead}")
        quantized = check_kv_cache_dtype(self.kv_cache_dtype)
        slots, whole = self.slots, _GPU_ROWS * lanes if platform == "gpu" else lanes
        if slots is None:
            column = CacheFormat(jnp.dtype(jnp.int8 if quantized else model.dtype)).column_bytes(text)
            share = (self.cache_bytes or _cache_bytes(mesh)) // len(lengths)
            cap = min(_MOST_SLOTS * lanes, 32) if cpu else _MOST_SLOTS * lanes
            fitting = [max(min(share // (column * n), cap), lanes) for n in lengths]
            slots = tuple(n - n % (whole if n >= whole else lanes) for n in fitting)
        if len(slots) != len(lengths) or any(not lanes <= n <= ANY_SLOTS or n % lanes for n in slots):
            each = f"a multiple of {lanes} up to {ANY_SLOTS}" if lanes > 1 else f"a number from 1 to {ANY_SLOTS}"
            example = ",".join([str(4 * lanes)] * len(lengths))
            raise InputError(
                f"slots is {slots!r:.80}; it has {each} for each of the {len(lengths)} rings, whose lengths are "
                f"{', '.join(map(str, lengths))}: for example --slots {example}"
            )
        if odd := [n for n in slots if n > whole and n % whole]:
            below, above = odd[0] - odd[0] % whole, odd[0] + -odd[0] % whole
            warn(f"slots {odd[0]}: a step on a GPU starts half more kernels for them than for {below} or {above} slots")
        tiles = self.encoder_tiles or encoder_batch(model.config.vision_config, cpu=cpu)
        if tiles & (tiles - 1):
            raise InputError(f"encoder_tiles must be a power of two, got {tiles}")
        chosen = {
            "ring_lengths": lengths,
            "slots": tuple(slots),
            "prefill_tokens": min(self.prefill_tokens or (512 if cpu else 2048), lengths[-1]),
            "encoder_tiles": tiles,
            "chunk": self.chunk or (4 if cpu else 16),
            "run_ahead": (0 if cpu else 1) if self.run_ahead is None else self.run_ahead,
            # Twice what the largest request can want, so that tiles encoded ahead never stand in the way of the next in turn.
            "feature_places": max(self.feature_places or 128, 2 * (lengths[-1] // model.config.image_seq_len + 1)),
        }
        few = tuple(n // _FEW if cpu and mesh is None and n >= _MANY_SLOTS else 0 for n in slots)
        return EngineShapes(**asdict(self) | chosen, lanes=lanes, few=few)


@dataclass(frozen=True)
class EngineShapes(EngineConfig):
    """What `EngineConfig.resolve` returns: no field is left out.

    Attributes:
        lanes: shards of the batch axis.
        few: for each ring, how many rows its second decode program has, which is for the first slots only; 0 for none. On a
            CPU every row of a step takes its time, whether it has finished or not (figures in docs/design.md); accelerators
            spend most of the time on the weights.
    """

    lanes: int = 1
    few: tuple[int, ...] = ()


def _cache_bytes(mesh: Mesh | None) -> int:
    """Bytes for the caches on all devices of the mesh."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return _CPU_CACHE_BYTES
    return int(FREE_MEMORY_SHARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))) * len(devices)
