"""transformers' names for what there is here, so that its examples run with their import lines changed.

Idefics3 is the name of the first generation of SmolVLM: model, config and processors are the same.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .checkpoint import NEUTRAL, SAVING, load, write_pretrained
from .config import SmolVLMConfig, SmolVLMVisionConfig
from .dtypes import full_name
from .errors import HabitError
from .generation import generate, stream
from .habits import Neutral, no_part, require_agreement, unasked, unbound, unchanging
from .model import SmolVLMForConditionalGeneration, SmolVLMModel
from .processing import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMTokenizer, SmolVLMVideoProcessor
from .processing.batch import BatchFeature
from .vision import SmolVLMVisionTransformer

# Its public names stand in the package, which imports them from here.
AutoConfig = Idefics3Config = SmolVLMConfig
AutoProcessor = Idefics3Processor = SmolVLMProcessor
AutoTokenizer = SmolVLMTokenizer
AutoVideoProcessor = SmolVLMVideoProcessor
AutoImageProcessor = SmolVLMImageProcessorFast = SmolVLMImageProcessorPil = SmolVLMImageProcessor
Idefics3ImageProcessor = Idefics3ImageProcessorFast = Idefics3ImageProcessorPil = SmolVLMImageProcessor
Idefics3ForConditionalGeneration, Idefics3Model = SmolVLMForConditionalGeneration, SmolVLMModel
Idefics3VisionConfig, Idefics3VisionTransformer = SmolVLMVisionConfig, SmolVLMVisionTransformer

_OF_SAVING: dict[str, Neutral] = {
    **dict.fromkeys(("safe_serialization", "is_main_process", "save_peft_format"), Neutral((True,))),
    "save_original_format": Neutral((True, False)),
    "push_to_hub": Neutral((False,), "huggingface_hub's upload_folder uploads the directory"),
    **dict.fromkeys(("state_dict", "save_function", "token", "variant"), Neutral()),
}
# Attributes of transformers' models that say nothing about parameters.
_ATTRIBUTES = {"main_input_name": "input_ids", "training": False, "supports_gradient_checkpointing": True}
# transformers' names for forms of attention: the plain one, what is computed as torch sees fit, and kernels of torch alone.
_ATTENTION = {"eager": "einsum", "sdpa": "auto"}
_KERNELS_OF_TORCH = ("flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa")
_log = logging.getLogger(__name__)


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["model"])
@dataclass(frozen=True, eq=False, repr=False)
class LoadedModel:
    """A model and its parameters: `model, params = …`, or one object that is used as transformers' models are.

    To jax it is a pytree, whose leaves are the parameters.

    Attributes:
        model: as `load` returns it.
        params: likewise.
    """

    model: SmolVLMForConditionalGeneration
    params: Any

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.params))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate(model, params, …)`.

        Args:
            *args: what follows `params` there.
            **kwargs: likewise.

        Returns:
            What `generate` returns.
        """
        return generate(self.model, self.params, *args, **kwargs)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """`stream(model, params, …)`.

        Args:
            *args: what follows `params` there.
            **kwargs: likewise.

        Returns:
            What `stream` returns.
        """
        return stream(self.model, self.params, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`model.apply({"params": params}, …)`.

        Args:
            *args: of the model's call.
            **kwargs: likewise.

        Returns:
            What the model returns.
        """
        return self.model.apply({"params": self.params}, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the call.

        Args:
            *args: of the model's call.
            **kwargs: likewise.

        Returns:
            What the model returns.
        """
        return self(*args, **kwargs)

    def to(self, device: Any = None, dtype: Any = None) -> "LoadedModel":
        """A copy on a device, or in another dtype.

        Args:
            device: as in `BatchFeature.to`.
            dtype: of parameters and computation.

        Returns:
            The copy.
        """
        flat, tree = jax.tree.flatten(self.params)
        moved = BatchFeature({str(place): array for place, array in enumerate(flat)}).to(device, dtype)
        params = jax.tree.unflatten(tree, [moved[str(place)] for place in range(len(flat))])
        kinds = {array.dtype for array in jax.tree.leaves(params)}
        changed = kinds != {array.dtype for array in flat} and len(kinds) == 1
        return LoadedModel(self.model.clone(dtype=kinds.pop()) if changed else self.model, params)

    def cuda(self, device: int = 0) -> "LoadedModel":
        """A copy on a GPU.

        Args:
            device: number of the GPU.

        Returns:
            The copy.
        """
        return self.to(f"cuda:{device}")

    def cpu(self) -> "LoadedModel":
        """A copy on the CPU.

        Returns:
            The copy.
        """
        return self.to("cpu")

    def half(self) -> "LoadedModel":
        """A copy in float16, in which the encoder is computed in float32.

        Returns:
            The copy.
        """
        return self.to(dtype="float16")

    def bfloat16(self) -> "LoadedModel":
        """A copy in bfloat16.

        Returns:
            The copy.
        """
        return self.to(dtype="bfloat16")

    def float(self) -> "LoadedModel":
        """A copy in float32.

        Returns:
            The copy.
        """
        return self.to(dtype="float32")

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """`save_hf(save_directory, model, params, …)`, without the warning: a processor's `save_pretrained` follows.

        Args:
            save_directory: where to.
            **kwargs: keywords of `save_hf`, and those of transformers that ask for nothing.
        """
        own = unasked("save_pretrained", kwargs, _OF_SAVING, tuple(SAVING))
        write_pretrained(save_directory, self.model, self.params, **own)

    def get_image_features(self, pixel_values: Any, pixel_attention_mask: Any = None, **kwargs: Any) -> Any:
        """`model.apply({"params": params}, …, method="get_image_features")`.

        Args:
            pixel_values: as in `SmolVLMModel.get_image_features`, like the others.
            pixel_attention_mask: which pixels are real.
            **kwargs: further arguments.

        Returns:
            Image tokens (N, tokens, d), and how many of the N are real.
        """
        return self.model.apply(
            {"params": self.params}, pixel_values, pixel_attention_mask, **kwargs, method="get_image_features"
        )

    def num_parameters(self) -> int:
        """Count the parameters.

        Returns:
            Their number.
        """
        return sum(array.size for array in jax.tree.leaves(self.params))

    def can_generate(self) -> bool:
        """Whether the model writes text, as transformers asks.

        Returns:
            True.
        """
        return True

    def tie_weights(self) -> None:
        """Nothing: a tied output head is the embedding itself."""

    @property
    def config(self) -> SmolVLMConfig:
        """The model's config."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The checkpoint's defaults for `generate`."""
        return self.model.generation_config

    @property
    def device(self) -> Any:
        """The device of the parameters; of several the first."""
        return min(jax.tree.leaves(self.params)[0].devices(), key=lambda device: device.id)

    @property
    def dtype(self) -> Any:
        """What is computed in."""
        return jnp.dtype(self.model.dtype)

    def __getattr__(self, name: str) -> Any:
        if name == "eval":  # there is no dropout to switch off
            return lambda: self
        if name in _ATTRIBUTES:
            return _ATTRIBUTES[name]
        if name.startswith("__"):
            raise AttributeError(name)
        error = unbound("LoadedModel", name, bound=True)
        if error is None and not hasattr(type(self.model), name) and name not in vars(self.model):
            error = no_part("LoadedModel", name, bound=True)
        if error is not None:
            raise error
        return getattr(self.model, name)

    def __repr__(self) -> str:
        return f"LoadedModel({self.config.model_type}, {self.num_parameters():,} parameters, {self.dtype}, {self.device})"


unchanging(LoadedModel, "model.clone(…) gives a changed description; arguments of generate take the place of its settings")


class AutoModelForImageTextToText:
    """`load` under transformers' name.

    Raises:
        HabitError: it is called itself; `from_pretrained` makes a model.
    """

    def __init__(self) -> None:
        raise HabitError(
            f"{type(self).__name__} is no model: type {type(self).__name__}.from_pretrained(source), or load(source)"
        )

    @classmethod
    def from_config(cls, config: SmolVLMConfig, **kwargs: Any) -> Any:
        """Refused: random parameters are made apart from a model.

        Args:
            config: anything.
            **kwargs: anything.

        Returns:
            Nothing.

        Raises:
            HabitError: always; it says what to type.
        """
        raise HabitError("model = SmolVLMForConditionalGeneration(config), params = init_params(model, seed)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> LoadedModel:
        """A model and its parameters.

        Args:
            pretrained_model_name_or_path: what `load` takes.
            **kwargs: dtype (or torch_dtype; "auto" is that of the file, also for computing), attn_implementation (or
                attention), and the keywords of `load`. device_map, and other keywords of transformers, with values that ask for
                nothing.

        Returns:
            Both in one object: `model, params = …`, or `model.generate(…)` as in transformers.

        Raises:
            InputError: an unknown keyword, or one thing under two names with different values.
            SmolVLMError: as `load` raises it.
        """
        place = ("revision", "subfolder", "cache_dir", "force_download", "local_files_only", "token")
        own = (*place, "dtype", "torch_dtype", "attn_implementation", "mesh", "attention", "base", "adapter", "check")
        given = {name: value for name, value in unasked(cls.__name__, kwargs, NEUTRAL, own).items() if value is not None}
        require_agreement(cls.__name__, {name: given.get(name) for name in ("dtype", "torch_dtype")}, full_name)
        require_agreement(cls.__name__, {name: given.get(name) for name in ("attention", "attn_implementation")}, _form_meant)
        asked = given.pop("torch_dtype", None)
        asked = given.pop("dtype", asked)
        form = given.pop("attn_implementation", None)
        if form in _KERNELS_OF_TORCH and "attention" not in given:
            _log.warning(
                'attn_implementation=%r names a kernel of torch: attention="auto" is used, which chooses the kernels of this '
                'device by itself; attention="einsum" does without',
                form,
            )
        if form is not None:
            given.setdefault("attention", _form_meant(form))
        auto = isinstance(asked, str) and asked == "auto"
        model, params = load(pretrained_model_name_or_path, None if auto else asked, **given)
        if auto:
            kinds = {array.dtype for array in jax.tree.leaves(params)}
            model = model.clone(dtype=kinds.pop()) if len(kinds) == 1 else model
        return LoadedModel(model, params)


def _form_meant(form: Any) -> Any:
    """transformers' name for a form of attention as ours; anything else as it is."""
    return "auto" if form in _KERNELS_OF_TORCH else _ATTENTION.get(form, form)


AutoModelForVision2Seq = AutoModelForMultimodalLM = AutoModelForImageTextToText


class _Elsewhere:
    """A name of transformers that is not here: whatever is done with it says what to type instead."""

    def __init__(self, name: str, instead: str):
        self._said = f"there is no {name}: {instead}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise HabitError(self._said)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else HabitError(self._said)


_TRAINING = "training is `smolvlm-jax train`, or jax.grad of a function of params"
_STREAMING = "stream(model, params, **inputs) yields tokens as they are drawn"
AutoModel = _Elsewhere("AutoModel", "AutoModelForImageTextToText.from_pretrained(source), or load(source)")
AutoModelForCausalLM = _Elsewhere("AutoModelForCausalLM", "AutoModelForImageTextToText.from_pretrained(source) reads text too")
TextStreamer = _Elsewhere("TextStreamer", _STREAMING)
TextIteratorStreamer = _Elsewhere("TextIteratorStreamer", _STREAMING)
Trainer = _Elsewhere("Trainer", _TRAINING)
TrainingArguments = _Elsewhere("TrainingArguments", _TRAINING)
BitsAndBytesConfig = _Elsewhere("BitsAndBytesConfig", 'load(source, "bfloat16"), and kv_cache_dtype="int8" in generate')
_MEDIA = "pass the path, URL, array or PIL picture itself to the processor; it reads them"
load_image = _Elsewhere("load_image", _MEDIA)
load_video = _Elsewhere("load_video", _MEDIA)
set_seed = _Elsewhere("set_seed", "generate(…, seed=…) draws the same tokens for the same seed")


def pipeline(task: str | None = None, model: Any = None, **kwargs: Any) -> Any:
    """Refused: transformers' pipelines do not exist here.

    Args:
        task: anything.
        model: the checkpoint, which the message names.
        **kwargs: anything.

    Returns:
        Nothing.

    Raises:
        HabitError: always; it says what to type.
    """
    source = model if isinstance(model, (str, os.PathLike)) else "source"
    raise HabitError(
        f"there is no pipeline: model, params = load({source!r}), processor = SmolVLMProcessor.from_pretrained({source!r}), "
        "inputs = processor.encode_chat(messages), then processor.batch_decode(generate(model, params, **inputs)), "
        "or model.apply for logits; `smolvlm-jax generate` and `smolvlm-jax batch` do it from the command line"
    )
