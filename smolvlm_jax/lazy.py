"""Names that a package offers, while the modules that define them are imported on first use (PEP 562)."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

__all__ = ["lazy_exports"]


def lazy_exports(package: str, modules: Mapping[str, Sequence[str]]) -> tuple[list[str], Callable[[str], Any]]:
    """The names of a package and the function that looks them up.

    Args:
        package: name of the package, for messages.
        modules: the names that each module defines; modules are named relative to `smolvlm_jax`.

    Returns:
        What the package assigns to `__all__` and to `__getattr__`.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def lookup(name: str) -> Any:
        if name not in homes:
            close = [] if name.startswith("_") else get_close_matches(name, homes, 1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}{meant}")
        return getattr(importlib.import_module(f"{__package__}.{homes[name]}"), name)

    return list(homes), lookup
