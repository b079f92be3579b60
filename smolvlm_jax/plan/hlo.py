"""Reading a compiled program's text: its computations, their instructions, and what arrays take in memory."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Instruction", "Module", "array_bytes", "hbm_bytes", "parse"]

_WIDTHS = {"pred": 1, "token": 0, "opaque": 0}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ASSIGNED = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAMED = re.compile(r"%([\w.\-]+)")
_ELSEWHERE = re.compile(r"S\([1-9]")  # a memory space that is not the main one
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: unique in its module.
        shape: as text, with layout; of a tuple, all its parts.
        opcode: such as "fusion".
        operands: names of the instructions it reads.
        attributes: what follows the operands, as text.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def computation(self, attribute: str) -> str | None:
        """The computation that an attribute such as "calls" or "body" names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    def computations(self) -> list[str]:
        """The branches of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if found:
            return _NAMED.findall(found.group(1)) or [name.strip() for name in found.group(1).split(",")]
        return [name for which in ("true_computation", "false_computation") if (name := self.computation(which))]


@dataclass
class Module:
    """A program: its computations, each a list of instructions in order.

    Attributes:
        computations: by name.
        entry: the name of the first to run.
        by_name: every instruction.
    """

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""
    by_name: dict[str, Instruction] = field(default_factory=dict)

    def shapes_of(self, names: tuple[str, ...]) -> Iterator[str]:
        """The shapes of operands."""
        return (self.by_name[name].shape for name in names if name in self.by_name)


def parse(text: str) -> Module:
    """The module that a compiled program's `as_text()` describes."""
    module, current = Module(), []
    for line in text.splitlines():
        if line[:1] not in (" ", "", "}") and (header := _HEADER.match(line)):
            current = module.computations.setdefault(header.group(2), [])
            if header.group(1):
                module.entry = header.group(2)
        elif (found := _instruction(line)) is not None:
            current.append(found)
            module.by_name[found.name] = found
    return module


def _instruction(line: str) -> Instruction | None:
    assigned = _ASSIGNED.match(line)
    if assigned is None:
        return None
    rest = line[assigned.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end)
    if end <= 0 or opcode is None:
        return None
    start = opcode.end() - 1
    stop = start + _closing(rest[start:])
    operands = tuple(_NAMED.findall(rest[start:stop]))
    return Instruction(assigned.group(1), rest[:end], opcode.group(1), operands, rest[stop + 1 :])


def _closing(text: str) -> int:
    """The place of the parenthesis that closes the first one."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return at
    return len(text) - 1


def hbm_bytes(shape: str) -> int:
    """Bytes that an array, or a tuple of arrays, takes in the chip's main memory, padded to tiles.

    A layout such as {1,0:T(8,128)(2,1)} says which dimension varies fastest, and that the last two are padded to multiples of
    128 and 8. What S(n) puts into another memory, a TPU core's own, counts nothing.
    """
    return sum(_array_bytes(*found.groups()) for found in _ARRAY.finditer(shape) if not _ELSEWHERE.search(found.group(3) or ""))


def array_bytes(shape: str) -> int:
    """The same for arrays in whichever memory."""
    return sum(_array_bytes(*found.groups()) for found in _ARRAY.finditer(shape))


def _array_bytes(dtype: str, sizes: str, layout: str | None) -> int:
    dimensions = [int(size) for size in sizes.split(",") if size]
    order, _, tiling = (layout or "").partition(":")
    tile = re.match(r"T\(([\d,*]+)\)", tiling)
    if tile and order:
        minor_first = [int(n) for n in order.split(",")]
        for which, wanted in zip(minor_first, reversed(tile.group(1).split(",")), strict=False):
            if wanted.isdecimal():
                dimensions[which] = -(-dimensions[which] // int(wanted)) * int(wanted)
    count = 1
    for size in dimensions:
        count *= size
    width = _WIDTHS.get(dtype)
    if width is None:
        bits = re.search(r"\d+", dtype)
        return -(-count * int(bits.group()) // 8) if bits else 0
    return count * width
