"""Errors for models that are used like torch modules, with what to type instead."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp

from .dtypes import dtype_name
from .errors import HabitError
from .habits import no_part, unbound

__all__ = ["says_what_to_type"]

_APPLY = 'the first argument of apply is a dict of the parameters: model.apply({"params": params}, **inputs)'
_Class = TypeVar("_Class", bound=type)


def says_what_to_type(cls: _Class) -> _Class:
    """A public flax module whose call without parameters, and whose methods of torch and transformers, are errors of ours; its
    dtype may be given as in `load`.

    `eval` gives the model as it is: without dropout there is nothing to switch off.
    """
    made: Any = cls
    call, getattribute, made_of_fields = made.__call__, made.__getattr__, made.__post_init__
    applied = made.apply
    by_place = [each for each in inspect.signature(call).parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD][1:]

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.scope is None:
            raise unbound(made.__name__)  # type: ignore[misc]
        if len(args) > len(by_place):
            names = ", ".join(each.name for each in by_place)
            raise HabitError(f"{made.__name__} takes {names} by place: pass the others by name, such as attention_mask=…")
        return call(self, *args, **kwargs)

    @functools.wraps(made.apply)
    def apply(self: Any, variables: Any = None, *args: Any, **kwargs: Any) -> Any:
        whole = isinstance(variables, Mapping) and (not variables or "params" in variables)
        if not whole or set(variables.get("params", ())) == {"params"}:
            raise HabitError(_APPLY)
        return applied(self, variables, *args, **kwargs)

    def __getattr__(self: Any, name: str) -> Any:
        error = unbound(made.__name__, name)
        if error is not None:
            raise error
        try:
            return getattribute(self, name)
        except AttributeError:
            # what is looked up while a model is applied, and what Python looks for, is flax's to answer
            if name.startswith("_") or self.__dict__.get("scope") is not None:
                raise
            raise no_part(made.__name__, name) from None

    def from_pretrained(kind: type, *args: Any, **kwargs: Any) -> Any:
        """Parameters are no part of a model: see `load`."""
        raise unbound(kind.__name__, "from_pretrained")  # type: ignore[misc]

    def __post_init__(self: Any) -> None:
        dtype = self.__dict__.get("dtype")
        if isinstance(dtype, str) or type(dtype).__module__ == "torch":
            object.__setattr__(self, "dtype", jnp.dtype(dtype_name(dtype)))
        made_of_fields(self)

    made.__call__, made.__getattr__, made.__post_init__ = __call__, __getattr__, __post_init__
    made.eval, made.apply = lambda self: self, apply
    made.from_pretrained = classmethod(from_pretrained)
    return cls
