"""SmolVLM and SmolVLM2 in JAX/Flax. Importing this module imports neither jax nor flax: every name is lazy."""

import importlib

__version__ = "0.1.0"

# name -> module that defines it; resolved on first access (PEP 562)
_EXPORTS = {
    "SmolVLMConfig": "smolvlm_jax.config",
    "SmolVLMTextConfig": "smolvlm_jax.config",
    "SmolVLMVisionConfig": "smolvlm_jax.config",
    "published_config": "smolvlm_jax.sizes",
    "SmolVLMVisionTransformer": "smolvlm_jax.vision",
    "SmolVLMConnector": "smolvlm_jax.connector",
    "SmolVLMTextModel": "smolvlm_jax.decoder",
    "SmolVLMModel": "smolvlm_jax.model",
    "SmolVLMForConditionalGeneration": "smolvlm_jax.model",
    "KVCache": "smolvlm_jax.cache",
    "abstract_params": "smolvlm_jax.parameters",
    "init_params": "smolvlm_jax.parameters",
    "logical_axes": "smolvlm_jax.parameters",
    "make_mesh": "smolvlm_jax.sharding",
    "bundled_models": "smolvlm_jax.locate",
    "load": "smolvlm_jax.checkpoint",
    "resolve": "smolvlm_jax.locate",
    "save": "smolvlm_jax.checkpoint",
    "save_hf": "smolvlm_jax.checkpoint",
    "GenerationConfig": "smolvlm_jax.generation_config",
    "generate": "smolvlm_jax.generation",
    "stream": "smolvlm_jax.generation",
    "SmolVLMImageProcessor": "smolvlm_jax.processing",
    "SmolVLMProcessor": "smolvlm_jax.processing",
    "SmolVLMVideoProcessor": "smolvlm_jax.processing",
    "SmolVLMError": "smolvlm_jax.errors",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
