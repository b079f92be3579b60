"""Which words of a prompt steer the model: tokens that the chat template writes, and those that stand for media.

All other added tokens of a tokenizer are words, whether they are flagged as special or not: the <loc_12> of a fine-tuned
model means in a text what it means in the training data.
"""

import functools
import re
from typing import Any

from ..errors import PromptError
from . import rendering
from .prompts import GRID_PATTERN

__all__ = ["steering_words"]

# A token of letters only, or of signs only, is no tag: a template that writes "Assistant:" does not claim the word.
_TAG = re.compile(r"(?=.*\w)(?=.*[^\w\s])", re.DOTALL)
# Conversations that show which tokens a template puts together from a role.
_PROBES = (("user",), ("user", "assistant"), ("system", "user", "assistant"), ("system", "user", "assistant", "tool", "user"))


def steering_words(template: str, added: frozenset[str], always: frozenset[str]) -> frozenset[str]:
    """The words that a user's text must not hold unless it is meant to steer.

    Args:
        template: the chat template.
        added: the tokenizer's added tokens.
        always: tokens with a role of their own: those for media, and the named ones such as the one that ends an answer.

    Returns:
        `always`, the markers of rows and columns among `added`, and of the others those that the template writes.

    Raises:
        PromptError: the template is not valid, or exceeds the limits on memory or time with the shortest conversation.
    """
    words, problem = _written(template, added)
    if problem is not None:
        raise PromptError(problem)
    return always | words


@functools.lru_cache(maxsize=64)
def _written(template: str, added: frozenset[str]) -> tuple[frozenset[str], str | None]:
    """Steering words among `added`; or why the template cannot be used, which is cached too, since it takes long."""
    tags = [token for token in added if _TAG.match(token)]
    try:
        texts = rendering.written(template, _probes())
    except PromptError as error:
        said = str(error)
        return frozenset(), said if said.startswith("the chat template") else f"the chat template cannot be used: {said}"
    grid = [token for token in added if re.fullmatch(GRID_PATTERN, token)]
    return frozenset(grid).union(token for text in texts for token in tags if token in text), None


def _probes() -> list[dict[str, Any]]:
    named = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
    return [
        {**named, "messages": [{"role": role, "content": content} for role in roles], "add_generation_prompt": True}
        for roles in _PROBES
        for content in ("x", [{"type": "text", "text": "x"}])
    ]
