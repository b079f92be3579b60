"""What the three configs share: reading and writing a config.json, further arguments and attributes of transformers, checks."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

from .dtypes import full_name
from .errors import ConfigError, MissingFileError
from .habits import SaysWhatToType, no_attribute, plain_value, require_agreement, unchanging, unknown_argument
from .io import read_json, to_json, write_json
from .locate import find_directory
from .text_families import finite, require

__all__ = ["ACTIVATIONS", "Config", "config_class", "is_id"]

# Those of activations.activation.
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu",
    "sqrtsoftplus", "swish", "tanh",
)  # fmt: skip
# Arguments of transformers' configs that mean nothing here: they are kept, and written to a config.json again.
_CARRIED = frozenset({
    "_commit_hash", "_name_or_path", "add_cross_attention", "architectures", "attn_implementation", "bos_token_id",
    "chunk_size_feed_forward", "decoder_start_token_id", "eos_token_id", "finetuning_task", "id2label", "is_decoder",
    "is_encoder_decoder", "label2id", "model_type", "name_or_path", "num_labels", "output_attentions", "output_hidden_states",
    "pad_token_id", "perceiver_config", "pixel_shuffle_factor", "prefix", "pretraining_tp", "problem_type", "qk_layer_norms",
    "return_dict", "sep_token_id", "task_specific_params", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class",
    "torch_dtype", "dtype", "transformers_version", "use_cache", "use_return_dict", "vocab_size", "rope_parameters",
    "_pad_token_id", "quantization_config", "rope_scaling", "use_sliding_window", "sliding_window",
})  # fmt: skip
# What these are where a config.json does not say.
_UNSAID: dict[str, Any] = {
    "architectures": None, "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "name_or_path": "",
    "output_attentions": False, "output_hidden_states": False, "problem_type": None, "return_dict": True,
    "transformers_version": None, "use_return_dict": True,
}  # fmt: skip
# What asks for something of each call, in transformers.
_OF_A_CALL = {"output_attentions": False, "output_hidden_states": False, "return_dict": True, "use_return_dict": True}
_INSTEAD = {
    "update": "config.replace(name=value) gives a changed copy",
    "to_diff_dict": "to_dict() gives all of it",
    "sub_configs": "they are vision_config and text_config",
    "push_to_hub": "save_pretrained(directory), then huggingface_hub's upload_folder",
    "image_token_index": "it is called image_token_id",
    **dict.fromkeys(("id2label", "label2id", "num_labels"), "the model has no labels of classes"),
}


_Class = TypeVar("_Class", bound=type)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def config_class(cls: _Class) -> _Class:
    """A frozen dataclass that also takes what transformers' configs take beside its fields: `from_dict` says how."""
    made: Any = dataclass(frozen=True)(cls)
    init = made.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs = {name: plain_value(value) for name, value in kwargs.items()}
        names = {entry.name for entry in dataclasses.fields(made)}
        other = sorted(set(kwargs) - names)
        if other and "extra" not in kwargs:
            unknown = [name for name in other if name not in _CARRIED]
            if unknown:
                raise ConfigError(str(unknown_argument(made.__name__, unknown[0], names - {"extra"}, _CARRIED)))
            for name in other:
                if name in _OF_A_CALL and kwargs[name] not in (None, _OF_A_CALL[name]):
                    raise ConfigError(
                        f"{made.__name__} sets nothing of a call: pass {name}={kwargs[name]!r:.80} to model.apply"
                    )
            given = dict(zip([entry.name for entry in dataclasses.fields(made)], args, strict=False))
            _agree(made.__name__, {**given, **kwargs})
            args, kwargs = (), made._arguments({**given, **kwargs})
        init(self, *args, **kwargs)

    made.__init__ = __init__
    unchanging(made, "config.replace({name}=…) gives a changed copy")
    return made


def _agree(where: str, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for one argument under transformers' older and newer name with different values."""
    rope = given.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    require_agreement(where, {name: given.get(name) for name in ("dtype", "torch_dtype")}, full_name, ConfigError)
    require_agreement(where, {"rope_theta": given.get("rope_theta"), "rope_parameters.rope_theta": theta}, error=ConfigError)


@dataclass(frozen=True)
class Config(metaclass=SaysWhatToType):
    """What the three configs share: reading, writing, checks.

    Attributes:
        extra: keys of the config.json that mean nothing here, as a JSON object.
        KEY: the key of this config in that of a whole model.
        UNSAID: what further attributes are where the config.json does not say.
        _instead: what to type for attributes of transformers that there are not.
    """

    KEY: ClassVar[str] = ""
    UNSAID: ClassVar[dict[str, Any]] = {}
    _instead: ClassVar[dict[str, str]] = _INSTEAD
    extra: str = field(default="{}", compare=False, repr=False, kw_only=True)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            for said in (json.loads(self.__dict__.get("extra", "{}")), self.UNSAID, _UNSAID):
                if name in said:
                    return said[name]
        places = [part for part in ("text_config", "vision_config") if name in getattr(self.__dict__.get(part), "__dict__", ())]
        where = "it is " + " or ".join(f"config.{part}.{name}" for part in places)
        raise no_attribute(self, name, {**self._instead, **({name: where} if places else {})})

    @classmethod
    def _respelled(cls, data: dict[str, Any]) -> dict[str, Any]:
        """A mapping in any spelling, in the one that the arguments of this class have."""
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build from the mapping of a config.json.

        Args:
            data: the mapping, in the spelling of transformers 4 or 5.

        Returns:
            The config.

        Raises:
            ConfigError: no model can be built from it; the message names the key.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"a config.json holds a mapping, got {type(data).__name__}")
        try:
            return cls(**cls._arguments(data))
        except TypeError as error:
            raise ConfigError(f"config.json: {error}") from error

    @classmethod
    def _arguments(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the constructor for a mapping in either spelling."""
        data = cls._respelled(dict(data))
        defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.name != "extra"}
        # An explicit null means "the default" for every argument whose default is not null itself.
        taken = {k: v for k, v in data.items() if k in defaults and (v is not None or defaults[k] is None)}
        rest = {k: v for k, v in data.items() if k not in defaults}
        return {**taken, "extra": json.dumps(rest, sort_keys=True, default=str)}

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **kwargs: Any) -> Self:
        """Read a config.json.

        Args:
            source: what `load` takes: a directory, the name of a bundled checkpoint, or a Hub id; or the file itself. The
                config of an encoder or decoder is found in that of a whole model.
            **kwargs: arguments that override the file; also revision, subfolder, cache_dir, force_download, local_files_only
                and token.

        Returns:
            The config.

        Raises:
            ConfigError: there is no such file, or no model can be built from it.
            InputError: an unknown keyword.
        """
        data, given, path = cls._read("from_pretrained", source, kwargs)
        nested = data.get(cls.KEY) if cls.KEY else None
        try:
            return cls.from_dict({**(nested if isinstance(nested, dict) else data), **given})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The contents of a config.json.

        Args:
            pretrained_model_name_or_path: as in `from_pretrained`.
            **kwargs: likewise.

        Returns:
            The mapping as it is in the file, and the keywords that do not say where the file is.

        Raises:
            MissingFileError: there is no such file.
            ConfigError: it is no JSON object.
            InputError: an unknown keyword.
        """
        return cls._read("get_config_dict", pretrained_model_name_or_path, kwargs)[:2]

    @classmethod
    def _read(
        cls, where: str, source: str | os.PathLike, keywords: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], Path]:
        """What a config.json holds, the keywords that are arguments of this class, and the path of the file."""
        known = {entry.name for entry in dataclasses.fields(cls)} - {"extra"} | _CARRIED
        path, given = find_directory(f"{cls.__name__}.{where}", source, keywords, frozenset(known))
        path = path / "config.json" if path.is_dir() else path
        if not path.exists():
            raise MissingFileError(f"cannot read {path}: there is no such file; download the whole repository")
        return read_json(path, error=ConfigError), given, path

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Self:
        """As `from_pretrained` of the file.

        Args:
            json_file: the file.

        Returns:
            The config.

        Raises:
            ConfigError: there is no such file, or no model can be built from it.
        """
        return cls.from_pretrained(json_file)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `config.json` into a directory, completely or not at all.

        Args:
            save_directory: where to; it is created if need be.
        """
        self.to_json_file(Path(save_directory) / "config.json")

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_dict` as indented JSON text.

        Args:
            use_diff: transformers' own; defaults are written in either case.

        Returns:
            The text.
        """
        return to_json(self.to_dict(), indent=2, sort_keys=True).decode()

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write `to_json_string` to a file.

        Args:
            json_file_path: the file.
            use_diff: as there.
        """
        write_json(json_file_path, self.to_dict(), sort_keys=True)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The decoder's config.

        Args:
            decoder: transformers' own, without effect.
            encoder: likewise.

        Returns:
            `text_config`; of a config of a part, itself.
        """
        return getattr(self, "text_config", self)

    def _set(self, **values: Any) -> None:
        """Fill in fields of a config that is being made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The mapping of a config.json, with the keys that mean nothing here.

        Returns:
            Keys and values in the v4 spelling, which every transformers since 4.50 reads.
        """
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return {**json.loads(self.extra), **own}

    def replace(self, **changes: Any) -> Self:
        """A copy with some arguments changed.

        Args:
            **changes: fields and their new values.

        Returns:
            The copy.
        """
        return dataclasses.replace(self, **changes)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(is_id(value, 2**53) and value > 0, self._wants(name, "a positive integer below 2**53"))

    def _require_numbers(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(finite(value) and value >= 0, self._wants(name, "a finite number, 0 or more"))

    def _require_flags(self, *names: str) -> None:
        for name in names:
            require(isinstance(getattr(self, name), bool), self._wants(name, "true or false"))

    def _require_activation(self, name: str) -> None:
        learns = getattr(self, name) in ("prelu", "xielu")
        require(not learns, f"{type(self).__name__}.{name} {getattr(self, name)!r} learns parameters, which have no place here")
        require(getattr(self, name) in ACTIVATIONS, self._wants(name, f"one of {', '.join(ACTIVATIONS)}"))

    def _wants(self, name: str, what: str) -> str:
        text = repr(getattr(self, name))
        return f"{type(self).__name__}.{name} must be {what}, got {text if len(text) <= 80 else text[:77] + '…'}"


def is_id(value: Any, end: int = 2**31) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end
