"""What a record's columns are: those that are read, and what becomes of the others.

A column that nothing reads must not hold what the model should have seen: one that looks like a picture, a video or messages,
and one whose name is nearly that of a column that is read, make the record an error. Others are the user's own, and are named
once by the user who runs the job.
"""

import functools
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from PIL import Image

from ..errors import InputError
from ..processing.parts import is_empty
from ..processing.pixels import is_array
from .kinds import PICTURES, VIDEOS

__all__ = [
    "ANSWERS",
    "ASKS",
    "CHATS",
    "DOCUMENTS",
    "LEARNED",
    "MEDIA",
    "NOTHING_READS",
    "PDF",
    "UNUSED",
    "left_over",
    "names_pdfs",
    "renamed",
]

# Pictures and videos beside a conversation, in the order in which they enter it.
MEDIA = ("image", "images", "video", "videos")
# Columns of PDF files, each of which stands for its pages; where they hold anything else they are the user's own.
DOCUMENTS = ("document", "documents")
# The name of a PDF file, and perhaps of one of its pages.
PDF = re.compile(r"([^\n]{1,1000}\.pdf)(?:#([1-9][0-9]{0,8}))?", re.IGNORECASE)
# Columns of whole conversations, of what is asked, and of the wanted answer.
CHATS = ("messages", "conversations", "conversation", "texts")
ASKS = ("prompt", "question")
ANSWERS = ("answer", "completion")
# Our name, in a renaming, for a column that is not to be read.
UNUSED = "unused"
# How the error begins of a record with a column that must not be left out in silence.
NOTHING_READS = "nothing reads the column"
# All that training reads.
LEARNED = (*CHATS, *ASKS, *ANSWERS, *MEDIA, "system", "body", UNUSED)

# Columns of other trainers' layouts that say what the model should see or do, and that nothing here reads.
_REFUSED = frozenset(
    {
        "tools",
        "functions",
        "chosen",
        "rejected",
        "audio",
        "audios",
        "content",
        "instruction",
        "instructions",
        "query",
        "history",
    }
)
# Lengths are bounded, or a long text would be looked through once for each ending in it.
# .ts is left out: as the name of a file beside a text it is mostly a program.
_ENDS = "|".join(re.escape(ending) for ending in (*PICTURES, *VIDEOS) if ending != ".ts")
_NAMES_MEDIA = re.compile(
    rf"data:(image|video)/|(https?|file)://\S{{1,2000}}({_ENDS})([?#]\S{{0,2000}})?$|[^\n?*]{{1,1000}}({_ENDS})$", re.IGNORECASE
)
# How base64 text of a JPEG, PNG, GIF, WebP or MP4 begins.
_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|AAAA[A-Za-z0-9+/]{2}Z0eX)[A-Za-z0-9+/\s]{50}")
_ROLES = ({"role", "content"}, {"from", "value"}, {"user", "assistant"}, {"type", "text"})
_MESSAGES_AS_TEXT = re.compile(r'\s*\[\s*\{(?=.*"(role|from|user)"\s*:)(?=.*"(content|value|assistant)"\s*:)', re.DOTALL)
_NUMBERS = {int, float, bool, type(None)}
_SHORTEST = 5  # letters of a name that others are compared with


def renamed(record: Mapping, columns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A record under our names.

    Args:
        record: as it was decoded.
        columns: pairs (our name, the record's); one that is called UNUSED is left out.

    Raises:
        InputError: two columns would get one name.
    """
    columns = tuple(columns)
    taken = {column for _, column in columns}
    out = {name: value for name, value in record.items() if name not in taken}
    for name, column in columns:
        if name == UNUSED or column not in record:
            continue
        if not is_empty(out.get(name)):
            raise InputError(
                f"column {name}={column}: another column has this name already; leave that one out (column {UNUSED}={name})"
            )
        out[name] = record[column]
    return out


def names_pdfs(value: Any) -> bool:
    """Whether a value is the name of a PDF file, or a list of such."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(one, str) and names_pdfs(one) for one in value)
    return isinstance(value, str) and PDF.fullmatch(value) is not None


def left_over(record: Mapping, known: tuple[str, ...], used: Collection[str], *, seen: bool = True) -> tuple[str, ...]:
    """The names of the columns that nothing reads.

    Args:
        record: under our names.
        known: the names that are read.
        used: names of the files of the pictures and videos that are used, without folders, and texts of messages. A column
            that repeats one of these holds nothing else.
        seen: whether the conversation has pictures or videos. Beside them the name of a PDF may say where they are from.

    Raises:
        InputError: such a column holds a picture, a video or messages, or has nearly the name of one that is read.
    """
    names = []
    for name, value in record.items():
        if name in known or is_empty(value):
            continue
        what = _held(value, used) or ("a PDF" if not seen and names_pdfs(value) else None)
        if name in _REFUSED and not (isinstance(value, str) and value in used):
            what = "what a model would have to see"
        if what:
            raise InputError(
                f"{NOTHING_READS} {name!r:.80}, which holds {what}: rename it ({_renamed('image', name)}) or leave it "
                f"out ({_renamed(UNUSED, name)})"
            )
        name = f"{name:.80}"
        meant = next((other for other in _nearly(name, known) if record.get(other) is None), None)
        if meant:
            raise InputError(
                f"{NOTHING_READS} {name!r:.80}: if {meant} is meant, rename it ({_renamed(meant, name)}), or leave "
                f"it out ({_renamed(UNUSED, name)})"
            )
        names.append(name)
    return tuple(names)


def _renamed(ours: str, name: str) -> str:
    """What renames a column, on the command line of a batch job and in a recipe."""
    return f"--column {ours}={name:.80}; of a recipe's source columns: [[{ours}, {name:.80}]]"


def _held(value: Any, used: Collection[str]) -> str | None:
    """What a value holds that a model should have seen, in words; None for nothing of the kind."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "bytes"
    if isinstance(value, str):
        if _MESSAGES_AS_TEXT.match(value[:2000]):
            return "messages"
        named = _BASE64.match(value) or (_NAMES_MEDIA.match(value) and os.path.basename(value) not in used)
        return "a picture or video" if named else None
    if isinstance(value, Mapping):
        if any(keys <= value.keys() for keys in _ROLES):
            return "messages"
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        if set(map(type, value)) <= _NUMBERS:  # an embedding, say
            return None
        return next((found for found in (_held(item, used) for item in value) if found), None)
    pixels = (is_array(value) and value.ndim >= 2) or isinstance(value, Image.Image)
    return "a picture or video" if pixels else None


@functools.lru_cache(maxsize=4096)
def _nearly(name: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The known names that `name` misspells by a letter or by its case; the plural of a word is another one."""
    low, found = name.lower(), []
    for other in known:
        plural = "_" not in other and low in (other + "s", other.removesuffix("s"))
        if len(other) >= _SHORTEST and (low == other or (not plural and _one_letter_off(low, other))):
            found.append(other)
    return tuple(found)


def _one_letter_off(one: str, other: str) -> bool:
    """Whether a letter is missing in one of two words, replaced, or swapped with the next."""
    start = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    a, b = one[start:], other[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])
