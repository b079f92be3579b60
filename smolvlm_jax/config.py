"""`SmolVLMConfig`, `SmolVLMVisionConfig`, `SmolVLMTextConfig`: frozen and hashable, Hugging Face `config.json` in and out.

Argument names and defaults are transformers'. Both spellings of a file are read: v4 (`rope_theta`, `torch_dtype`,
`pad_token_id`) and v5 (`rope_parameters`, `dtype`, `_pad_token_id`). Published files are sparse (keys equal to the class
default are absent) and carry unrelated keys, which are kept as one JSON string for export and ignored otherwise. A config
takes part in jit as a static argument, so it holds no dict and no list, and two configs that describe the same computation
are equal however their files were spelled.
"""

import math
from dataclasses import field
from typing import Any, ClassVar, Self

from .config_base import Config, config_class, is_id
from .dtypes import FLOATS, name_fields
from .errors import ConfigError
from .text_families import MULTIPLIERS, RopeScaling, check_family, require, split_rope

__all__ = ["SmolVLMConfig", "SmolVLMTextConfig", "SmolVLMVisionConfig"]

# Default of a field that `__post_init__` fills in: None where it is given, never where it is read.
_DERIVED: Any = None


@config_class
class SmolVLMVisionConfig(Config):
    """The SigLIP-style image encoder. Defaults are those of the transformers class, not of a published size.

    Attributes:
        hidden_size: width of a patch.
        intermediate_size: width inside the MLP.
        num_hidden_layers: layers.
        num_attention_heads: heads, of hidden_size / num_attention_heads each.
        num_channels: colours of a pixel.
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        hidden_act: activation of the MLP.
        layer_norm_eps: added to the variance in norms.
        attention_dropout: kept, without effect.
        initializer_range: standard deviation of random weights.

    Raises:
        ConfigError: a value that no encoder can have.
    """

    KEY: ClassVar[str] = "vision_config"
    UNSAID: ClassVar[dict[str, Any]] = {"model_type": "smolvlm_vision"}
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

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size"):  # a pair stands for a height and a width
            value = getattr(self, name)
            if isinstance(value, (list, tuple)) and len(value) == 2:
                require(value[0] == value[1], self._wants(name, "a number, or a pair of equal ones: tiles are square"))
                self._set(**{name: value[0]})
        self._require_positive("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        self._require_positive("num_channels", "image_size", "patch_size")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"vision hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}",
        )
        require(
            self.image_size >= self.patch_size,
            f"vision image_size {self.image_size} is smaller than patch_size {self.patch_size}: no patch fits",
        )
        self._require_numbers("layer_norm_eps", "attention_dropout", "initializer_range")
        self._require_activation("hidden_act")

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_patches_per_side(self) -> int:
        """Side of the position table. Pixels beyond the last whole patch are not read (384 / 14 = 27, 6 pixels left)."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a tile."""
        return self.num_patches_per_side**2

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a tile."""
        return (self.image_size, self.image_size, self.num_channels)

    def to_dict(self, model_type: str = "smolvlm_vision") -> dict[str, Any]:
        """The mapping of a config.json.

        Args:
            model_type: to write if the file that this was read from named none.

        Returns:
            Keys and values in the v4 spelling.
        """
        return {"model_type": model_type, **super().to_dict()}


@config_class
class SmolVLMTextConfig(Config):
    """The Llama-style decoder.

    Attributes:
        vocab_size: tokens v.
        hidden_size: width of a token.
        intermediate_size: width inside the MLP.
        num_hidden_layers: layers.
        num_attention_heads: heads of queries.
        num_key_value_heads: heads of keys and values. Default: as many as of queries.
        head_dim: size of a head. Default: hidden_size / num_attention_heads.
        hidden_act: activation of the MLP.
        max_position_embeddings: tokens that a prompt and its answer may have.
        initializer_range: standard deviation of random weights.
        rms_norm_eps: added to the mean square in norms.
        rope_theta: base of the rotary embedding.
        rope_scaling: scaling of its frequencies, if there is any.
        embedding_multiplier: of token embeddings, in "granite".
        attention_multiplier: of scores; None, as in "llama", is 1 / √head_dim.
        residual_multiplier: of what a layer adds, in "granite".
        logits_scaling: kept, without effect: transformers divides logits by it in GraniteForCausalLM, but not in the classes
            of smolvlm and idefics3.
        attention_bias: only False.
        attention_dropout: kept, without effect.
        mlp_bias: only False.
        pad_token_id: of padding.
        bos_token_id: of the beginning.
        eos_token_id: of the end; one or several.
        tie_word_embeddings: kept for older readers; that of the whole model counts.
        model_type: family of decoders, "llama", or "granite", which is llama with multipliers.

    Raises:
        ConfigError: a value that no decoder can have.
    """

    KEY: ClassVar[str] = "text_config"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = _DERIVED
    head_dim: int = _DERIVED
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    # the model-level switch decides (transformers 5); this one is carried along for older readers
    tie_word_embeddings: bool = field(default=False, compare=False)
    model_type: str = "llama"

    def __post_init__(self) -> None:
        self._require_positive("hidden_size", "num_attention_heads")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in ("pad_token_id", "bos_token_id"):
            value = getattr(self, name)
            require(value is None or is_id(abs(value) if isinstance(value, int) else value), self._wants(name, "an id or null"))
        if isinstance(self.eos_token_id, (list, tuple)):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        ids = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        fits = all(map(is_id, ids)) or self.eos_token_id is None
        require(fits, self._wants("eos_token_id", "an id, a list of ids, or null"))
        require(
            self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling),
            self._wants("rope_scaling", "a RopeScaling or None"),
        )
        self._check_multipliers()
        self._require_numbers("rope_theta", "rms_norm_eps", "attention_dropout", "initializer_range")
        self._require_flags("attention_bias", "mlp_bias", "tie_word_embeddings")
        self._require_activation("hidden_act")
        require(self.rope_theta > 0, self._wants("rope_theta", "greater than 0"))
        object.__setattr__(self, "rope_theta", float(self.rope_theta))
        self._require_positive("vocab_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim")
        self._require_positive("max_position_embeddings")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"text num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        require(self.head_dim % 2 == 0, f"text head_dim {self.head_dim} is odd: rotary embedding pairs its halves")
        for name in ("attention_bias", "mlp_bias"):
            require(not getattr(self, name), f"text {name}=true is not supported: no SmolVLM checkpoint has such biases")

    def _check_multipliers(self) -> None:
        llama = self.model_type == "llama"
        require(llama or self.model_type == "granite", self._wants("model_type", "'llama' or 'granite'"))
        if self.attention_multiplier is None and not llama:
            object.__setattr__(self, "attention_multiplier", 1.0)
        names = [name for name in MULTIPLIERS if getattr(self, name) is not None]
        self._require_numbers(*names)
        require(self.logits_scaling > 0, self._wants("logits_scaling", "greater than 0"))
        for name in names if llama else ():
            neutral = name != "attention_multiplier" and getattr(self, name) == 1
            require(neutral, self._wants(name, "left out of a llama decoder"))

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """`rope_theta` and `rope_scaling` as transformers 5 writes them."""
        scaling = {} if self.rope_scaling is None else self.rope_scaling.to_dict()
        return {"rope_type": "default", **scaling, "rope_theta": self.rope_theta}

    @property
    def query_multiplier(self) -> float:
        """What queries are multiplied by, since attention divides scores by √head_dim: 1 in llama."""
        own, wanted = self.head_dim**-0.5, self.attention_multiplier
        return 1.0 if wanted is None or math.isclose(wanted, own, rel_tol=1e-12) else wanted / own

    @classmethod
    def _respelled(cls, data: dict[str, Any]) -> dict[str, Any]:
        """v5 has `rope_parameters`, v4 `rope_theta` and `rope_scaling`."""
        family = check_family(data)
        if family == "llama":
            data = {key: value for key, value in data.items() if key not in MULTIPLIERS}
        return split_rope({**data, "model_type": family})

    def to_dict(self) -> dict[str, Any]:
        """The mapping of a config.json.

        Returns:
            Keys and values in the v4 spelling.
        """
        out = super().to_dict()
        out["rope_scaling"] = self.rope_scaling and self.rope_scaling.to_dict()
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        if self.model_type == "llama":
            for name in MULTIPLIERS:
                del out[name]
        return out


_DEFAULT_VISION, _DEFAULT_TEXT = SmolVLMVisionConfig(), SmolVLMTextConfig(rms_norm_eps=1e-5)


@config_class
class SmolVLMConfig(Config):
    """A whole model.

    Attributes:
        vision_config: of the encoder, or the mapping of one. Default: that of the class.
        text_config: of the decoder, likewise. Default: that of the class, with eps 1e-5.
        scale_factor: side of the square of patches that becomes one image token.
        image_token_id: of the tokens that image features replace.
        tie_word_embeddings: whether the embedding is also the output head.
        use_cache: kept, without effect.
        model_type: "smolvlm" or "idefics3".
        embedding_dim: width of the vectors of a retrieval model (ColIdefics3); None for models that write text.
        pad_token_id: kept; that of the decoder counts.
        dtype: of the stored weights.

    Raises:
        ConfigError: a value that no model can have.
    """

    vision_config: SmolVLMVisionConfig = _DEFAULT_VISION
    text_config: SmolVLMTextConfig = _DEFAULT_TEXT
    scale_factor: int = 2
    image_token_id: int = 128257
    tie_word_embeddings: bool = False
    use_cache: bool = True
    model_type: str = "smolvlm"
    embedding_dim: int | None = None  # of a retrieval model (ColIdefics3): the width of the vectors that it makes of a text
    pad_token_id: int | None = field(default=128002, compare=False)  # deprecated upstream; the real one is the text config's
    dtype: str | None = field(default=None, compare=False)  # of the stored weights

    def __post_init__(self) -> None:
        for name, default in (("vision_config", _DEFAULT_VISION), ("text_config", _DEFAULT_TEXT)):
            kind = type(default)
            value = getattr(self, name)
            if value is None:
                value = default
            elif isinstance(value, dict) or (not isinstance(value, kind) and hasattr(value, "to_dict")):
                value = kind.from_dict(value if isinstance(value, dict) else value.to_dict())
            require(isinstance(value, kind), f"{name} must be a mapping or a {kind.__name__}, got {type(value).__name__}")
            object.__setattr__(self, name, value)
        self._require_positive("scale_factor", "image_token_id")
        self._require_flags("tie_word_embeddings", "use_cache")
        if self.embedding_dim is not None:
            self._require_positive("embedding_dim")
        require(
            self.model_type in ("smolvlm", "idefics3"),
            f"model_type {self.model_type!r} is not a SmolVLM: expected 'smolvlm' or 'idefics3'",
        )
        name_fields(self, "dtype", allowed=(*FLOATS, "float64"), error=ConfigError)

    @classmethod
    def for_model(cls, model_type: str, **kwargs: Any) -> Self:
        """A config of arguments, as AutoConfig of transformers makes it.

        Args:
            model_type: "smolvlm" or "idefics3".
            **kwargs: fields of the config.

        Returns:
            The config.
        """
        return cls(model_type=model_type, **kwargs)

    @property
    def image_seq_len(self) -> int:
        """Image tokens per tile after pixel shuffle."""
        return (self.vision_config.num_patches_per_side // self.scale_factor) ** 2

    @classmethod
    def _respelled(cls, data: dict[str, Any]) -> dict[str, Any]:
        """v5 has `_pad_token_id` and `dtype`, v4 `pad_token_id` and `torch_dtype`."""
        quantized = data.get("quantization_config")
        require(
            not quantized, f"quantization_config is not supported: {quantized!r:.80}; convert the weights to bfloat16 first"
        )
        for old, new in (("_pad_token_id", "pad_token_id"), ("torch_dtype", "dtype")):
            if old in data:
                value = data.pop(old)
                data.setdefault(new, value)
        for key in ("bos_token_id", "eos_token_id"):
            if data.get(key, 0) is None:
                data.pop(key)
        return data

    def to_dict(self) -> dict[str, Any]:
        """The mapping of a config.json.

        Returns:
            Keys and values in the v4 spelling.
        """
        architecture = "Idefics3" if self.model_type == "idefics3" else "SmolVLM"
        out = {"architectures": [f"{architecture}ForConditionalGeneration"], **super().to_dict()}
        for name in ("dtype", "embedding_dim"):
            if getattr(self, name) is None:
                del out[name]
        out["vision_config"] = self.vision_config.to_dict(f"{self.model_type}_vision")
        out["text_config"] = self.text_config.to_dict()
        return out
