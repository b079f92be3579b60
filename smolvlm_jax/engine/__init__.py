"""Continuous batching: many requests answered with one model over static shapes.

Importing this package imports no jax: worker processes prepare requests with `smolvlm_jax.engine.requests` alone.
"""

from ..lazy import lazy_exports

__all__, __getattr__ = lazy_exports(
    __name__,
    {
        "engine.engine": ("Engine",),
        "engine.requests": ("Prepared", "Request", "Result", "Score", "prepare"),
        "engine.settings": ("EngineConfig",),
        "generation_config": ("SamplingParams",),
    },
)
