"""What a job says at its end: six lines of the figures that its summary holds."""

import re
from collections.abc import Mapping
from typing import Any

from ..storage import AnyPath

__all__ = ["OTHERS", "error_kind", "summary_lines"]

_LONGEST = 90  # characters of a kind of error
_SHOWN = 3
# Under which errors are counted once there are too many kinds.
OTHERS = "others"
# Which of a record's pictures it is.
_PLACE = re.compile(r"^images\[\d+\]\[\d+\]: ")
# What differs between two errors of one kind: names in quotes, places of files, numbers. Those of standards stay: UTF-8,
# H.264 and ISO-8859-1.
_STANDARD = r"(?P<standard>(?<![\w.-])(?:[A-Z]+|utf)[-.][1-9]\d{0,3}(?:-\d\d?)?(?!\w))"
_NAMES = re.compile(rf"""{_STANDARD}|(?<!\w)('[^']*'|"[^"]*")(?!\w)|(?<![\w.])(\w+://|/)\S+|(?<!\w)\d+([,.]\d+)*(?!\w)""")


def error_kind(error: str) -> str:
    """The kind of a record's error: its words, without the names and numbers that belong to this record alone."""
    words = re.sub(r"…([\s,]*…)+", "…", _NAMES.sub(lambda found: found["standard"] or "…", _PLACE.sub("", error[:1000])))
    words = re.sub(r"^cannot decode (the picture )?…: (.*?)(; these are: .*)?$", r"\2 (cannot decode a picture)", words)
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 1]}…"


def summary_lines(summary: Mapping[str, Any], folder: AnyPath, ending: str) -> list[str]:
    """The summary of a job that has ended for the person at the terminal.

    Args:
        summary: What `BatchJob.summary` returned, with `gallery` where a page was made.
        folder: Of the output.
        ending: Of the names of parts.

    Returns:
        Six lines: records, errors by kind, time, tokens, where the answers are, and how to go on.
    """
    errors, kinds = summary["errors"], summary["error_kinds"]
    shown = [f"{count:,} × {kind}" for kind, count in list(kinds.items())[:_SHOWN]]
    left = errors - sum(list(kinds.values())[:_SHOWN])
    new, rate = summary["new_records"], lambda name: _rate(summary[f"{name}_per_second"])
    earlier = summary["records"] - new
    figures = f"{rate('records')} records/s" if new else "nothing was left to answer"
    tokens = f"{summary['prompt_tokens']:,} of prompts, {summary['new_tokens']:,} of answers"
    host = "" if summary["num_shards"] == 1 else f" of shard {summary['shard_index']} of {summary['num_shards']}"
    files = [f"{folder / f'part-*{ending}'}", *([summary["gallery"]] if summary.get("gallery") else [])]
    return [
        f"records: {summary['records']:,}{host}, {summary['answers']:,} answered"
        + (f", {earlier:,} of them by other runs" if new and earlier else ""),
        f"errors:  {'; '.join([*shown, *([f'{left:,} × others'] if left else [])]) or 'none'}",
        f"time:    {_duration(summary['seconds'])}, {figures}",
        f"tokens:  {tokens}" + (f", {rate('new_tokens')} tokens/s; {rate('tiles')} tiles/s" if new else ""),
        f"answers: {', '.join(files)}",
        f"next:    {_next(summary)}",
    ]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _next(summary: Mapping[str, Any]) -> str:
    if not summary["complete"]:
        return "run the same command again to go on"
    if missing := summary["missing_parts"]:
        return f"{missing:,} parts are not there yet, which other hosts make"
    if summary["errors"]:
        return "rows with an error have it in `error`; mend the input and choose another OUTPUT, or use --force"
    return "everything is answered" + ("" if summary.get("gallery") else "; --gallery makes a page of the first answers")
