"""What a source is: units of rows in a fixed order, and a function from a row's payload to a record."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from ..record import Record

__all__ = ["Parser", "Row", "Source", "Unit"]


class Parser(Protocol):
    """From a row's payload to its record. Picklable: a function of a module, or an instance of a small class."""

    def __call__(self, payload: Any, /) -> Record: ...

    def identify(self, payload: Any, /) -> str | int:
        """The record's id, in little memory whatever the record holds; that of its place where it cannot be had so."""


@dataclass(frozen=True)
class Row:
    """One row of a unit.

    Attributes:
        position: In its unit, rising.
        payload: What the source's `parse` makes a record of. It can be pickled.
    """

    position: int
    payload: Any


@dataclass
class Unit:
    """At most `shard_size` rows, the unit of output.

    Attributes:
        index: Number of the unit, from 0.
        share: Share of the whole input that the unit is, for the progress shown.
        rows: Gives the rows, read as they are taken. To be called, if at all, before the next unit is asked for.
    """

    index: int
    share: float
    rows: Callable[[], Iterator[Row]] = field(repr=False)


class Source(ABC):
    """An opened input.

    Attributes:
        name: Its name in SOURCES.
        parse: Makes a record of a row's payload.
        unread: How many files of a directory are of kinds that are not read, by their endings.
        beside: Names of the pictures and videos beside files of records in a directory: read only where records name them.
        media: What the records show, as in `PictureOptions.require_use`; None where only the records say it.
    """

    name: ClassVar[str]
    parse: Parser
    unread: Counter[str]
    beside: Collection[str] = ()
    media: Collection[str] | None = None

    @abstractmethod
    def __init__(self, path: str, prompt: str | None = None, columns: tuple[tuple[str, str], ...] = ()): ...

    @classmethod
    @abstractmethod
    def claims(cls, path: str, names: Collection[str] | None) -> bool:
        """Whether a file or glob is of this kind, by its name; or a directory, by names of its files that show every kind that
        there is."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Names and sizes for the manifest, as JSON. The same on every host, wherever the input is mounted."""

    @abstractmethod
    def units(self, shard_size: int) -> Iterator[Unit]:
        """The units in order, found as they are asked for.

        Raises:
            ChangedError: these, and the rows of a unit, if a file is no longer what it was when the source was opened.
            JobError: a file that is opened in the middle cannot be read.
        """

    def added(self) -> list[str]:
        """Names of files that have come to the directory or glob since it was opened. They are not read."""
        return []

    def check(self, payload: Any) -> None:  # noqa: B027 (for most sources there is nothing to do)
        """Called once a row's record has been prepared, where the row names a file that is read only then.

        Raises:
            ChangedError: if the file is no longer what it was when the source was opened.
        """
