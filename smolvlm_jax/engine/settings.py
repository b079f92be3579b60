"""`EngineConfig`: the shapes the engine compiles for, chosen by the model and the backend where nothing is said."""

from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh

from ..errors import InputError
from ..model import SmolVLMForConditionalGeneration

__all__ = ["EngineConfig"]

# Powers of four, and what a split picture wants: up to 17 tiles, 1,200 to 1,500 tokens, and an answer.
_RINGS = (256, 1024, 2048, 4096)
_MOST_SLOTS = 256


@dataclass(frozen=True)
class EngineConfig:
    """Every field may be left out.

    ring_lengths: columns of each KV cache ring, ascending; a request goes to the shortest one that holds its prompt and its
    limit on new tokens. Default 256, 1,024, 2,048, 4,096 and the model's limit.
    slots: rows of each ring, multiples of the mesh's data shards. Default: what the memory holds, at most 256.
    cache_bytes: of all rings together, from which `slots` follows. Default: 2 GB on CPU, 60 % of what is free elsewhere.
    prefill_tokens: several prompts are packed into a row of up to so many tokens; longer ones stand alone.
    encoder_tiles: tiles the encoder takes at once, per data shard, a power of two.
    chunk: decode steps per dispatch. run_ahead: chunks that may be under way before the host reads the oldest.
    lookahead: requests that are read, and whose pictures may be encoded, before there is a slot for them.
    feature_places: tiles whose features are kept on the device, where equal tiles are found again.
    keep_special_tokens: whether special tokens, apart from the one that ended the answer, appear in its text.
    """

    ring_lengths: tuple[int, ...] | None = None
    slots: tuple[int, ...] | None = None
    cache_bytes: int | None = None
    prefill_tokens: int | None = None
    encoder_tiles: int | None = None
    chunk: int | None = None
    run_ahead: int | None = None
    lookahead: int = 128
    feature_places: int | None = None
    keep_special_tokens: bool = False

    def resolve(self, model: SmolVLMForConditionalGeneration, params, mesh: Mesh | None, lanes: int) -> "EngineConfig":
        """The same with every field set. Raises InputError for what contradicts the model or the mesh."""
        text, cpu = model.config.text_config, jax.default_backend() == "cpu"
        most = text.max_position_embeddings
        lengths = tuple(self.ring_lengths or [n for n in (*_RINGS, most) if n < most] + [most])
        lengths = tuple(sorted(set(lengths)))
        if lengths[0] < 2 or lengths[-1] > most:
            raise InputError(f"ring_lengths must lie between 2 and the model's {most} positions, got {lengths}")
        slots = self.slots
        if slots is None:
            column = (
                2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * jax.numpy.dtype(model.dtype).itemsize
            )
            share = (self.cache_bytes or _cache_bytes(params, mesh)) // len(lengths)
            cap = min(_MOST_SLOTS * lanes, 32) if cpu else _MOST_SLOTS * lanes
            slots = tuple(max(min(share // (column * n), cap) // lanes * lanes, lanes) for n in lengths)
        if len(slots) != len(lengths) or any(n < 1 or n % lanes for n in slots):
            raise InputError(f"slots needs one multiple of {lanes} for each of the rings {lengths}, got {slots}")
        tiles = self.encoder_tiles or (4 if cpu else 16)
        if tiles & (tiles - 1):
            raise InputError(f"encoder_tiles must be a power of two, got {tiles}")
        prefill = min(self.prefill_tokens or (512 if cpu else 2048), lengths[-1])
        for name in ("chunk", "lookahead"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        return replace(
            self,
            ring_lengths=lengths,
            slots=tuple(slots),
            prefill_tokens=prefill,
            encoder_tiles=tiles,
            chunk=self.chunk or (4 if cpu else 16),
            run_ahead=(0 if cpu else 1) if self.run_ahead is None else self.run_ahead,
            # Twice what the largest request can want, so that tiles encoded ahead never stand in the way of the next in turn.
            feature_places=max(self.feature_places or 128, 2 * (lengths[-1] // model.config.image_seq_len + 1)),
        )


def _cache_bytes(params, mesh: Mesh | None) -> int:
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return 2 * 10**9
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return int(0.6 * free) * (1 if mesh is None else len(devices))
