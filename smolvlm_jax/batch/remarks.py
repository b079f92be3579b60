"""What a record does that its answer does not show: noted by the process that prepares it, said once at the end of the job."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..generation_config import Sampling, SamplingParams
from ..processing.parts import SOURCES, is_empty
from ..records.columns import ASKS, CHATS, DOCUMENTS, MEDIA, renamed
from ..records.record import Record
from ..records.request import request_of

__all__ = ["has_media", "like_settings", "notes_of", "remarks"]

_ASKS_ITSELF, _IS_ASKED, _HAS_COLUMN, _TEXT_ALONE, _IDLE = "asks itself", "is asked", "has a column", "text alone", "idle: "
# Values of settings that leave all tokens in.
_NEUTRAL: dict[str, Any] = {"top_k": 0, "top_p": 1, "min_p": 0}
# What other tools call what a record may set or ask, and what they read besides, without capitals and underscores.
_OF_OTHERS = frozenset(
    {
        "sampling", "samplingparams", "generationconfig", "generationkwargs", "genkwargs", "parameters", "extrabody",
        "guideddecoding", "maxlength", "maxlen", "minlength", "minnewtokens", "mintokens", "n", "bestof", "numbeams",
        "beams", "numreturnsequences", "earlystopping", "lengthpenalty", "presencepenalty", "frequencypenalty",
        "diversitypenalty", "norepeatngramsize", "typicalp", "logprobs", "toplogprobs", "promptlogprobs", "logitbias",
        "badwords", "stopstrings", "stopsequences", "stopwords", "stoptokenids", "eostokenid", "skipspecialtokens",
        "responseformat", "greedy", "temp", "penaltyalpha", "maxtiles", "maxpatches", "maxpixels", "minpixels",
        "doimagesplitting", "dorescale", "doresize", "imagesplitting", "longestedge", "numframes", "maxframes",
        "videofps", "pages", "pdfdpi", "prompts", "questions", "systemprompt", "systemmessage", "developer", "userprompt",
        "userquestion", "mmprocessorkwargs", "multimodaldata", "addgenerationprompt", "continuefinalmessage",
        "chattemplate",
    }
)  # fmt: skip


def like_settings(names: Iterable[str]) -> list[str]:
    """Those of some names of columns that other tools read as settings or questions."""
    return [name for name in names if name.lower().replace("_", "").replace("-", "") in _OF_OTHERS]


def notes_of(
    record: Record, columns: tuple[tuple[str, str], ...], params: SamplingParams, defaults: Sampling | None
) -> list[str]:
    """What is to be counted of a record that can be answered.

    Args:
        record: As it was read.
        columns: Pairs (our name of a key, its name in the record).
        params: How its answer is made.
        defaults: The checkpoint's.

    Returns:
        Notes, as `remarks` counts them.
    """
    request = request_of(renamed(record.given, columns))
    notes = [_ASKS_ITSELF if any(request.get(name) is not None for name in (*CHATS, *ASKS)) else _IS_ASKED]
    if not has_media(record):
        notes.append(_TEXT_ALONE)
    elif any(not is_empty(request.get(name)) for name in (*MEDIA, *DOCUMENTS)):
        notes.append(_HAS_COLUMN)
    if "do_sample" not in record.overrides:
        given = {name for name, value in record.overrides.items() if value != _NEUTRAL.get(name)}
        notes += [_IDLE + name for name in params.without_effect(defaults) if name in given]
    return notes


def has_media(record: Record) -> bool:
    """Whether a record that can be answered has a picture or video."""
    contents = [message.get("content") for message in record.messages or ()]
    return any(
        isinstance(item, Mapping) and item.get("type") in SOURCES
        for part in contents
        if isinstance(part, list)
        for item in part
    )


def remarks(notes: Counter[str], prompt: str | None) -> list[str]:
    """Lines for the user.

    Args:
        notes: How many of the records that this run prepared have which of the notes.
        prompt: The job's.
    """
    lines = []
    if notes[_TEXT_ALONE] and notes[_HAS_COLUMN]:
        lines.append(
            f"{notes[_TEXT_ALONE]:,} records have no picture or video, and {notes[_HAS_COLUMN]:,} have one in a column: those "
            "without were answered by their text alone"
        )
    if idle := {note.removeprefix(_IDLE): count for note, count in sorted(notes.items()) if note.startswith(_IDLE)}:
        counted = ", ".join(f"{name} of {count:,} records" for name, count in idle.items())
        lines.append(f"without effect, since these records do not set do_sample: {counted}; --do-sample sets it for all")
    if prompt and notes[_ASKS_ITSELF] and not notes[_IS_ASKED]:
        lines.append(f"--prompt was not used: each of the {notes[_ASKS_ITSELF]:,} records has a question of its own")
    return lines
