"""Fine-tuning on a mesh: `run(TrainConfig(...))`. Importing this package imports no jax: data workers read it too."""

import importlib

_EXPORTS = {
    "DataConfig": "config",
    "EvaluationConfig": "config",
    "LoraConfig": "config",
    "MeshConfig": "config",
    "DataSource": "config",
    "TrainConfig": "config",
    "TrainResult": "runner",
    "load_recipe": "recipes",
    "run": "runner",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    name = "DataSource" if name == "Source" else name  # its former name
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
