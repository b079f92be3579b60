"""Which keys of a text_config change what a decoder computes, for the families of decoders that transformers has.

A text_config names its family by `model_type`. Two families are computed: llama, and granite, which is llama with four
multipliers. For all others, and for keys of others in a config of these two, a value that would
change a number is refused, with the name of its key.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .errors import ConfigError

__all__ = ["MULTIPLIERS", "RopeScaling", "check_family", "finite", "require", "split_rope"]

# Of granite, by the default of transformers' GraniteConfig. In a config of another family they mean nothing to transformers,
# and are refused unless they are 1.
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_COMPUTED = ("llama", "granite")
# Why a family that somebody may try is not computed.
_REASONS = {
    "smollm3": "some of its layers have no rotary embedding (no_rope_layers)",
    "qwen2": "its q_proj, k_proj and v_proj have biases",
    "qwen3": "it normalises queries and keys (q_norm, k_norm)",
    "mistral": "it has a sliding window of attention (sliding_window)",
    "phi3": "it joins projections, and scales its rotary embedding (rope_type longrope)",
    "gemma": "it scales embeddings and norms differently",
    "gemma2": "it caps scores and logits (attn_logit_softcapping, final_logit_softcapping)",
    "gemma3_text": "it mixes sliding and full attention (layer_types)",
}


def _off(value: Any) -> bool:
    return not value  # null, false, 0, an empty list


def _one(value: Any) -> bool:
    return not isinstance(value, bool) and value in (None, 1)


def _each(wanted: Any) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, list) and all(item == wanted for item in value))


# Keys of other decoders that change numbers: which values make them like llama's. `None`, the key's absence, always does.
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    # projections
    **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "use_qkv_bias", "attention_out_bias", "use_bias", "bias"), _off),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "qk_layer_norms", "use_qk_layernorm", "clip_qkv"), _off),
    # positions
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_percent"), _one),
    "rotary_dim": _off,
    "rope_interleaved": _off,
    "alibi": _off,
    "no_rope_layers": _each(1),
    "nope_layer_interval": _off,
    "no_rope_layer_interval": _off,
    "layer_types": _each("full_attention"),
    # attention
    **dict.fromkeys(("use_sliding_window", "attn_temperature_tuning", "attention_chunk_size", "attention_sinks"), _off),
    **dict.fromkeys(("query_pre_attn_scalar", "attn_logit_softcapping", "attn_logit_softcap"), _off),
    **dict.fromkeys(("sliding_window_pattern", "use_resampler"), _off),
    # the flow of values through layers
    **dict.fromkeys(("parallel_attn", "use_parallel_residual", "hidden_activation"), _off),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), lambda value: value in (None, 0)),
    **dict.fromkeys(("scale_emb", "scale_depth", "residual_scale", "logit_scale", "lm_head_multiplier"), _one),
    **dict.fromkeys(("final_logit_softcapping", "final_logit_softcap"), _off),
}


def require(condition: bool, what: str) -> None:
    """Raise ConfigError with the message `what` unless the condition holds."""
    if not condition:
        raise ConfigError(what)


def finite(value: Any) -> bool:
    """Whether `value` is a number that a float can hold, and no bool."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def check_family(data: Mapping[str, Any]) -> str:
    """The family of a text_config, "llama" or "granite".

    Args:
        data: the mapping of the file, in either spelling.

    Raises:
        ConfigError: a key stands for something that is not computed here; the message names it.
    """
    family = data.get("model_type") or "llama"
    if family not in _COMPUTED:
        reason = f": {_REASONS[family]}" if isinstance(family, str) and family in _REASONS else ""
        raise ConfigError(
            f"text_config.model_type {family!r} is not supported{reason}; supported are {' and '.join(_COMPUTED)}"
        )
    for key, neutral in _NEUTRAL.items():
        require(
            neutral(data.get(key)),
            f"text_config.{key}={_short(data.get(key))} is not supported: a {family} decoder is computed without it",
        )
    window, switch = data.get("sliding_window"), data.get("use_sliding_window", True)
    require(
        not window or not switch or (finite(window) and window >= _positions(data)),
        f"text_config.sliding_window={_short(window)} is not supported: every token sees the whole context before it",
    )
    if family != "granite":
        for key in MULTIPLIERS:
            require(
                _one(data.get(key)),
                f"text_config.{key}={_short(data.get(key))} is not supported in a {family} decoder; "
                "it belongs to text_config.model_type 'granite'",
            )
    return family


def _positions(data: Mapping[str, Any]) -> float:
    positions = data.get("max_position_embeddings", 2048)
    return positions if finite(positions) else math.inf


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary frequencies that were stretched after pre-training, as transformers' rope_type "linear" or "llama3".

    Attributes:
        rope_type: "linear" divides all frequencies by `factor`. "llama3" divides those of long waves, leaves those of short
            waves, and goes from one to the other in between.
        factor: the divisor.
        low_freq_factor: of llama3: waves longer than the original context divided by this are long.
        high_freq_factor: of llama3: waves shorter than the original context divided by this are short.
        original_max_position_embeddings: of llama3: the context of the pre-training, in tokens.
    """

    rope_type: str
    factor: float = 0.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0

    def __post_init__(self) -> None:
        require(self.rope_type in _ROPE_TYPES, f"rope_type {self.rope_type!r} is none of {', '.join(_ROPE_TYPES)}")
        for name in _ROPE_TYPES[self.rope_type]:
            value = getattr(self, name)
            require(finite(value) and value > 0, f"text_config.rope_scaling.{name} must be a positive number, got {value!r}")
        if self.rope_type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            require(
                low < high,
                f"text_config.rope_scaling.low_freq_factor {low!r} must be less than high_freq_factor {high!r}",
            )

    def to_dict(self) -> dict[str, Any]:
        """The mapping of a config.json."""
        return {name: getattr(self, name) for name in ("rope_type", *_ROPE_TYPES[self.rope_type])}


# Which of its fields a type of scaling needs.
_ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def split_rope(data: dict[str, Any]) -> dict[str, Any]:
    """A text_config with `rope_theta` and `rope_scaling` (a RopeScaling or None), from either spelling.

    transformers 5 writes one mapping, `rope_parameters`; transformers 4 wrote `rope_theta` and `rope_scaling`, and what was
    written under that name is taken first, as there.

    Raises:
        ConfigError: another rope_type, or a key that the type does not have.
    """
    data = dict(data)
    given = {key: data.pop(key, None) for key in ("rope_scaling", "rope_parameters")}
    if isinstance(given["rope_scaling"], RopeScaling):
        return {**data, "rope_scaling": given["rope_scaling"]}
    name, found = next(((key, value) for key, value in given.items() if value), ("rope_parameters", {}))
    require(isinstance(found, Mapping), f"text_config.{name} must be a mapping, got {_short(found)}")
    found = {key: value for key, value in found.items() if value is not None}
    kind = found.pop("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    known = kind == "default" or (isinstance(kind, str) and kind in _ROPE_TYPES)
    require(
        known,
        f"text_config.{name}: rope_type {_short(kind)} is not supported; supported are default, {', '.join(_ROPE_TYPES)}",
    )
    if "rope_theta" in found:
        data["rope_theta"] = found.pop("rope_theta")
    factor = found.pop("partial_rotary_factor", 1)
    require(
        _one(factor), f"text_config.{name}.partial_rotary_factor={_short(factor)} is not supported: whole heads are rotated"
    )
    names = () if kind == "default" else _ROPE_TYPES[kind]
    if "original_max_position_embeddings" in names:
        outside = data.get("original_max_position_embeddings", found.get("original_max_position_embeddings"))
        found["original_max_position_embeddings"] = data.get("max_position_embeddings", 2048) if outside is None else outside
    unknown = sorted(set(found) - set(names))
    require(not unknown, f"text_config.{name}.{unknown[0] if unknown else ''} is no key of rope_type {kind!r}")
    data["rope_scaling"] = None if kind == "default" else RopeScaling(rope_type=kind, **found)
    return data
