"""From messages to the prompt string: the chat template, run where it can do no harm."""

import functools
import json
import re
from collections.abc import Mapping
from datetime import datetime

from ..errors import PromptError

# What the published checkpoints carry, and one item more: videos. It serves where a checkpoint has no template, and
# where a conversation holds a video, which the published template would drop.
DEFAULT_CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

MEDIA_KEYS = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_MAX_PRODUCT = 10**7


@functools.lru_cache(maxsize=64)
def compile_template(template: str):
    """The template, compiled in jinja2's immutable sandbox. Raises PromptError where it is not valid jinja."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        """Nor may a template hold the machine up with a product of a billion characters."""

        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context, operator, left, right):
            if operator == "**":
                raise jinja2.exceptions.SecurityError("a chat template cannot raise to a power")
            length = max((len(v) for v in (left, right) if hasattr(v, "__len__")), default=1)
            count = max((v for v in (left, right) if isinstance(v, int)), default=1)
            if length * count > _MAX_PRODUCT:
                raise jinja2.exceptions.SecurityError("a chat template made too long a product")
            return super().call_binop(context, operator, left, right)

    class Generation(jinja2.ext.Extension):
        """{% generation %} … {% endgeneration %} marks what the assistant says; it renders as its contents."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja's own filter escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.exceptions.TemplateError as error:
        raise PromptError(f"the chat template is not valid: {error}") from error


@functools.lru_cache(maxsize=64)
def variables_of(template: str) -> frozenset[str]:
    """The names that the template takes from outside."""
    import jinja2.meta

    return frozenset(jinja2.meta.find_undeclared_variables(compile_template(template).environment.parse(template)))


def normalize_conversations(conversation) -> tuple[list[list[dict]], bool]:
    """(list of conversations of plain messages, whether `conversation` was a batch).

    Keys that are None are dropped; a content string becomes one text item; {"type": "image_url"} items become images.
    The caller's messages are not changed. Raises PromptError for anything that is not a list of messages.
    """
    if isinstance(conversation, Mapping) or not isinstance(conversation, (list, tuple)):
        raise PromptError("a conversation is a list of messages: [{'role': 'user', 'content': [...]}]")
    if not conversation:
        raise PromptError("the conversation is empty")
    batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    conversations = list(conversation) if batched else [conversation]
    return [_conversation(index, messages) for index, messages in enumerate(conversations)], batched


def _conversation(index: int, messages) -> list[dict]:
    messages = getattr(messages, "messages", messages)
    if not isinstance(messages, (list, tuple)):
        raise PromptError(f"conversation {index} is a {type(messages).__name__}; it needs a list of messages")
    out = []
    for place, message in enumerate(messages):
        where = f"conversation {index}, message {place}"
        if not isinstance(message, Mapping) or "role" not in message:
            raise PromptError(f"{where}: a message is a mapping with 'role' and 'content'")
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        if isinstance(content, str):
            message["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, (list, tuple)):
            message["content"] = [_item(f"{where}, item {number}", item) for number, item in enumerate(content)]
        elif content is not None:
            raise PromptError(f"{where}: content is a {type(content).__name__}; it needs a string or a list of items")
        out.append(message)
    return out


def _item(where: str, item) -> dict:
    if isinstance(item, str):
        return {"type": "text", "text": item}
    if not isinstance(item, Mapping) or "type" not in item:
        raise PromptError(f"{where}: an item is a mapping with a 'type', or a string")
    item = dict(item)
    if item["type"] == "image_url" and "image_url" in item:
        url = item["image_url"]
        item = {"type": "image", "url": url.get("url", "") if isinstance(url, Mapping) else url}
    if item["type"] == "text" and not isinstance(item.get("text"), str):
        raise PromptError(f"{where}: a text item needs its 'text' as a string")
    return item


def collect_media(conversations: list[list[dict]], kind: str) -> list[list]:
    """What the items of `kind` ("image" or "video") carry, in order, a list per conversation."""
    out = []
    for messages in conversations:
        found = []
        for message in messages:
            for item in message.get("content") or []:
                if item.get("type") == kind:
                    found.extend(item[key] for key in MEDIA_KEYS[kind] if item.get(key) is not None)
        out.append(found)
    return out


def has_video(conversations: list[list[dict]]) -> bool:
    return any(item.get("type") == "video" for messages in conversations for m in messages for item in m.get("content") or [])


def plain(value):
    """`value` with nothing in it but json types, so that a template gets no object with methods to call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return f"<{type(value).__name__}>"


_WANTS_STRINGS = re.compile(r"\bis\s+(not\s+)?string\b")


def _as_template_wants(template: str, messages: list[dict], strings: set[int]) -> list[dict]:
    """Content that came as a string back to one, for a template that looks for no types and so knows strings only."""
    if "type" in template or _WANTS_STRINGS.search(template):
        return messages
    out = list(messages)
    for place in strings:
        out[place] = {**messages[place], "content": messages[place]["content"][0]["text"]}
    return out


def string_contents(conversation, batched: bool) -> list[set[int]]:
    """For each conversation the places of the messages whose content is a plain string."""
    conversations = [getattr(messages, "messages", messages) for messages in (conversation if batched else [conversation])]
    return [
        {place for place, message in enumerate(messages) if isinstance(message.get("content"), str)}
        for messages in conversations
    ]


def render(
    template: str,
    conversations: list[list[dict]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    strings: list[set[int]] | None = None,
    **variables,
) -> list[str]:
    """A prompt string per conversation. `variables` (special tokens, tools, documents, …) are visible to the template.

    continue_final_message: end right after the last text of the last message, for the model to go on with.
    strings: what string_contents says of the conversations.
    Raises PromptError for whatever goes wrong in the template.
    """
    if continue_final_message and add_generation_prompt:
        raise PromptError("continue_final_message and add_generation_prompt exclude each other")
    compiled = compile_template(template)
    variables = plain(variables)
    prompts = []
    for index, messages in enumerate(conversations):
        chat = _as_template_wants(template, plain(messages), strings[index] if strings else set())
        final = _mark_final(chat, index) if continue_final_message else None
        try:
            text = compiled.render(messages=chat, add_generation_prompt=add_generation_prompt, **variables)
        except Exception as error:  # a template is a program, and raises what its expressions raise
            raise PromptError(f"the chat template fails on conversation {index}: {error}") from error
        prompts.append(_cut_final(text, final, index) if final is not None else text)
    return prompts


def _mark_final(chat: list[dict], index: int) -> str:
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_TAG
        return content
    for item in reversed(content or []):
        if "text" in item:
            final, item["text"] = item["text"], item["text"] + _CONTINUE_TAG
            return final
    raise PromptError(f"continue_final_message: the last message of conversation {index} has no text to continue")


def _cut_final(text: str, final: str, index: int) -> str:
    tag = _CONTINUE_TAG.strip()
    if tag not in text or final.strip() not in text:
        raise PromptError(f"continue_final_message: the template drops the last message of conversation {index}")
    place = text.rindex(tag)
    kept = text[:place]
    # Where the template trimmed the tag's own space it trimmed the text's as well.
    return kept if text[place:].startswith(_CONTINUE_TAG) else kept.rstrip()
