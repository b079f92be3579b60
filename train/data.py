"""From conversations to batches: prompt ids, labels on the answer alone, uint8 tiles."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError

__all__ = ["Example", "collate", "prefetch"]

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """A conversation that ends with a user's turn, in the chat format, and the answer to learn."""

    messages: list[dict[str, Any]]
    answer: str


def collate(processor, examples: Sequence[Example], length: int, tiles: int | None = None) -> dict[str, np.ndarray]:
    """Rows of `length` tokens, padded on the right, and one flat batch of `tiles` tiles, padded with zeros.

    Labels are the answer and its end-of-utterance token; prompt, image and padding tokens carry -100. An example that does
    not fit raises InputError with the length it needs: cutting it would cut a picture.
    Returns input_ids, attention_mask, labels int32 (b, length); pixel_values uint8 (tiles, T, T, 3) and num_tiles.
    """
    prompts = processor.apply_chat_template(
        [e.messages for e in examples],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        padding=True,
        padding_side="left",
        return_tensors="np",
        pixel_format="uint8",
    )
    tokenizer = processor.tokenizer
    ids = np.full((len(examples), length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((len(examples), length), np.int32)
    labels = np.full((len(examples), length), IGNORE, np.int32)
    for row, example in enumerate(examples):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row] == 1]
        answer = [*tokenizer(" " + example.answer)["input_ids"], tokenizer.eos_token_id]
        total = len(prompt) + len(answer)
        if total > length:
            raise InputError(f"an example needs {total} tokens, the rows hold {length}")
        ids[row, :total] = [*prompt, *answer]
        mask[row, :total] = 1
        labels[row, len(prompt) : total] = answer
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if "pixel_values" in prompts:
        pixels = prompts["pixel_values"]
        room = len(pixels) if tiles is None else tiles
        if len(pixels) > room:
            raise InputError(f"the examples make {len(pixels)} tiles, the batch holds {room}")
        padding = np.zeros((room - len(pixels), *pixels.shape[1:]), np.uint8)
        batch["pixel_values"] = np.concatenate([pixels, padding])
        batch["num_tiles"] = np.asarray(len(pixels), np.int32)
    return batch


def prefetch(make: Callable[[int], Any], start: int, stop: int, depth: int = 4) -> Iterator[Any]:
    """Yield make(start), …, make(stop - 1), made ahead in a thread. An error in the thread is raised here; leaving early
    ends the thread."""
    ready: queue.Queue = queue.Queue(depth)
    leaving = threading.Event()

    def put(item) -> bool:
        while not leaving.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for index in range(start, stop):
                if not put((make(index), None)):
                    return
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        leaving.set()
        thread.join()
