"""Registering a mapping with jax as a pytree, without importing jax."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["register_mapping"]


@dataclass(frozen=True)
class _Structure:
    """Keys of a mapping, and those of its entries that are no arrays.

    Attributes:
        keys: of the other entries.
        described: the entries that are no arrays. They take part in comparisons, though they may not be hashable.
    """

    keys: tuple[str, ...]
    described: tuple[tuple[str, Any], ...]

    def __hash__(self) -> int:
        return hash((self.keys, tuple(name for name, _ in self.described)))


def register_mapping(kind: type[dict], *, descriptions: Sequence[str] = ()) -> None:
    """Register a subclass of dict with jax: now if jax is imported, otherwise as soon as it is.

    Args:
        kind: the class.
        descriptions: keys of entries that belong to the structure of the tree instead of holding leaves.
    """

    def register() -> None:
        tree_util = sys.modules["jax"].tree_util

        def flatten(mapping: Mapping[str, Any]) -> tuple[tuple[Any, ...], _Structure]:
            keys = tuple(sorted(name for name in mapping if name not in descriptions))
            described = tuple((name, mapping[name]) for name in sorted(mapping) if name in descriptions)
            return tuple(mapping[name] for name in keys), _Structure(keys, described)

        def flatten_with_keys(mapping: Mapping[str, Any]) -> tuple[tuple[Any, ...], _Structure]:
            children, structure = flatten(mapping)
            names = map(tree_util.DictKey, structure.keys)
            return tuple(zip(names, children, strict=True)), structure

        def unflatten(structure: _Structure, children: Sequence[Any]) -> Any:
            return kind({**dict(zip(structure.keys, children, strict=True)), **dict(structure.described)})

        tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)

    if hasattr(sys.modules.get("jax"), "tree_util"):
        register()
    else:
        sys.meta_path.insert(0, _AfterImport("jax", register))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function once a module has been imported, by whomever."""

    def __init__(self, name: str, function: Any):
        self._name, self._function = name, function
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self._function()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
