"""Processors whose arguments are attributes, keywords of a call and keys of a JSON file at once."""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self, TypeVar

from ..errors import CheckpointError, InputError
from ..io import read_json, write_json


class Configured:
    """Base of the image and the video processor.

    A subclass is decorated with `configured`. Each of its annotated attributes is then an argument: it can be passed to
    the constructor, set as an attribute later, overridden for one call, and is written by `save_pretrained`. Keys of a
    file that are no argument (`processor_class`, keys of older checkpoints) are kept as attributes and written back.

    Attributes:
        DEFAULTS: the default of each argument, by name.
        OWN: arguments that the reference does not know; written only where they differ from the default.
        NEUTRAL: arguments of the reference that do nothing here, with the values that are accepted for them.
        INIT_ONLY: keywords of the constructor that are not written to a file.
        TYPE_KEY: the key under which a file names the class.
        FILES: names of the files that may describe the processor, the first that exists counts.
        NESTED_KEY: its key in processor_config.json.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {}
    OWN: ClassVar[tuple[str, ...]] = ()
    NEUTRAL: ClassVar[dict[str, tuple]] = {}
    INIT_ONLY: ClassVar[tuple[str, ...]] = ()
    TYPE_KEY: ClassVar[str] = ""
    FILES: ClassVar[tuple[str, ...]] = ()
    NESTED_KEY: ClassVar[str] = ""

    def __init__(self, **kwargs: Any):
        for name, default in self.DEFAULTS.items():
            value = kwargs.pop(name, None)
            setattr(self, name, copy.deepcopy(default if value is None else value))
        self._extra: tuple[str, ...] = ()
        self._refuse(kwargs)

    def _refuse(self, kwargs: Mapping[str, Any]) -> None:
        """Raise InputError for a name that is no argument, and for a neutral argument with a value that asks for something."""
        for name, value in kwargs.items():
            if name not in self.NEUTRAL:
                raise InputError(f"{type(self).__name__} has no argument {name!r}; it has {', '.join(sorted(self.DEFAULTS))}")
            if value is not None and value not in self.NEUTRAL[name]:
                raise InputError(f"{type(self).__name__} does not support {name}={value!r}")

    def _with(self, kwargs: Mapping[str, Any]) -> Self:
        """A copy of this processor with the arguments of one call. Raises InputError for an unknown one."""
        self._refuse({name: value for name, value in kwargs.items() if name not in self.DEFAULTS})
        changed = copy.copy(self)
        for name, value in kwargs.items():
            if name in self.DEFAULTS:
                setattr(changed, name, value)
        return changed

    def to_dict(self) -> dict[str, Any]:
        """All arguments by name, as they are written to a file.

        Returns:
            A dictionary of JSON values, with the class's name under its TYPE_KEY.
        """
        out = {}
        for name in (*self.DEFAULTS, *self._extra):
            value = getattr(self, name)
            default = self.DEFAULTS.get(name)
            if name in self.OWN and value == default:
                continue
            if value is None and default is None:
                continue
            out[name] = list(value) if isinstance(value, tuple) else copy.deepcopy(value)
        out[self.TYPE_KEY] = type(self).__name__
        return out

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **kwargs: Any) -> Self:
        """A processor from a dictionary as `to_dict` gives it.

        Args:
            config: arguments by name; keys that are no argument become attributes.
            **kwargs: arguments that override `config`.

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
            pretrained_model_name_or_path: a local directory, whose processor_config.json (transformers 5) or own file
                (transformers 4) is read, or such a file itself. A directory with none of the files gives the defaults.
            **kwargs: arguments that override what the files say.

        Raises:
            CheckpointError: there is no such directory, or a file is not valid JSON.
            InputError: a keyword is no argument.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if os.path.isfile(path):
            config = read_json(path)
            return cls.from_dict(config.get(cls.NESTED_KEY, config), **kwargs)
        return cls.from_dict(cls.find_config(checkpoint_directory(path)), **kwargs)

    @classmethod
    def find_config(cls, directory: str) -> dict[str, Any]:
        """The part of a checkpoint's files that describes this processor; {} where none does."""
        nested = read_json(os.path.join(directory, "processor_config.json"), missing_ok=True).get(cls.NESTED_KEY)
        if isinstance(nested, dict):
            return nested
        found = (read_json(os.path.join(directory, name), missing_ok=True) for name in cls.FILES)
        return next(filter(None, found), {})

    def save_pretrained(self, save_directory: str | os.PathLike) -> list[str]:
        """Write the arguments to this class's own file in `save_directory`, which is made if need be.

        Returns:
            The paths of the files written.
        """
        return [write_json(os.path.join(save_directory, self.FILES[0]), self.to_dict(), sort_keys=True)]

    def to_json_string(self) -> str:
        """`to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Configured) and type(self) is type(other) and self.to_dict() == other.to_dict()


_Class = TypeVar("_Class", bound=type[Configured])


def configured(cls: _Class) -> _Class:
    """Class decorator: the annotated attributes of `cls` and its bases become its arguments."""
    declared: Any = dataclass(init=False, repr=False, eq=False)(cls)
    cls.DEFAULTS = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory() for field in fields(declared)
    }
    return cls


def checkpoint_directory(path: str | os.PathLike) -> str:
    """`path` as a string. Raises CheckpointError unless it is a local directory."""
    directory = os.fspath(path)
    if not os.path.isdir(directory):
        raise CheckpointError(f"no directory {directory!r}; pass the local directory of a checkpoint")
    return directory
