"""From a conversation to a sample: token ids, labels, tiles. No jax in this module: worker processes run it."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import PromptError, describe
from ..processing import SmolVLMProcessor
from ..processing.bounds import least_tokens
from ..processing.chat import collect_media, has_video, normalize_conversations, read_message
from ..processing.options import call_options, open_processor
from ..processing.pdf_pages import with_pages
from .config import IGNORE, DataConfig
from .records import Element, read_element

__all__ = ["Prepare", "Sample", "Skipped", "fitted", "label_tokens", "make_sample"]


@dataclass(frozen=True)
class Sample:
    """A conversation, ready for a row.

    Attributes:
        input_ids: int32 (t,).
        labels: int32 (t,), -100 where nothing is learned.
        tiles: uint8 (n, T, T, 3), or (0, 0, 0, 3) without pictures.
        dropped: number of pictures left out so that the others fit.
        unread: names of columns of the record that nothing reads.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray
    dropped: int = 0
    unread: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Skipped:
    """A record that gives no sample.

    Attributes:
        reason: "too_long" or "faulty".
        detail: why, and which record it is.
    """

    reason: str
    detail: str


@functools.lru_cache(maxsize=8)
def _answer_header(processor: SmolVLMProcessor) -> tuple[int, ...]:
    """The ids with which the template opens an answer: "Assistant:" for all published checkpoints but granite-docling."""
    turn = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    without, opened = (processor.apply_chat_template(turn, add_generation_prompt=flag) for flag in (False, True))
    if not opened.startswith(without) or opened == without:
        raise PromptError("the chat template does not append the beginning of an answer, so answers cannot be located")
    return tuple(processor.tokenizer.encode(opened[len(without) :], add_special_tokens=False))


def label_tokens(processor: SmolVLMProcessor, messages: Sequence[dict], ids: np.ndarray, learn: str) -> np.ndarray:
    """Labels of a tokenised conversation.

    Args:
        processor: whose tokenizer and chat template made `ids`.
        messages: the conversation.
        ids: int (t,).
        learn: "assistant" for every answer and the token that ends it, "last" for the last one only, "all" for every word and
            end of turn. Image tokens, markers, timestamps of videos and whatever else the template writes are not learned.
            Nor are turns of weight 0.

    Returns:
        int32 (t,), -100 where nothing is learned.

    Raises:
        PromptError: the turns are not found (they are located by token ids, not by searching the text), or all that would be
            learned have weight 0.
    """
    end = processor.tokenizer.eos_token_id
    ends = np.flatnonzero(ids == end)
    if len(ends) != len(messages):
        raise PromptError(f"{len(messages)} turns, but {len(ends)} tokens that end a turn: the template does not mark each end")
    tokenizer = processor.tokenizer
    steering = processor.steering_words() | processor.steering_words(video=True)
    masked = {id for word, id in tokenizer.added_tokens.items() if word in steering} - {end}
    words = ~np.isin(ids, list(masked))
    taken = [k for k, message in enumerate(messages) if learn == "all" or message["role"] == "assistant"]
    taken = [k for k in (taken[-1:] if learn == "last" else taken) if messages[k].get("weight", 1)]
    if not taken:
        raise PromptError("nothing is learned: no turn is the assistant's, or all that are have weight 0")
    if learn == "all":
        turns = np.concatenate([[0], np.cumsum(ids == end)[:-1]])
        return np.where(words & (np.isin(turns, taken) | (turns == len(ends))), ids, IGNORE).astype(np.int32)
    header = _answer_header(processor)
    learned = np.zeros(len(ids), bool)
    for k in taken:
        start, stop = (ends[k - 1] + 1 if k else 0), ends[k]
        # The header is at the start of the turn, after a line break at most.
        found = [at for at in range(start, min(start + 3, stop)) if tuple(ids[at : at + len(header)]) == header]
        if not found:
            raise PromptError(f"turn {k} is the assistant's, but does not begin as the template begins an answer")
        learned[found[0] + len(header) : stop + 1] = True
    return np.where(learned & words, ids, IGNORE).astype(np.int32)


def make_sample(processor: SmolVLMProcessor, messages: list[dict[str, Any]], config: DataConfig) -> Sample | Skipped:
    """A conversation as a sample, or why it does not fit into a row.

    Raises:
        SmolVLMError: the processor cannot read the messages or their pictures.
    """
    messages = with_pages(messages, processor.image_processor.limits)
    messages = [read_message(f"message {number}", message) for number, message in enumerate(messages)]
    fitting, dropped, needed = fitted(processor, messages, config)
    if fitting is None:
        return Skipped("too_long", needed)
    options = {"special_tokens_in_text": config.special_tokens_in_text, **call_options(config.pictures)}
    out = processor.encode_chat(fitting, add_generation_prompt=False, **options)
    ids = out["input_ids"][0].astype(np.int32)
    tiles = out["pixel_values"][: int(out["num_tiles"])] if "pixel_values" in out else np.zeros((0, 0, 0, 3), np.uint8)
    if len(ids) > config.length or (config.tiles_per_row is not None and len(tiles) > config.tiles_per_row):
        return Skipped("too_long", f"{len(ids)} tokens and {len(tiles)} tiles")
    return Sample(ids, label_tokens(processor, fitting, ids, config.loss_on), tiles, dropped)


def fitted(processor: SmolVLMProcessor, messages: list, config: DataConfig) -> tuple[list | None, int, str]:
    """(messages that fit or None, pictures dropped, what all of it needs), from the headers of the pictures alone."""
    needed, dropped, images = "", 0, processor.image_processor
    if (least := least_tokens(processor, messages, pictures=False)) > config.length:
        return None, 0, f"at least {least} tokens"
    if has_video(normalize_conversations(messages).messages):  # measured when it is decoded
        return messages, 0, needed
    while True:
        tokens = processor.count_prompt_tokens(messages, special_tokens_in_text=config.special_tokens_in_text)[0]
        (pictures,) = collect_media(normalize_conversations(messages).messages, "image")
        tiles = sum(images.plan_picture(picture).num_tiles for picture in pictures)
        needed = needed or f"{tokens} tokens and {tiles} tiles"
        if tokens <= config.length and (config.tiles_per_row is None or tiles <= config.tiles_per_row):
            return messages, dropped, needed
        shorter = _without_last_picture(messages) if config.too_long == "drop_pictures" else None
        if shorter is None:
            return None, dropped, needed
        messages, dropped = shorter, dropped + 1


def _without_last_picture(messages: list[dict]) -> list[dict] | None:
    for place in range(len(messages) - 1, -1, -1):
        content = messages[place]["content"]
        if isinstance(content, list):
            for number in range(len(content) - 1, -1, -1):
                if isinstance(content[number], dict) and content[number].get("type") == "image" and len(content) > 1:
                    left = [*content[:number], *content[number + 1 :]]
                    return [*messages[:place], {**messages[place], "content": left}, *messages[place + 1 :]]
    return None


class Prepare:
    """record -> Sample | Skipped, in any process: the processor is read from its directory when it is first needed."""

    def __init__(self, directory: str | os.PathLike, config: DataConfig):
        self.directory, self.config = os.fspath(directory), config
        self._processor: SmolVLMProcessor | None = None

    def __getstate__(self):
        return {**self.__dict__, "_processor": None}

    @property
    def processor(self) -> SmolVLMProcessor:
        if self._processor is None:
            self._processor = open_processor(self.directory, self.config.pictures)
        return self._processor

    def __call__(self, element: Element) -> Sample | Skipped:
        place = element[-1]
        try:
            read = read_element(element)
            sample = make_sample(self.processor, read.messages, self.config)
        except Exception as error:  # an unforeseen failure is the fault of this record alone
            return Skipped("faulty", f"{place}: {describe(error)}")
        if isinstance(sample, Skipped):
            return Skipped(sample.reason, f"{place}: {sample.detail}")
        return replace(sample, unread=read.unread)
