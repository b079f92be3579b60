"""Continuous batching: many requests answered with one model over static shapes.

Importing this package imports no jax: worker processes prepare requests with `smolvlm_jax.engine.requests` alone.
"""

import importlib

_EXPORTS = {
    "Engine": "smolvlm_jax.engine.engine",
    "EngineConfig": "smolvlm_jax.engine.settings",
    "Prepared": "smolvlm_jax.engine.requests",
    "Request": "smolvlm_jax.engine.requests",
    "Result": "smolvlm_jax.engine.requests",
    "SamplingParams": "smolvlm_jax.generation_config",
    "prepare": "smolvlm_jax.engine.requests",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
