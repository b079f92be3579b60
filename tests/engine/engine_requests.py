"""Requests that the tests of the engine ask."""

import random

import numpy as np
from handwritten_numbers import draw
from PIL import Image

from smolvlm_jax.engine import EngineConfig, Request, SamplingParams, prepare

SMALL = EngineConfig(ring_lengths=(64, 128, 256), slots=(3, 2, 1), prefill_tokens=128, encoder_tiles=2, chunk=3)


def user(*pictures, text="What number is written here?"):
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def pictures(count: int, seed: int) -> list[Image.Image]:
    """Number pictures of various shapes."""
    rng = np.random.default_rng(seed)
    return [draw(str(rng.integers(10 ** rng.integers(1, 5))), True, rng) for _ in range(count)]


def mixed(processor, count: int, seed: int = 0, limit: int = 24) -> list[Request]:
    """Requests of all kinds: text, one or two pictures, repeated ones, limits from 1 on."""
    rng, shown = random.Random(seed), pictures(12, seed)
    words = ["number", "larger", "which", "here", "what", "seven", "42", "read", "the", "picture"]
    requests = []
    for index in range(count):
        kind = rng.randrange(4)
        text = " ".join(rng.choices(words, k=rng.randrange(1, 30)))
        if kind == 1:
            messages = user(rng.choice(shown))
        elif kind == 2:
            messages = user(*rng.sample(shown, 2), text="Which picture shows the larger number?")
        else:
            messages = user(text=text)
        params = SamplingParams(max_new_tokens=rng.choice([1, 2, 5, limit]), ignore_eos=kind == 3)
        requests.append(Request(index, prepared=prepare(processor, messages), params=params))
    return requests
