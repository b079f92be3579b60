"""Files *.tar in the form of WebDataset: members that differ in their endings only are one record.

`0001.json` holds its keys, `0001.jpg` or any other picture is its `image`, a video its `video`; several (`0001.a.jpg`,
`0001.b.jpg`) are its `images` or `videos`. Any other member is text under the name of its ending: `0001.prompt` is the prompt,
and --column prompt=txt makes it `0001.txt`. A record without an id has the name that its members share.
"""

import codecs
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import IO, Any

from ...errors import InputError
from ..json_text import members
from ..kinds import PICTURES, VIDEOS
from .jsonl import MAX_LINE, JsonlSource, LineSource, decode_json
from .plain import copy_of

__all__ = ["TarSource"]

_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_LONGEST_HEADER = 2**20
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


class TarSource(LineSource):
    """Archives of records. The number of a record is its place in the archive, from 1."""

    name = "tar"
    endings = (".tar",)
    text = False

    @staticmethod
    def converted(file: IO[bytes], path: str, columns: Sequence[tuple[str, str]] | None = None) -> IO[bytes] | None:
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
                return copy_of(_index(archive))
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise InputError(f"{path} is no archive that can be read: {error}") from error

    @staticmethod
    def completed(line: bytes, file: IO[bytes]) -> Any:
        """(the name of the record, ending and contents of each member; or what is wrong with it)."""
        name, members = json.loads(line)
        if isinstance(members, str):
            return name, members
        if sum(size for _, _, size in members) > MAX_LINE:
            return name, f"is larger than {MAX_LINE} bytes"
        return name, [(ending, os.pread(file.fileno(), size, place)) for ending, place, size in members]

    @staticmethod
    def decode(number: int, read: Any) -> Any:
        if read is None:
            return JsonlSource.decode(number, read)
        name, parts = read
        if isinstance(parts, str):
            raise InputError(f"record {number}, {name}, {parts}")
        return _record(f"record {number}, {name}", name, parts)

    @staticmethod
    def glance(read: Any, names: Collection[str]) -> Mapping[str, Any]:
        if read is None or isinstance(read[1], str):
            return {}
        name, parts = read
        found: dict[str, Any] = {}
        for ending, data in sorted(parts):
            if ending.rpartition(".")[2] == "json":
                found |= members(data.removeprefix(codecs.BOM_UTF8), names)
            elif ending in names:
                found[ending] = _text(ending, data)
        return found if {"id", "custom_id"} & found.keys() else {**found, "id": name}


class _Member(tarfile.TarInfo):
    """A member whose long name and further attributes are read only where they are of a usual size: they go into memory."""

    def _proc_member(self, archive):
        if self.type in _HEADERS and self.size > _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes at byte {self.offset}")
        return super()._proc_member(archive)  # type: ignore[misc]


def _index(archive: tarfile.TarFile) -> Iterator[bytes]:
    """A line [name, [[ending, place, size], …]] for each record, or [name, what is wrong with it]."""
    members: list[list] = []
    endings: set[str] = set()
    now = wrong = ""
    ended: set[str] = set()  # names of complete records
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # or it would remember every one
        path = posixpath.normpath(member.name)
        if member.isdir() or posixpath.basename(path).startswith("."):
            continue
        found = _NAME.fullmatch(path)
        name, ending = (found[1], found[2].lower()) if found else (path, "")
        if name != now:
            if members or wrong:
                yield json.dumps([now, wrong or members]).encode() + b"\n"
                ended.add(now)
            if name in ended:
                raise ValueError(f"members of one record, {name!r:.200}, stand apart in it: pack it sorted by name")
            now, members, endings, wrong = name, [], set(), ""
        if not member.isreg() or member.issparse():
            wrong = f"has the member .{ending}, which is no plain file"
        if not ending:
            wrong = "has no ending that says what it is"
        if ending in endings:
            wrong = f"has two members .{ending}"
        endings.add(ending)
        members.append([ending, member.offset_data, member.size])
    if members or wrong:
        yield json.dumps([now, wrong or members]).encode() + b"\n"
    archive.fileobj.seek(archive.offset)
    if not archive.fileobj.read(512):
        raise ValueError(f"it is cut off at byte {archive.offset}: no mark says that it ends there")
    archive.fileobj.seek(archive.offset)
    while block := archive.fileobj.read(2**20):
        if block.strip(b"\0"):
            raise ValueError(f"it is damaged at byte {archive.offset}, or another archive follows there")


def _record(place: str, name: str, members: list[tuple[str, bytes]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    media: dict[str, list[bytes]] = {"image": [], "video": []}
    names = {posixpath.basename(f"{name}.{ending}").lower() for ending, _ in members}
    for ending, data in sorted(members):
        last = "." + ending.rpartition(".")[2]
        if last in PICTURES or last in VIDEOS:
            media["image" if last in PICTURES else "video"].append(data)
        elif last == ".json":
            value = decode_json(f"{place}.{ending}", data.removeprefix(codecs.BOM_UTF8))
            if not isinstance(value, dict):
                raise InputError(f"{place}.{ending} holds a {type(value).__name__}; it needs an object")
            out |= {key: item for key, item in value.items() if item is not None}
        else:
            out[ending] = data
    for kind, found in media.items():
        key, given = (kind, found[0]) if len(found) == 1 else (kind + "s", found)
        if not found:
            continue
        named = out.get(key)
        if named is not None and not (isinstance(named, str) and posixpath.basename(named).lower() in names):
            raise InputError(f"{place} has {key} in its .json, and a member for it")
        out[key] = given
    if "id" not in out and "custom_id" not in out:
        out["id"] = name
    return {key: _text(key, item) for key, item in out.items()}


def _text(key: str, item: Any) -> Any:
    """A member that is no picture, video or JSON, as text where it is text."""
    if not isinstance(item, bytes) or key in ("image", "video"):
        return item
    try:
        return item.decode("utf-8-sig")
    except UnicodeDecodeError:
        return item  # an array, say: the user's own
