"""Which tokens of a prompt the template says are the assistant's: those between {% generation %} and {% endgeneration %}.

The sandbox renders such a block with the values of two variables around it. Given characters that occur nowhere else, they show
where the block is, in the prompt whose media are expanded already, and are taken out before it is tokenised.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from .protect import unused_characters
from .sandbox import GENERATION_VARIABLES

__all__ = ["Marks", "marks_for", "take_spans", "token_mask"]

_log = logging.getLogger(__name__)
_BLOCK = re.compile(r"\{%[-+]?\s*generation\b")

Span = tuple[int, int]
"""Characters of a prompt, the second not included."""


class Marks(NamedTuple):
    """The characters around what the assistant says."""

    start: str
    end: str

    @property
    def variables(self) -> dict[str, str]:
        """What the template is given."""
        return dict(zip(GENERATION_VARIABLES, self, strict=True))


def marks_for(template: str, *values: Any) -> Marks:
    """Marks that occur in none of the strings of `values`. A warning says if the template has no such blocks."""
    if not _BLOCK.search(template):
        _log.warning("the chat template has no {%% generation %%} blocks: assistant_masks are all zero")
    return Marks(*unused_characters(values, 2))


def take_spans(text: str, marks: Marks) -> tuple[str, list[Span]]:
    """A prompt without its marks, and what was between them."""
    pieces, spans, at = [], [], 0
    for piece in text.split(marks.start):
        said, end, rest = piece.partition(marks.end)
        if end:
            spans.append((at, at + len(said)))
        pieces += [said, rest]
        at += len(said) + len(rest)
    return "".join(pieces), spans


def token_mask(offsets: Sequence[Sequence[int]], spans: Sequence[Span]) -> list[int]:
    """1 for each token that has a character in a span; its characters are given by `offsets`, (0, 0) for padding."""
    return [int(any(start < stop and end > begin for begin, stop in spans)) for start, end in offsets]
