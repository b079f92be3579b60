"""SmolVLM and SmolVLM2 in JAX/Flax. Importing this module imports neither jax nor flax: every name is lazy."""

from .lazy import lazy_exports

__version__ = "0.1.0"
_names, __getattr__ = lazy_exports(
    __name__,
    {
        "config": ("SmolVLMConfig", "SmolVLMTextConfig", "SmolVLMVisionConfig"),
        "sizes": ("published_config",),
        "vision": ("SmolVLMVisionTransformer",),
        "connector": ("SmolVLMConnector",),
        "decoder": ("SmolVLMTextModel",),
        "model": ("SmolVLMModel", "SmolVLMForConditionalGeneration"),
        "cache": ("KVCache",),
        "parameters": ("abstract_params", "init_params", "logical_axes"),
        "sharding": ("make_mesh",),
        "locate": ("bundled_models", "resolve"),
        "checkpoint": ("load", "save", "save_hf"),
        "generation_config": ("GenerationConfig",),
        "generation": ("generate", "stream"),
        "processing": ("SmolVLMImageProcessor", "SmolVLMProcessor", "SmolVLMVideoProcessor"),
        "errors": ("SmolVLMError",),
    },
)
__all__ = ["__version__", *_names]


def __dir__():
    return sorted(__all__)
