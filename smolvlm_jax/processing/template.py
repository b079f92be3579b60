"""From conversations to prompt strings with a chat template."""

import re
from collections.abc import Mapping
from typing import Any

from ..errors import PromptError
from . import rendering
from .chat import Message
from .parts import SOURCES
from .rendering import variables_of

__all__ = ["DEFAULT_CHAT_TEMPLATE", "choose_template", "plain", "render", "variables_of"]

# The template of the published checkpoints, extended by videos. It is used where a checkpoint has no template, and where a
# conversation holds a video, which the published template would drop.
DEFAULT_CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_LONGEST_NAME = 4096  # characters of the name of a picture or video: what is longer is the picture itself


def choose_template(given: str | dict[str, str] | None, name: str | None, *, video: bool) -> str:
    """The template of a call.

    Args:
        given: the processor's template, or several by name.
        name: what the call asks for: the name of one of them, or jinja text; None for the default.
        video: a conversation holds a video.

    Raises:
        PromptError: the call asks for the default, and none of the templates is called so.
    """
    named = given if isinstance(given, dict) else {}
    if name is not None:
        return named.get(name, name)
    if video:
        return DEFAULT_CHAT_TEMPLATE
    if named and "default" not in named:
        raise PromptError(f"no chat template is called 'default'; pass chat_template, one of {sorted(named)}")
    return (given if isinstance(given, str) else named.get("default")) or DEFAULT_CHAT_TEMPLATE


def plain(value: Any) -> Any:
    """`value` reduced to JSON types, so that a template gets no object with methods to call."""
    kind = type(value)
    if value is None or kind is str or kind is int or kind is float or kind is bool:
        return value
    if kind is list:
        return [plain(item) for item in value]
    if kind is dict or isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    for basic in (str, bool, int, float):
        if isinstance(value, basic):
            return basic(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _without_data(messages: list[Message]) -> list[Message]:
    """`messages` without what pictures and videos are made of, where it is given as text (base64, data: URLs)."""

    def shown(item: Any) -> Any:
        if not isinstance(item, Mapping) or item.get("type") not in SOURCES:
            return item
        keys = SOURCES[item["type"]]
        long = [key for key in keys if isinstance(item.get(key), str) and len(item[key]) > _LONGEST_NAME]
        return {**item, **dict.fromkeys(long, "<data>")} if long else item

    def clear(message: Message) -> Message:
        content = message.get("content")
        return {**message, "content": list(map(shown, content))} if isinstance(content, list) else message

    return list(map(clear, messages))


_WANTS_STRINGS = re.compile(r"\bis\s+(not\s+)?string\b")


def _as_template_wants(template: str, messages: list[Message], strings: set[int]) -> list[Message]:
    """`messages` with the contents at the places `strings` turned back into strings, for a template that knows only those."""
    if "type" in template or _WANTS_STRINGS.search(template):
        return messages
    out = list(messages)
    for place in strings:
        out[place] = {**messages[place], "content": messages[place]["content"][0]["text"]}
    return out


def render(
    template: str,
    conversations: list[list[Message]],
    *,
    strings: list[set[int]],
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: Any,
) -> list[str]:
    """A prompt string for each conversation.

    Args:
        template: jinja text.
        conversations: messages as `chat.normalize_conversations` gives them.
        strings: for each conversation the places of the messages whose content was given as a string.
        add_generation_prompt: end with what makes the model answer.
        continue_final_message: end right after the last text of the last message, for the model to go on with it.
        **variables: what else the template can see (special tokens, tools, documents).

    Raises:
        PromptError: the template is not valid, or fails on a conversation.
    """
    if continue_final_message and add_generation_prompt:
        raise PromptError("continue_final_message and add_generation_prompt exclude each other")
    variables = plain(variables)
    prompts = []
    for index, messages in enumerate(conversations):
        chat = _as_template_wants(template, plain(_without_data(messages)), strings[index])
        final = _mark_final(chat, index) if continue_final_message else None
        try:
            text = rendering.render(template, {**variables, "messages": chat, "add_generation_prompt": add_generation_prompt})
        except PromptError as error:
            raise PromptError(f"the chat template fails on conversation {index}: {error}") from error
        prompts.append(_cut_final(text, final=final, index=index) if final is not None else text)
    return prompts


def _mark_final(chat: list[Message], index: int) -> str:
    """Put a tag behind the last text of the last message; returns that text."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_TAG
        return content
    for item in reversed(content or []):
        if "text" in item:
            final, item["text"] = item["text"], item["text"] + _CONTINUE_TAG
            return final
    raise PromptError(f"continue_final_message: the last message of conversation {index} has no text to continue")


def _cut_final(text: str, *, final: str, index: int) -> str:
    """The rendered `text` up to the tag that `_mark_final` put behind `final`."""
    tag = _CONTINUE_TAG.strip()
    if tag not in text or final.strip() not in text:
        raise PromptError(f"continue_final_message: the template drops the last message of conversation {index}")
    place = text.rindex(tag)
    kept = text[:place]
    # Where the template trimmed the tag's own space, it would have trimmed the text's as well.
    return kept if text[place:].startswith(_CONTINUE_TAG) else kept.rstrip()
