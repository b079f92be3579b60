"""Processors whose arguments are attributes, call-time keywords and a json file at once."""

import copy
import json
import os
from typing import ClassVar

from ..errors import CheckpointError, InputError
from ..io import read_json, write_json


class Configured:
    """Base of the image and the video processor.

    A subclass declares DEFAULTS: argument name → default. Each argument becomes an attribute, can be overridden for
    one call, and is written by `save_pretrained`. Keys of a file that are no argument (`processor_class`, the junk of
    older checkpoints) are kept as attributes and written back.
    """

    DEFAULTS: ClassVar[dict] = {}
    # arguments of ours that the reference does not know: written only where they differ from the default
    OWN: tuple[str, ...] = ()
    # accepted because code that moves over passes them, but only with a value that asks for nothing
    NEUTRAL: ClassVar[dict] = {}
    # keywords of __init__ that are no part of a file
    INIT_ONLY: tuple[str, ...] = ()
    TYPE_KEY = ""
    FILES: tuple[str, ...] = ()
    NESTED_KEY = ""

    def __init__(self, **kwargs):
        for name, default in self.DEFAULTS.items():
            value = kwargs.pop(name, None)
            setattr(self, name, copy.deepcopy(default if value is None else value))
        self._extra: tuple[str, ...] = ()
        self._refuse(kwargs)

    def _refuse(self, kwargs: dict):
        """Raise InputError for what is no argument, or one of NEUTRAL with a value that asks for something."""
        for name, value in kwargs.items():
            if name not in self.NEUTRAL:
                raise InputError(f"{type(self).__name__} has no argument {name!r}; it has {', '.join(sorted(self.DEFAULTS))}")
            if value is not None and value not in self.NEUTRAL[name]:
                raise InputError(f"{type(self).__name__} does not support {name}={value!r}")

    def _options(self, kwargs: dict) -> dict:
        """All arguments of one call: those of this object, overridden by `kwargs`. InputError names an unknown one."""
        options = {name: getattr(self, name) for name in self.DEFAULTS}
        self._refuse({name: value for name, value in kwargs.items() if name not in options})
        return {**options, **{name: value for name, value in kwargs.items() if name in options}}

    def to_dict(self) -> dict:
        """Every argument under its name, as written to file."""
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
    def from_dict(cls, config: dict, **kwargs):
        """From a dictionary as `to_dict` gives it; keywords override. Keys that are no argument become attributes."""
        made = cls(**{name: value for name, value in config.items() if name in cls.DEFAULTS} | kwargs)
        for name, value in config.items():
            if name not in cls.DEFAULTS and not name.endswith("_type"):
                setattr(made, name, copy.deepcopy(value))
                made._extra += (name,)
        return made

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """From a directory (v5: nested in processor_config.json; v4: a file of its own) or such a file itself.

        Keywords override what the files say. A directory without any of the files gives the defaults.
        Raises CheckpointError where there is no such directory or a file is not valid json.
        """
        path = os.fspath(pretrained_model_name_or_path)
        unknown = sorted(set(kwargs) - {*cls.DEFAULTS, *cls.INIT_ONLY})
        if unknown:
            raise InputError(f"{cls.__name__} has no argument {unknown[0]!r}; it has {', '.join(sorted(cls.DEFAULTS))}")
        if os.path.isfile(path):
            config = read_json(path)
            return cls.from_dict(config.get(cls.NESTED_KEY, config), **kwargs)
        if not os.path.isdir(path):
            raise CheckpointError(f"no directory {path!r}; pass a local directory of a checkpoint")
        return cls.from_dict(cls.find_config(path), **kwargs)

    @classmethod
    def find_config(cls, directory: str) -> dict:
        """The part of the checkpoint's files that describes this processor; {} if none does."""
        nested = read_json(os.path.join(directory, "processor_config.json"), missing_ok=True).get(cls.NESTED_KEY)
        if isinstance(nested, dict):
            return nested
        for name in cls.FILES:
            found = read_json(os.path.join(directory, name), missing_ok=True)
            if found:
                return found
        return {}

    def save_pretrained(self, save_directory) -> list[str]:
        """Write the arguments to this class's own file in `save_directory`; returns the paths written."""
        return [write_json(os.path.join(save_directory, self.FILES[0]), self.to_dict(), sort_keys=True)]

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self):
        return f"{type(self).__name__} {self.to_json_string()}"

    def __eq__(self, other):
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None
