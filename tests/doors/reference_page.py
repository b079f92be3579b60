"""The tables of docs/from-transformers.md, made from the signatures of transformers and ours.

`python tests/doors/reference_page.py` writes them into the page; test_reference_page.py compares.
"""

import ast
import contextlib
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import transformers
from transformers.processing_utils import ProcessingKwargs, VideosKwargs

import smolvlm_jax as ours
from smolvlm_jax import config as our_config
from smolvlm_jax.decoder import SmolVLMBaseModelOutputWithPast
from smolvlm_jax.generation_habits import OF_A_CALL, OTHERS
from smolvlm_jax.habits import ANY, Neutral
from smolvlm_jax.model import NEUTRAL, SmolVLMCausalLMOutputWithPast
from smolvlm_jax.processing.arguments import _NEUTRAL as PROCESSOR_NEUTRAL
from smolvlm_jax.processing.text_options import TEXT_NEUTRAL, TextOptions
from smolvlm_jax.vision import SmolVLMVisionOutput

PAGE = Path(__file__).parents[2] / "docs" / "from-transformers.md"
START, END = "<!-- tables: made from the signatures -->", "<!-- end of the tables -->"
VERSION = "5.23.0"
_MISSING = object()

# Why a default or an argument differs, by section and name.
WHY = {
    ("generate", "max_new_tokens"): "20 where there is no max_length, as there",
    ("generate", "max_length"): "20 there means 20 new tokens, as here",
    ("generate", "top_k"): "None as a keyword switches it off",
    ("generate", "logprobs"): "log-softmax of what output_logits gives, of the new tokens and so many alternatives",
    ("SmolVLMProcessor.__call__", "images_kwargs"): "keywords for one part",
    ("SmolVLMConfig", "pad_token_id"): "deprecated there; the text config's counts",
    ("SmolVLMVisionTransformer", "pixel_values"): "channels last; data_format='channels_first' takes the reference's",
    **{(name, "use_cache"): "None is on there, off here" for name in ("SmolVLMModel", "SmolVLMForConditionalGeneration")},
    ("Image processor", "data_format"): "the reference's class for PIL leaves channels first in any case",
    ("Image processor", "size"): "a number is a square in both",
    ("Image processor", "max_image_size"): "a number is taken too, as the documentation writes it",
}


def arguments(function: Any) -> dict[str, Any]:
    """The arguments of a function with their defaults, without self and what catches the others."""
    found = inspect.signature(function).parameters.values()
    kept = [p for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in ("self", "cls")]
    return {p.name: _MISSING if p.default is p.empty else p.default for p in kept}


def fields(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass with their defaults."""
    return {f.name: _MISSING if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(kind)}


def keywords(kind: Any, defaults: Any = None) -> dict[str, Any]:
    """The keywords of a TypedDict, with the values that an object has for them."""
    return {name: getattr(defaults, name, None) for name in kind.__annotations__}


def shown(value: Any) -> str:
    if value is _MISSING:
        return "needed"
    if type(value).__name__ == "SizeDict":
        value = dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "its defaults"
    value = getattr(value, "value", value)  # of an enum
    if isinstance(value, float):
        value = float(f"{value:.6g}")
    return f"`{list(value) if isinstance(value, tuple) else value!r}`"


def verdict(section: str, name: str, theirs: dict, mine: dict, neutral: dict[str, Neutral], aliases: dict[str, str]) -> str:
    why = WHY.get((section, name), "")
    if name in mine and name in theirs:
        same = shown(mine[name]) == shown(theirs[name]) or section.startswith("Output")
        return "; ".join(filter(None, ["same" if same else "used, another default", why]))
    if name in mine:
        return "; ".join(filter(None, ["here only", why]))
    if name in aliases:
        return aliases[name]
    if name in neutral:
        values, instead = neutral[name]
        takes = "taken, without effect" if values is ANY else "only " + ", ".join(f"`{value!r}`" for value in (None, *values))
        return "; ".join(filter(None, [takes, instead]))
    return "; ".join(filter(None, ["kept, without effect" if section.endswith("Config") else "not here", why]))


def table(section: str, theirs: dict, mine: dict, neutral: dict | None = None, aliases: dict | None = None) -> str:
    rows = [f"### {section}", "", "| argument | transformers | here | |", "|---|---|---|---|"]
    for name in dict.fromkeys([*theirs, *mine]):
        there = shown(theirs[name]) if name in theirs else ""
        here = shown(mine[name]) if name in mine else ""
        said = verdict(section, name, theirs, mine, neutral or {}, aliases or {})
        rows.append(f"| {name} | {there} | {here} | {said} |".replace("||", "| |"))
    return "\n".join(rows)


def tables() -> str:
    """All tables, as they stand in the page."""
    model, text = ours.SmolVLMModel, ours.SmolVLMTextModel
    theirs = transformers.models.smolvlm.modeling_smolvlm
    text_arguments = {name: value for name, value in arguments(text.__call__).items() if name != "inputs_embeds"}
    forward = {**arguments(model.__call__), **text_arguments}
    whole = {**arguments(ours.SmolVLMForConditionalGeneration.__call__), **forward}
    drop = lambda found: {name: value for name, value in found.items() if name != "extra"}
    image, video = ours.SmolVLMImageProcessor, ours.SmolVLMVideoProcessor
    reference = transformers.SmolVLMImageProcessorPil()
    image_theirs = keywords(reference.valid_kwargs, reference)
    video_theirs = {**dict.fromkeys(keywords(VideosKwargs)), **_video_defaults()}
    generation = transformers.GenerationConfig()
    defaults = generation._get_default_generation_params()
    generate_theirs = {**arguments(transformers.generation.GenerationMixin.generate), **vars(generation)}
    generate_theirs = {name: defaults.get(name, value) for name, value in generate_theirs.items() if not name.startswith("_")}
    features = "`image_hidden_states`, and in 5.24 `image_outputs.pooler_output`"
    parts = [
        table("SmolVLMConfig", fields(transformers.SmolVLMConfig), drop(fields(our_config.SmolVLMConfig))),
        table("SmolVLMVisionConfig", fields(transformers.SmolVLMVisionConfig), drop(fields(our_config.SmolVLMVisionConfig))),
        table(
            "SmolVLMTextConfig",
            fields(transformers.LlamaConfig),
            drop(fields(our_config.SmolVLMTextConfig)),
            aliases={"rope_parameters": "read as rope_theta and rope_scaling"},
        ),
        table(
            "SmolVLMVisionTransformer",
            arguments(theirs.SmolVLMVisionTransformer.forward),
            arguments(ours.SmolVLMVisionTransformer.__call__),
        ),
        table("SmolVLMModel", arguments(theirs.SmolVLMModel.forward), forward, NEUTRAL),
        table("SmolVLMForConditionalGeneration", arguments(theirs.SmolVLMForConditionalGeneration.forward), whole, NEUTRAL),
        table("Output of SmolVLMVisionTransformer", _base_output(), fields(SmolVLMVisionOutput), aliases={"pooler_output": ""}),
        table("Output of SmolVLMModel", fields(theirs.SmolVLMBaseModelOutputWithPast), fields(SmolVLMBaseModelOutputWithPast)),
        table(
            "Output of SmolVLMForConditionalGeneration",
            fields(theirs.SmolVLMCausalLMOutputWithPast),
            fields(SmolVLMCausalLMOutputWithPast),
            aliases={"image_outputs": features},
        ),
        table("Image processor", image_theirs, {**image.DEFAULTS, **_call(image)}, image.NEUTRAL),
        table("Video processor", video_theirs, {**video.DEFAULTS, **_call(video)}, video.NEUTRAL),
        table(
            "SmolVLMProcessor",
            arguments(transformers.models.smolvlm.processing_smolvlm.SmolVLMProcessor.__init__),
            arguments(ours.SmolVLMProcessor.__init__),
        ),
        table(
            "SmolVLMProcessor.__call__",
            {**arguments(transformers.ProcessorMixin.__call__), **dict.fromkeys(keywords(ProcessingKwargs))},
            {
                **arguments(ours.SmolVLMProcessor.__call__),
                **dict.fromkeys(("text_kwargs", "images_kwargs", "videos_kwargs", "return_metadata")),
                "return_mm_token_type_ids": False,
            },
            {**PROCESSOR_NEUTRAL, **TEXT_NEUTRAL},
        ),
        table(
            "SmolVLMProcessor.apply_chat_template",
            arguments(transformers.ProcessorMixin.apply_chat_template),
            arguments(ours.SmolVLMProcessor.apply_chat_template),
            PROCESSOR_NEUTRAL,
        ),
        table(
            "Tokenizer",
            arguments(transformers.PreTrainedTokenizerBase.__call__),
            {"text": _MISSING, **fields(TextOptions)},
            TEXT_NEUTRAL,
        ),
        table(
            "generate",
            generate_theirs,
            {**arguments(ours.generate), **fields(ours.GenerationConfig)},
            {**OTHERS, **OF_A_CALL},
        ),
    ]
    return "\n\n".join(parts)


def _call(kind: Any) -> dict[str, Any]:
    """The keywords of a media processor's calls."""
    return {name: value for name, value in arguments(kind.preprocess).items() if name not in ("images", "videos")}


def _base_output() -> dict[str, Any]:
    return fields(transformers.modeling_outputs.BaseModelOutput)


def _video_defaults() -> dict[str, Any]:
    """Defaults of the reference's video processor, whose class needs torchvision: read off its sources."""
    root = Path(transformers.__file__).parent
    names = {"PILImageResampling.LANCZOS": 1, "PILImageResampling.BICUBIC": 3, "1 / 255": 1 / 255}
    names |= dict.fromkeys(("IMAGENET_STANDARD_MEAN", "IMAGENET_STANDARD_STD"), (0.5, 0.5, 0.5))
    found: dict[str, Any] = {}
    for path in ("video_processing_utils.py", "models/smolvlm/video_processing_smolvlm.py"):
        source = (root / path).read_text(encoding="utf-8")
        for name, value in re.findall(r"^    (\w+) = (.+)$", source[source.index("class ") :], re.M):
            if name not in ("model_input_names", "valid_kwargs"):
                with contextlib.suppress(ValueError, SyntaxError):
                    found[name] = names[value] if value in names else ast.literal_eval(value.replace("4 * 364", "1456"))
    return found


def page(text: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    assert transformers.__version__ == VERSION, transformers.__version__
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
