"""The body of a line of an OpenAI batch, read under our names."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import InputError
from ..generation_config import SamplingParams
from ..processing.parts import is_empty
from .columns import ASKS, CHATS, MEDIA

__all__ = ["BODY", "OPENAI", "OVERRIDES", "SETTINGS", "request_of"]

# The sampling arguments that a record may set for itself. Which columns a row has is the job's.
OVERRIDES = tuple(field.name for field in fields(SamplingParams) if field.name != "logprobs")
# Names of sampling arguments in requests for an OpenAI endpoint, and our names for them.
OPENAI = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "max_output_tokens": "max_new_tokens"}
# Every name under which a record may set such an argument.
SETTINGS = (*OVERRIDES, *OPENAI)
# Keys of a body that no answer depends on, whatever they say. The model is the job's.
_WITHOUT_EFFECT = frozenset(
    {"model", "user", "metadata", "store", "stream", "stream_options", "service_tier", "safety_identifier", "prompt_cache_key"}
)
# Keys of a body that are not supported, with the values by which they ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# Endpoints whose requests are answered; those of others, such as /v1/embeddings, look alike.
_ENDPOINTS = re.compile(r"(completions|responses)/?(\?.*)?$")
# Keys of a record that holds a body.
BODY = ("body", "custom_id", "id", "method", "url")


def request_of(record: Mapping) -> Mapping[str, Any]:
    """The part of a record that asks: its `body`, as in a line of an OpenAI batch, or the record itself, under our names.

    In a body a temperature means sampling, and a temperature of 0 the most likely token.

    Raises:
        InputError: the body has a key that nothing reads, or the record asks for something beside it.
    """
    body = record.get("body")
    request = record if body is None else body
    if not isinstance(request, Mapping):
        raise InputError(f"body is a {type(body).__name__}; it needs an object with messages")
    if isinstance(body, Mapping) and not _ENDPOINTS.search(str(record.get("url") or "/completions")):
        raise InputError(f"url is {record.get('url')!r:.80}; answered are requests for …/completions and …/responses")
    out = dict(request)
    for theirs, ours in OPENAI.items():
        value = out.pop(theirs, None)
        if value is None:
            continue
        if out.get(ours) not in (None, value):
            raise InputError(f"{theirs} is {value!r:.80} beside another limit of {out[ours]!r:.80}; give one of them")
        out[ours] = value
    if body is None:
        return out
    if "input" in out and not any(name in out for name in (*CHATS, *ASKS, "system")):  # of the endpoint /v1/responses
        out["prompt"], out["system"] = out.pop("input"), out.pop("instructions", None)
    for name in ("system", *CHATS, *ASKS, *MEDIA, *SETTINGS):
        if not is_empty(record.get(name)):
            raise InputError(f"nothing reads {name!r} beside a body; put it into the body")
    known = {*CHATS, *ASKS, *MEDIA, *OVERRIDES, *_WITHOUT_EFFECT, "system"}
    for name, value in list(out.items()):
        if name in known:
            continue
        if not is_empty(value) and value not in _NEUTRAL.get(name, ()):
            raise InputError(f"{name} is {value!r:.80}, and nothing reads that of a body")
        del out[name]
    for name in _WITHOUT_EFFECT:
        out.pop(name, None)
    if out.get("temperature") is not None and "do_sample" not in out:
        out["do_sample"] = out["temperature"] != 0
        if out["temperature"] == 0:
            del out["temperature"]
    return out
