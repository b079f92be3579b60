"""What a harness is told about a model and about one request, under our names. Imports no harness."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..generation_config import SamplingParams
from ..habits import require_agreement
from ..media_options import PictureOptions
from .answerer import Answerer

__all__ = ["answerer_of", "request_settings"]

_ENGINE = ("dtype", "attention", "mesh", "check", "slots", "ring_lengths", "cache_bytes", "kv_cache_dtype")
_PICTURES = tuple(entry.name for entry in dataclasses.fields(PictureOptions))
_SAMPLING = tuple(entry.name for entry in dataclasses.fields(SamplingParams))
# Of the generation_kwargs of a task: names for ours, and names that say nothing about our answers, such as those of one model.
_NAMES = {"max_gen_toks": "max_new_tokens", "max_tokens": "max_new_tokens", "until": "stop"}
_WITHOUT_EFFECT = frozenset({"image_aspect_ratio", "use_cache", "num_frames", "length_penalty", "pad_token_id", "eos_token_id"})


def answerer_of(pretrained: str | None, sampling: SamplingParams, given: Mapping[str, Any]) -> Answerer:
    """The Answerer of a harness's model arguments.

    Args:
        pretrained: as `Answerer.model`.
        sampling: of requests that set nothing for themselves.
        given: by name: `adapter`, `workers`, `keep_special_tokens`, options of the engine, fields of PictureOptions.

    Raises:
        InputError: a name is none of these, or no checkpoint is named.
    """
    own = ("adapter", "workers", "keep_special_tokens")
    known = (*own, *_ENGINE, *_PICTURES)
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"there is no model argument {unknown[0]!r}; there are pretrained, {', '.join(known)}")
    if pretrained is None and given.get("adapter") is None:
        raise InputError("no checkpoint is named: pretrained=NAME, a directory or a name that `smolvlm-jax models` lists")
    return Answerer(
        model=pretrained,
        sampling=sampling,
        pictures=PictureOptions(**{name: value for name, value in given.items() if name in _PICTURES}),
        engine_options={name: value for name, value in given.items() if name in _ENGINE},
        **{name: value for name, value in given.items() if name in own},
    )


def request_settings(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling arguments of a record from the generation settings of a harness.

    A temperature means sampling unless `do_sample` says otherwise, and a temperature of 0 the most likely token.

    Raises:
        InputError: a setting that changes answers is not known, asks for beams, or has two names with different values.
    """
    for ours in set(_NAMES.values()):
        asked = {name: value for name, value in kwargs.items() if _NAMES.get(name, name) == ours}
        require_agreement("generation_kwargs", asked, lambda value: [value] if isinstance(value, str) else value)
    out: dict[str, Any] = {}
    for name, value in kwargs.items():
        ours = _NAMES.get(name, name)
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name == "num_beams":
            if value != 1:
                raise InputError(f"num_beams is {value!r:.80}; answers are decoded without beams")
        elif ours not in _SAMPLING:
            raise InputError(f"generation_kwargs has {name!r:.80}, and nothing reads that; known are {', '.join(_SAMPLING)}")
        else:
            out[ours] = value
    if isinstance(out.get("stop"), str):
        out["stop"] = [out["stop"]]
    if "stop" in out and not (stops := [text for text in out["stop"] if text]):
        del out["stop"]
    elif "stop" in out:
        out["stop"] = stops
    temperature = out.get("temperature")
    out.setdefault("do_sample", bool(temperature))
    if not temperature or not out["do_sample"]:
        for name in ("temperature", "top_p", "top_k", "min_p"):
            out.pop(name, None)
    return out
