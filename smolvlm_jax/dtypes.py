"""One reading of dtypes for functions, settings, recipes and options: as numpy, jax and torch have them, and short names."""

import re
from collections.abc import Collection
from typing import Any

from .errors import InputError, SmolVLMError

__all__ = ["FLOATS", "dtype_name", "full_name", "name_fields", "what_instead"]

FLOATS = ("float32", "bfloat16", "float16")
_MODULE = re.compile(r"(?:torch|jax\.numpy|jnp|numpy|np|ml_dtypes)\.")
_FEW_BITS = re.compile(r"u?int|nf\d|fp[48]|float[48]|q\d|\dbit")
_SHORT = {"bf16": "bfloat16", "half": "float16", "double": "float64"}
_SHORT |= dict.fromkeys(("float", "fp32", "f32", "f4", "single"), "float32")  # torch.float is float32
_SHORT |= dict.fromkeys(("fp16", "f16", "f2"), "float16") | dict.fromkeys(("fp64", "f64", "f8"), "float64")


def full_name(value: Any) -> str:
    """The name of a dtype as numpy and jax have it.

    Args:
        value: "bfloat16", "bf16", "BF16", "torch.bfloat16", torch.bfloat16, jnp.bfloat16, a dtype of numpy, and the like.

    Returns:
        Such as "bfloat16"; of what is no dtype a text that names none.
    """
    if isinstance(value, str):
        name = value.strip().lower()
    elif isinstance(value, type):  # a scalar type of numpy or jax; float of Python is none, of which 32 bits are not meant
        name = value.__name__ if hasattr(value, "dtype") else repr(value)
    else:
        name = str(getattr(value, "name", value)) if type(value).__module__.startswith(("numpy", "torch")) else repr(value)
    name = _MODULE.sub("", name, count=1)
    return _SHORT.get(name, name)


def dtype_name(
    value: Any, name: str = "dtype", allowed: Collection[str] = FLOATS, error: type[SmolVLMError] = InputError
) -> str:
    """The name of a dtype, which must be one of some.

    Args:
        value: as in `full_name`.
        name: of the argument, for the message.
        allowed: the names.
        error: the exception to raise.

    Returns:
        One of `allowed`.

    Raises:
        SmolVLMError: an `error`: it is none of them.
    """
    found = full_name(value)
    if found not in allowed:
        names = " or ".join(allowed) if len(allowed) < 3 else f"one of {', '.join(allowed)}"
        raise error(f"{name} must be {names}, not {value!r:.60}{what_instead(found)}")
    return found


def what_instead(name: str) -> str:
    """What to type in place of what is no dtype here, as the end of a message; nothing if nobody knows."""
    if _FEW_BITS.match(name):
        return "; weights in 8 bits are a checkpoint of their own: smolvlm-jax convert SOURCE DEST --quantize int8"
    return "; leave it out for the default" if name == "auto" else ""


def name_fields(settings: Any, *names: str, allowed: Collection[str] = FLOATS, error: type[SmolVLMError] = InputError) -> None:
    """Put names of dtypes into fields of a frozen dataclass, in its constructor; None stays None. Raises as `dtype_name`."""
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            object.__setattr__(settings, name, dtype_name(value, name, allowed, error))
