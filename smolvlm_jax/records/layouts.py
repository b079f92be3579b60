"""The layouts in which data sets hold a conversation, and the messages that each of them means.

messages                    [{"role", "content"}, …], or JSON text of them; the chat format
conversations, conversation the same, or [{"from", "value"}, …] as LLaVA and ShareGPT have it
texts                       [{"user", "assistant"}, …], as the_cauldron and FineVision have it
prompt, question            a string, or messages
answer, completion          the assistant's turn to it: a string, or messages
system                      a string: the system's turn, before all others
"""

import json
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..processing.chat import read_message
from ..processing.parts import is_empty
from .columns import ANSWERS, ASKS, CHATS, meant

__all__ = ["answer_of", "asked_of", "text_of"]

Messages = list[dict[str, Any]]


def asked_of(record: Mapping, prompt: str | None, *, training: bool = False) -> Messages:
    """The messages of a record, apart from an answer that stands in a column of its own.

    Args:
        record: under our names of columns.
        prompt: for records that bring none.
        training: whether the record is read to learn from it, where there is no such prompt.

    Raises:
        InputError: there are no messages, they have none of the layouts, or two columns say different things.
    """
    found = {name: _read(name, record[name]) for name in (*CHATS, *ASKS) if record.get(name) is not None}
    if not found:
        if prompt is None:
            there = ", ".join(str(name) for name, value in record.items() if not is_empty(value)) or "nothing"
            read = ", ".join((*CHATS, *ASKS))
            why = "and the job has no --prompt"
            if training:
                why = f"read are {read}; say which columns are meant, as in data.train=[{meant(record, asked=False)}]"
            raise InputError(f"the record has neither messages nor a prompt (it has {there:.200}), {why}")
        found = {"prompt": _turn("user", prompt)}
    (first, messages), *others = found.items()
    for name, other in others:
        # Some data sets repeat the first question beside the conversation.
        if other != messages and not (
            len(other) == 1 and other[0]["role"] == "user" and text_of(other[0]) in map(text_of, messages)
        ):
            raise InputError(f"the record has both {first} and {name}, which differ; it needs one of them")
    system = record.get("system")
    if is_empty(system):
        return messages
    if not isinstance(system, str) or any(message["role"] == "system" for message in messages):
        raise InputError("system needs a string, and messages beside it without a system's turn of their own")
    return [*_turn("system", system), *messages]


def answer_of(record: Mapping, messages: Messages) -> Messages:
    """The assistant's turn that a record holds in a column of its own, as messages to append; none where there is none.

    Args:
        record: under our names of columns.
        messages: what `asked_of` made of it.

    Raises:
        InputError: it is no answer, or differs from the one with which `messages` end.
    """
    found = {name: record[name] for name in ANSWERS if record.get(name) is not None}
    if not found:
        return []
    (name, answer), *others = found.items()
    if any(other != answer for _, other in others):
        raise InputError(f"the record has both {name} and {others[0][0]}, which differ; it needs one of them")
    read = _turn("assistant", answer) if isinstance(answer, str) else _read(name, answer)
    if messages[-1]["role"] != "assistant":
        return read
    if [text_of(message) for message in read] != [text_of(messages[-1])]:
        raise InputError(f"the record has an {name}, and messages that end with another; it needs one of them")
    return []


def _turn(role: str, text: str) -> Messages:
    return [{"role": role, "content": [{"type": "text", "text": text}]}]


def _read(name: str, value: Any) -> Messages:
    """The messages in a column."""
    if isinstance(value, str):
        if name in ASKS:
            return _turn("user", value)
        try:  # a column of JSON
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name} is not valid JSON: {error}") from error
    if name not in CHATS and not isinstance(value, (list, tuple, Mapping)):
        raise InputError(f"{name} is a {type(value).__name__}; it needs a string")
    if isinstance(value, Mapping) and all(isinstance(part, (list, tuple)) for part in value.values()):
        # a list of structs as older versions of `datasets` store it
        if len({len(part) for part in value.values()}) != 1:
            raise InputError(f"{name} has lists of different lengths: {', '.join(map(str, value))}")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        raise InputError(f"{name} is a list of texts, not one: name the one that is meant, columns: [[{name}, {name}.0]]")
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, Mapping) for item in value):
        shape = "{'user', 'assistant'}" if name == "texts" else "{'role', 'content'}"
        raise InputError(f"{name} needs a list of at least one {shape}")
    if name == "texts":
        return [turn for number, item in enumerate(value) for turn in _pair(f"texts[{number}]", item)]
    return [read_message(f"{name}[{number}]", message) for number, message in enumerate(value)]


def _pair(where: str, item: Mapping) -> Messages:
    """The turns of {"user", "assistant"}; `source` says where the pair is from."""
    left = [key for key in item if key not in ("user", "assistant", "source") and not is_empty(item[key])]
    if left:
        raise InputError(f"{where}: nothing reads {left[0]!r:.80}; it may have user, assistant and source")
    texts = {role: item[role] for role in ("user", "assistant") if item.get(role) is not None}
    if not texts or not all(isinstance(text, str) for text in texts.values()):
        raise InputError(f"{where}: user and assistant need strings")
    return [turn for role, text in texts.items() for turn in _turn(role, text)]


def text_of(message: Mapping) -> str:
    """The words of a message."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(item["text"] for item in content if item["type"] == "text")
