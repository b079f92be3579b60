"""The base of the image and the video processor: arguments that are attributes, keywords of a call and keys of a JSON file."""

import copy
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Self

from ..errors import CheckpointError, InputError
from ..habits import Neutral, SaysWhatToType, no_attribute, plain_value, unasked
from ..io import read_json, to_json, write_json
from ..locate import find_directory
from .file_values import check_values
from .geometry import SIZES, Sides
from .limits import MediaLimits
from .pixels import PixelRule

_INSTEAD = {
    "push_to_hub": "save_pretrained(directory), then huggingface_hub's upload_folder",
    "register_for_auto_class": "there are no classes that a checkpoint names",
    "fetch_images": "pass paths and URLs themselves",
    "fetch_videos": "pass paths and URLs themselves",
    **dict.fromkeys(
        ("resize", "rescale", "normalize", "center_crop", "pad", "convert_to_rgb", "rescale_and_normalize", "process_image"),
        "the steps are switches of one call: do_resize=…, do_rescale=…, do_normalize=…, do_pad=…",
    ),
}
_dataclass = dataclass(init=False, repr=False, eq=False)


@_dataclass
class MediaProcessor(PixelRule, metaclass=SaysWhatToType):
    """Base of the image and the video processor; they describe the arguments.

    Each annotated attribute of a subclass is an argument: it can be passed to the constructor, set as an attribute later,
    overridden for one call, and is written by `save_pretrained`. None for a switch means "off". Keys of a file that are no
    argument (`processor_class`, keys of older checkpoints) are kept as attributes and written back.

    Attributes:
        DEFAULTS: the default of each argument, by name.
        OWN: arguments that the reference does not know; written only where they differ from the default.
        UNSAVED: arguments that are not written to a file. None for a call leaves them as they are.
        NEUTRAL: arguments of the reference that do nothing here, with the values that are accepted for them.
        TYPE_KEY: the key under which a file names the class.
        FILES: names of the files that may describe the processor, the first that exists counts.
        NESTED_KEY: its key in processor_config.json.
    """

    do_convert_rgb: bool = True
    do_resize: bool = True
    size: dict[str, int] = field(default_factory=lambda: {"longest_edge": 4 * 364})
    resample: int = 1
    max_image_size: dict[str, int] = field(default_factory=lambda: {"longest_edge": 364})
    do_pad: bool = True
    limits: MediaLimits = MediaLimits()
    num_threads: int | None = None

    _instead: ClassVar[dict[str, str]] = _INSTEAD
    DEFAULTS: ClassVar[dict[str, Any]]
    OWN: ClassVar[tuple[str, ...]]
    UNSAVED: ClassVar[tuple[str, ...]] = ("limits", "num_threads")
    NEUTRAL: ClassVar[dict[str, Neutral]] = {
        "device": Neutral(("cpu",), "arrays are made on the host; jax.device_put(batch, device) moves them"),
        "default_to_square": Neutral((True, False)),
        "do_center_crop": Neutral((False,)),
        "crop_size": Neutral(),
    }
    TYPE_KEY: ClassVar[str]
    FILES: ClassVar[tuple[str, ...]]
    NESTED_KEY: ClassVar[str]
    model_input_names = ("pixel_values", "pixel_attention_mask")

    def __init_subclass__(cls) -> None:
        cls.DEFAULTS = {
            field.name: field.default if field.default_factory is MISSING else field.default_factory()
            for field in fields(_dataclass(cls))
        }

    def __init__(self, **kwargs: Any):
        for name, default in self.DEFAULTS.items():
            value = kwargs.pop(name, default)
            if value is None:  # of a switch it means "off", of anything else the default
                value = False if isinstance(default, bool) else default
            value = tuple(value) if isinstance(value, list) else value  # a JSON file has lists; the defaults are tuples
            setattr(self, name, copy.deepcopy(plain_value(value)))
        self._extra: tuple[str, ...] = ()
        unasked(type(self).__name__, kwargs, self.NEUTRAL, ())

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, Sides(value) if name in SIZES and isinstance(value, Mapping) else value)

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(self, name, self._instead)

    def _for_call(self, kwargs: Mapping[str, Any]) -> Self:
        """This processor with the arguments of one call, checked. Raises InputError where they make no sense."""
        call = copy.copy(self)
        for name, value in unasked(type(self).__name__, kwargs, self.NEUTRAL, self.DEFAULTS).items():
            if value is not None or name not in self.UNSAVED:
                setattr(call, name, plain_value(value))
        if call.do_resize and call.size is None:
            raise InputError("do_resize needs a size")
        if call.resample not in range(6):
            raise InputError(f"resample is {call.resample!r}; it is one of Pillow's filters, 0 to 5")
        if call.do_rescale and call.rescale_factor is None:
            raise InputError("do_rescale needs a rescale_factor")
        if call.do_normalize and (call.image_mean is None or call.image_std is None):
            raise InputError("do_normalize needs image_mean and image_std")
        return call

    def to_dict(self) -> dict[str, Any]:
        """All arguments by name, as they are written to a file.

        Returns:
            A dictionary of JSON values, with the class's name under its TYPE_KEY.
        """
        out = {}
        for name in (*self.DEFAULTS, *self._extra):
            value = getattr(self, name)
            unset = (value is None or name in self.OWN) and value == self.DEFAULTS.get(name)
            if not unset and name not in self.UNSAVED:
                value = dict(value) if isinstance(value, Sides) else value
                out[name] = list(value) if isinstance(value, tuple) else copy.deepcopy(value)
        out[self.TYPE_KEY] = type(self).__name__
        return out

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **kwargs: Any) -> Self:
        """A processor from a dictionary as `to_dict` gives it.

        Args:
            config: arguments by name; keys that are no argument become attributes.
            **kwargs: arguments that override `config`.

        Returns:
            The processor.

        Raises:
            InputError: a keyword is no argument.
        """
        made = cls(**{**{name: value for name, value in config.items() if name in cls.DEFAULTS}, **kwargs})
        for name, value in config.items():
            if name not in cls.DEFAULTS and not name.endswith("_type"):
                setattr(made, name, copy.deepcopy(value))
                made._extra += (name,)
        return made

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """A processor from the files of a checkpoint.

        Args:
            pretrained_model_name_or_path: what `load` takes: a directory, whose processor_config.json (transformers 5) or own
                file (transformers 4) is read, the name of a bundled checkpoint, or a Hub id; or such a file itself. A
                checkpoint with none of the files gives the defaults.
            **kwargs: arguments that override what the files say; also revision, subfolder, cache_dir, force_download,
                local_files_only and token.

        Returns:
            The processor.

        Raises:
            CheckpointError: there is no such checkpoint, or a file is not valid JSON, or a value in it is not what it must be.
            InputError: a keyword is no argument.
        """
        config, kwargs = cls._read("from_pretrained", pretrained_model_name_or_path, kwargs)
        return cls.from_dict(config, **kwargs)

    @classmethod
    def _read(cls, where: str, source: str | os.PathLike, keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the files of a checkpoint say of this class, {} where there are none, and its own keywords."""
        known = frozenset({*cls.DEFAULTS, *cls.NEUTRAL}) - {"backend"}  # the reference's keyword of this name is another
        path, own = find_directory(f"{cls.__name__}.{where}", source, keywords, known)
        files = [str(path)] if path.is_file() else [str(path / name) for name in ("processor_config.json", *cls.FILES)]
        for file in files:
            config = read_json(file, missing_ok=True)
            nested = config.get(cls.NESTED_KEY)
            if nested is not None and not isinstance(nested, dict):
                raise CheckpointError(f"{file}: {cls.NESTED_KEY} must be an object, got {nested!r:.80}")
            if nested is not None or (config and (file != files[0] or path.is_file())):
                place = f"{file}: {cls.NESTED_KEY}" if nested is not None else file
                found = config if nested is None else nested
                check_values(found, cls.DEFAULTS, place)
                return found, own
        return {}, own

    def save_pretrained(self, save_directory: str | os.PathLike) -> list[str]:
        """Write the arguments to this class's own file.

        Args:
            save_directory: where to; it is made if need be.

        Returns:
            The paths of the files written.
        """
        return [write_json(os.path.join(save_directory, self.FILES[0]), self.to_dict(), sort_keys=True)]

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Self:
        """As `from_pretrained` of the file.

        Args:
            json_file: the file.

        Returns:
            The processor.

        Raises:
            CheckpointError: the file cannot be read.
            InputError: an argument makes no sense.
        """
        return cls.from_pretrained(json_file)

    def to_json_string(self) -> str:
        """`to_dict` as indented JSON text.

        Returns:
            The text.
        """
        return to_json(self.to_dict(), indent=2, sort_keys=True).decode()

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write `to_json_string` to a file.

        Args:
            json_file_path: the file.
        """
        write_json(json_file_path, self.to_dict(), sort_keys=True)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MediaProcessor) and type(self) is type(other) and self.to_dict() == other.to_dict()
