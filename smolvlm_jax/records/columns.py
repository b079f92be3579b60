"""What a record's columns are: those that are read, and what becomes of the others.

A column that nothing reads must not hold what the model should have seen: one that looks like a picture, a video or messages,
and one whose name is nearly that of a column that is read, make the record an error. Others are the user's own, and are named
once by the user who runs the job.
"""

import functools
import json
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
    "meant",
    "names_pdfs",
    "renamed",
    "require_pdfs",
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
LEARNED = (*CHATS, *ASKS, *ANSWERS, *MEDIA, *DOCUMENTS, "system", "body", UNUSED)

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
# What those of them that are texts may be meant for.
_OF_REFUSED = {"instruction": "prompt", "instructions": "prompt", "query": "prompt", "content": "prompt", "chosen": "answer"}
# Names that data sets give to what is asked, and to the answer, the likeliest first.
_LIKE_ASKS = ("query", "instruction", "questions", "prompts", "input", "problem", "user", "human", "request", "text_input")
_LIKE_ANSWERS = (
    "answers",
    "label",
    "labels",
    "response",
    "output",
    "target",
    "multiple_choice_answer",
    "ground_truth",
    "solution",
    "assistant",
    "gpt",
    "completions",
    "caption",
    "captions",
    "answer",
    "text",
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


def renamed(record: Mapping, columns: Iterable[tuple[str, str]], *, parts: bool = False) -> dict[str, Any]:
    """A record under our names.

    Args:
        record: as it was decoded.
        columns: pairs (our name, the record's); one that is called UNUSED is left out.
        parts: whether "answers.0" and "answers.text.0" are parts of a column `answers` of lists or objects.

    Raises:
        InputError: two columns would get one name, or a column has no such part.
    """
    columns = tuple(columns)
    of_part = {c: c.partition(".")[0] for name, c in columns if parts and name != UNUSED and c not in record}
    taken = {of_part.get(column, column) for _, column in columns}
    out = {name: value for name, value in record.items() if name not in taken}
    for name, column in columns:
        if name == UNUSED or of_part.get(column, column) not in record:
            continue
        if not is_empty(out.get(name)):
            raise InputError(
                f"column {name}={column}: another column has this name already; leave that one out (column {UNUSED}={name})"
            )
        out[name] = _part(record, column) if column in of_part else record[column]
    return out


def _part(record: Mapping, column: str) -> Any:
    """What stands at a path such as "answers.text.0"."""
    found: Any = record
    for step in column.split("."):
        if isinstance(found, (list, tuple)) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        elif isinstance(found, Mapping) and step in found:
            found = found[step]
        else:
            raise InputError(f"the column {column.partition('.')[0]!r:.80} has no part {column!r:.80}")
    return found


def meant(record: Mapping, *, asked: bool) -> str:
    """What to write in a recipe for a record whose columns have other names, as far as these tell.

    Args:
        record: under our names.
        asked: whether something that is asked was found, so that only the answer is missing.
    """
    pairs = [] if asked else [("prompt", _like(record, _LIKE_ASKS))]
    if not any(record.get(name) is not None for name in ANSWERS):
        pairs.append(("answer", _like(record, _LIKE_ANSWERS)))
    if not any(record.get(name) is not None for name in (*MEDIA, *DOCUMENTS)):
        pictures = [name for name, value in record.items() if _held(value, ()) in ("bytes", "a picture or video")]
        pairs += [("image", str(name)) for name in pictures[:1]]
    columns = ", ".join(f"[{name}, {_as_yaml(column)}]" for name, column in pairs)
    return f"{{path: …, columns: [{columns}]}}"


def _as_yaml(name: str) -> str:
    return name[:80] if re.fullmatch(r"[A-Za-z_][\w./-]*", name) else json.dumps(name[:80], ensure_ascii=False)


def _like(record: Mapping, names: tuple[str, ...]) -> str:
    """The column of a record that has one of these names, and where in it a text stands."""
    lower = {str(name).lower(): name for name in reversed(record)}
    for name in names:
        if name in lower and (inner := _text_in(record[lower[name]])) is not None:
            return f"{lower[name]}{inner}"
    return "COLUMN"


def _text_in(value: Any, depth: int = 3) -> str | None:
    """Where in a value the first text stands, as a path to append to its column; None where there is none."""
    if isinstance(value, str):
        return ""
    if isinstance(value, (list, tuple)) and value and depth:
        return None if (inner := _text_in(value[0], depth - 1)) is None else f".0{inner}"
    if isinstance(value, Mapping) and depth:
        for key in sorted(value, key=lambda key: key not in _LIKE_ANSWERS):
            if (inner := _text_in(value[key], depth - 1)) is not None:
                return f".{key}{inner}"
    return None


def names_pdfs(value: Any) -> bool:
    """Whether a value is the name of a PDF file, or a list of such, which may be JSON text as in a column of pictures."""
    if isinstance(value, str) and value[:1] == "[" and ".pdf" in value.lower():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass  # the name of a file may begin like that
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(one, str) and names_pdfs(one) for one in value)
    return isinstance(value, str) and PDF.fullmatch(value) is not None


def require_pdfs(record: Mapping, columns: Iterable[tuple[str, str]]) -> None:
    """Raise InputError where a column that is said to be one of DOCUMENTS holds anything else.

    Args:
        record: under our names.
        columns: pairs (our name, the record's).
    """
    for name, column in columns:
        value = record.get(name)
        if name in DOCUMENTS and not is_empty(value) and not names_pdfs(value):
            raise InputError(f"column {name}={column}: {value!r:.80} is not the name of a PDF file, nor a list of such")


def left_over(
    record: Mapping, known: tuple[str, ...], used: Collection[str], *, seen: bool = True, ours: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """The names of the columns that nothing reads.

    Args:
        record: under our names.
        known: the names that are read.
        used: names of the files of the pictures and videos that are used, without folders, and texts of messages. A column
            that repeats one of these holds nothing else.
        seen: whether the conversation has pictures or videos. Beside them the name of a PDF may say where they are from.
        ours: for known names that no column can be renamed to, those that mean the same.

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
            likely = _OF_REFUSED.get(name, "image")
            raise InputError(
                f"{NOTHING_READS} {name!r:.80}, which holds {what}: rename it{_renamed(likely, name)} or leave it "
                f"out{_renamed(UNUSED, name)}"
            )
        name = f"{name:.80}"
        meant = next((other for other in _nearly(name, known) if record.get(other) is None), None)
        if meant:
            meant = (ours or {}).get(meant, meant)
            raise InputError(
                f"{NOTHING_READS} {name!r:.80}: if {meant} is meant, rename it{_renamed(meant, name)}, or leave "
                f"it out{_renamed(UNUSED, name)}"
            )
        names.append(name)
    return tuple(names)


def _renamed(ours: str, name: str) -> str:
    """In parentheses, what renames a column on the command line of a batch job and in a recipe, where they have such a name."""
    batch = [f"--column {ours}={name:.80}"] if ours not in ANSWERS else []
    recipe = [f"of a recipe's source columns: [[{ours}, {name:.80}]]"] if ours in LEARNED else []
    return f" ({'; '.join([*batch, *recipe])})" if batch or recipe else ""


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
