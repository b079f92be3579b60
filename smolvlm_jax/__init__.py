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
        "retrieval_model": ("ColIdefics3",),
        "retrieval": ("embed", "max_sim"),
        "cache": ("KVCache",),
        "parameters": ("abstract_params", "init_params", "logical_axes"),
        "sharding": ("make_mesh",),
        "locate": ("bundled_models", "resolve"),
        "checkpoint": ("load", "save", "save_hf"),
        "doors": (
            "AutoConfig",
            "AutoImageProcessor",
            "AutoModel",
            "AutoModelForCausalLM",
            "AutoModelForImageTextToText",
            "AutoModelForMultimodalLM",
            "AutoModelForVision2Seq",
            "AutoProcessor",
            "AutoTokenizer",
            "AutoVideoProcessor",
            "BitsAndBytesConfig",
            "Idefics3Config",
            "Idefics3ForConditionalGeneration",
            "Idefics3ImageProcessor",
            "Idefics3ImageProcessorFast",
            "Idefics3ImageProcessorPil",
            "Idefics3Model",
            "Idefics3Processor",
            "Idefics3VisionConfig",
            "Idefics3VisionTransformer",
            "LoadedModel",
            "SmolVLMImageProcessorFast",
            "SmolVLMImageProcessorPil",
            "TextIteratorStreamer",
            "TextStreamer",
            "Trainer",
            "TrainingArguments",
            "load_image",
            "load_video",
            "pipeline",
            "set_seed",
        ),
        "generation_config": ("GenerationConfig",),
        "generation": ("GenerateOutput", "generate", "stream"),
        "processing": (
            "BatchFeature",
            "SmolVLMImageProcessor",
            "SmolVLMProcessor",
            "SmolVLMTokenizer",
            "SmolVLMVideoProcessor",
        ),
        "errors": ("SmolVLMError",),
    },
)
__all__ = ["__version__", *_names]


def __dir__():
    return sorted(__all__)
