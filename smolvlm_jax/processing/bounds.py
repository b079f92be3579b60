"""Prompts that are too long for certain, found before they are tokenised and before their pictures are decoded.

Tokenising takes some hundred times the size of a text, and tiles are far larger than the files they come from. So what can
never be answered is refused from the number of its characters and from the headers of its pictures.
"""

import functools
from typing import Any

from ..errors import InputError
from .chat import collect_media, has_video, items_of, normalize_conversations
from .processor import SmolVLMProcessor
from .tokenizer import SmolVLMTokenizer

__all__ = ["check_length", "least_tokens"]

# Characters that a token of a tokenizer may stand for that drops some, or joins unknown ones.
_ANY = 1024
# A square larger than what any checkpoint resizes pictures to: it takes as many tiles as a picture can.
_LARGE = 1 << 14


def check_length(processor: SmolVLMProcessor, conversation: list[dict[str, Any]], longest: int) -> None:
    """Refuse a conversation whose prompt has more than `longest` tokens, where that can be told cheaply. Videos are not opened.

    Args:
        processor: of the checkpoint.
        conversation: messages, as in `apply_chat_template`; special tokens in their texts are read as plain characters.
        longest: tokens of a prompt, at most.

    Raises:
        InputError: it is longer, or what counting the tokens of its pictures raises.
    """
    least = least_tokens(processor, conversation)
    if least > longest:
        raise InputError(f"prompt too long: it takes at least {least} tokens, and there is room for {longest}")
    messages = normalize_conversations(conversation).messages
    if has_video(messages):
        return
    pictures = len(collect_media(messages, "image")[0])
    if pictures * _most_tokens(processor) + least > longest:
        options: dict[str, Any] = {"add_generation_prompt": True, "special_tokens_in_text": "escape"}
        (tokens,) = processor.count_prompt_tokens(conversation, **options)
        if tokens > longest:
            raise InputError(f"prompt too long: {tokens} tokens, and there is room for {longest}")


def least_tokens(processor: SmolVLMProcessor, conversation: list[dict[str, Any]], *, pictures: bool = True) -> int:
    """A number of tokens that the prompt of a conversation has at least: its characters divided by the most that a token stands
    for, and a tile a picture. pictures: count these."""
    messages = normalize_conversations(conversation).messages
    characters = sum(len(item["text"]) for item in items_of(messages[0], "text"))
    tiles = len(collect_media(messages, "image")[0]) if pictures else 0
    return -(-characters // _longest_token(processor.tokenizer)) + tiles * processor.image_seq_len


@functools.lru_cache(maxsize=8)
def _longest_token(tokenizer: SmolVLMTokenizer) -> int:
    """The most characters that a token stands for: none is dropped where bytes are merged, and a character has at least one."""
    backend = tokenizer.backend
    merges_bytes = type(backend.model).__name__ == "BPE" and backend.normalizer is None and backend.pre_tokenizer is not None
    if not (merges_bytes and b"ByteLevel" in backend.pre_tokenizer.__getstate__()):
        return _ANY
    return max(map(len, backend.get_vocab()))


@functools.lru_cache(maxsize=8)
def _most_tokens(processor: SmolVLMProcessor) -> int:
    """Tokens of a picture with as many tiles as any has, markers included."""
    plan = processor.image_processor.plan(_LARGE, _LARGE)
    return len(processor.tokenizer.encode(processor.media_tokens.picture(plan.rows, plan.cols), add_special_tokens=False))
