"""`SmolVLMConfig`, `SmolVLMVisionConfig`, `SmolVLMTextConfig`: frozen and hashable, Hugging Face `config.json` in and out.

Argument names and defaults are transformers'. Both spellings of a file are read: v4 (`rope_theta`, `torch_dtype`,
`pad_token_id`) and v5 (`rope_parameters`, `dtype`, `_pad_token_id`); published files are sparse (keys equal to the class
default are absent) and carry unrelated keys, which are kept as one JSON string for export and ignored otherwise. A config
takes part in jit as a static argument, so it holds no dict and no list, and two configs that describe the same computation
are equal however their files were spelled.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .io import read_json, write_json

__all__ = ["SmolVLMConfig", "SmolVLMTextConfig", "SmolVLMVisionConfig"]

_EXTRA = "extra"  # the field that keeps unknown keys
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ConfigError(what)


def _positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
        _require(ok, f"{type(config).__name__}.{name} must be a positive integer, got {value!r}")


class _Serializable:
    """Reading and writing shared by the three configs."""

    @classmethod
    def _take(cls, data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split the mapping of a config.json into arguments of this class and everything else."""
        known = {f.name for f in dataclasses.fields(cls)} - {_EXTRA}
        taken = {k: v for k, v in data.items() if k in known}
        rest = {k: v for k, v in data.items() if k not in known}
        # An explicit null means "the default" for every argument whose default is not null itself.
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        taken = {k: v for k, v in taken.items() if v is not None or defaults[k] is None}
        return taken, rest

    @property
    def extra_keys(self) -> dict[str, Any]:
        """Keys of the config.json that mean nothing here, as they were read."""
        return json.loads(getattr(self, _EXTRA))

    def replace(self, **changes):
        """A copy with some arguments changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class SmolVLMVisionConfig(_Serializable):
    """The SigLIP-style image encoder. Defaults are those of the transformers class, not of a published size."""

    hidden_size: int = 1152
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    extra: str = field(default="{}", compare=False, repr=False)

    def __post_init__(self):
        _positive(
            self,
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_channels",
            "image_size",
            "patch_size",
        )
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"vision hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}",
        )
        _require(
            self.image_size >= self.patch_size,
            f"vision image_size {self.image_size} is smaller than patch_size {self.patch_size}: no patch fits",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_patches_per_side(self) -> int:
        """Side of the position table; pixels beyond the last whole patch are never read (384 / 14 = 27, 6 pixels left)."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SmolVLMVisionConfig":
        taken, rest = cls._take(data)
        return cls(**taken, extra=json.dumps(rest, sort_keys=True))

    def to_dict(self, model_type: str = "smolvlm_vision") -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != _EXTRA}
        return {**self.extra_keys, **own, "model_type": self.extra_keys.get("model_type", model_type)}


@dataclass(frozen=True)
class SmolVLMTextConfig(_Serializable):
    """The Llama-style decoder. `num_key_value_heads` and `head_dim` left out are filled in, as in transformers."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    # the model-level switch decides (transformers 5); this one is carried along for older readers
    tie_word_embeddings: bool = field(default=False, compare=False)
    extra: str = field(default="{}", compare=False, repr=False)

    def __post_init__(self):
        _positive(self, "hidden_size", "num_attention_heads")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        object.__setattr__(self, "rope_theta", float(self.rope_theta))
        _positive(self, "vocab_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"text num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        _require(self.head_dim % 2 == 0, f"text head_dim {self.head_dim} is odd: rotary embedding pairs its halves")
        for name in ("attention_bias", "mlp_bias"):
            _require(not getattr(self, name), f"text {name}=true is not supported: no SmolVLM checkpoint has such biases")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SmolVLMTextConfig":
        taken, rest = cls._take(data)
        theta, scaling = _rope(data)
        if theta is not None:
            taken["rope_theta"] = theta
        _require(
            scaling in (None, "default"),
            f"text rope_type {scaling!r} is not supported: SmolVLM uses plain rotary embedding; "
            "remove rope_scaling from config.json if the checkpoint was trained without it",
        )
        for key in ("rope_parameters", "rope_scaling"):
            rest.pop(key, None)
        return cls(**taken, extra=json.dumps(rest, sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != _EXTRA}
        return {
            **self.extra_keys,
            **own,
            "model_type": self.extra_keys.get("model_type", "llama"),
            "rope_scaling": None,
        }


def _rope(data: dict[str, Any]) -> tuple[float | None, str | None]:
    """Base and type of the rotary embedding from either spelling: v5 `rope_parameters`, v4 `rope_theta`/`rope_scaling`."""
    parameters = data.get("rope_parameters") or {}
    scaling = data.get("rope_scaling") or {}
    theta = parameters.get("rope_theta", data.get("rope_theta"))
    kind = parameters.get("rope_type", scaling.get("rope_type", scaling.get("type")))
    return theta, kind


@dataclass(frozen=True)
class SmolVLMConfig(_Serializable):
    """A whole model. `text_config`/`vision_config` left out take the class defaults (text: Llama with eps 1e-5)."""

    vision_config: SmolVLMVisionConfig = field(default_factory=SmolVLMVisionConfig)
    text_config: SmolVLMTextConfig = field(default_factory=lambda: SmolVLMTextConfig(rms_norm_eps=1e-5))
    scale_factor: int = 2
    image_token_id: int = 128257
    tie_word_embeddings: bool = False
    use_cache: bool = True
    model_type: str = "smolvlm"
    pad_token_id: int | None = field(default=128002, compare=False)  # deprecated upstream; the real one is the text config's
    dtype: str | None = field(default=None, compare=False)  # of the stored weights
    extra: str = field(default="{}", compare=False, repr=False)

    def __post_init__(self):
        for name, kind in (("vision_config", SmolVLMVisionConfig), ("text_config", SmolVLMTextConfig)):
            value = getattr(self, name)
            if value is None:
                value = kind() if kind is SmolVLMVisionConfig else SmolVLMTextConfig(rms_norm_eps=1e-5)
            elif isinstance(value, dict):
                value = kind.from_dict(value)
            _require(isinstance(value, kind), f"{name} must be a mapping or a {kind.__name__}, got {type(value).__name__}")
            object.__setattr__(self, name, value)
        _positive(self, "scale_factor")
        _require(
            self.model_type in ("smolvlm", "idefics3"),
            f"model_type {self.model_type!r} is not a SmolVLM: expected 'smolvlm' or 'idefics3'",
        )
        if self.dtype is not None:
            dtype = str(self.dtype).removeprefix("torch.")
            _require(dtype in _DTYPES, f"dtype {self.dtype!r} is none of {', '.join(_DTYPES)}")
            object.__setattr__(self, "dtype", dtype)

    @property
    def image_seq_len(self) -> int:
        """Image tokens per tile after pixel shuffle."""
        return (self.vision_config.num_patches_per_side // self.scale_factor) ** 2

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SmolVLMConfig":
        """Build from the mapping of a config.json, either spelling. Raises ConfigError with the offending key."""
        if not isinstance(data, dict):
            raise ConfigError(f"a config.json holds a mapping, got {type(data).__name__}")
        data = dict(data)
        if "_pad_token_id" in data:
            data.setdefault("pad_token_id", data.pop("_pad_token_id"))
        if "torch_dtype" in data:
            old = data.pop("torch_dtype")
            data.setdefault("dtype", old)
        taken, rest = cls._take(data)
        for key in ("bos_token_id", "eos_token_id"):
            if rest.get(key, 0) is None:
                rest.pop(key)
        try:
            return cls(**taken, extra=json.dumps(rest, sort_keys=True))
        except TypeError as error:
            raise ConfigError(f"config.json: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The mapping of a config.json in the v4 spelling, which every transformers since 4.50 reads; extra keys kept."""
        architecture = "Idefics3" if self.model_type == "idefics3" else "SmolVLM"
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in (_EXTRA, "dtype")}
        if self.dtype is not None:
            own["dtype"] = self.dtype
        own["vision_config"] = self.vision_config.to_dict(f"{self.model_type}_vision")
        own["text_config"] = self.text_config.to_dict()
        defaults = {"architectures": [f"{architecture}ForConditionalGeneration"]}
        return {**defaults, **self.extra_keys, **own}

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike) -> "SmolVLMConfig":
        """Read `config.json` from a directory, or the file itself."""
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        data = read_json(path, error=ConfigError)
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `config.json` into a directory, whole or not at all."""
        write_json(Path(directory) / "config.json", self.to_dict(), sort_keys=True)
