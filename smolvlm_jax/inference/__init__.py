"""Batch inference: the engine (continuous batching), and the job that pushes files of records through it.

Importing this package imports no jax: worker processes prepare records with `smolvlm_jax.inference.requests` alone.
"""

import importlib

_EXPORTS = {
    "Engine": "smolvlm_jax.inference.engine",
    "EngineConfig": "smolvlm_jax.inference.engine",
    "Prepared": "smolvlm_jax.inference.requests",
    "Request": "smolvlm_jax.inference.requests",
    "Result": "smolvlm_jax.inference.requests",
    "SamplingParams": "smolvlm_jax.inference.requests",
    "prepare": "smolvlm_jax.inference.requests",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
