"""What a compiled program does, counted in its text: cycles, bytes, collectives, kernels; loops as often as they run."""

import re
from collections import Counter
from dataclasses import dataclass, field

from .hlo import Instruction, Module, array_bytes, hbm_bytes

__all__ = ["Counts", "count"]

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Instructions that move nothing and start nothing: names, tuples, the ends of asynchronous ones.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "while",
        "conditional",
        "call",
        "domain",
        "opt-barrier",
        "add-dependency",
    ]
)
_PARTS = ("dynamic-slice", "slice", "gather")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_LIBRARY = re.compile(r'custom_call_target="__cu(?:blas|dnn)\$')
_IN_PLACE = "output_to_operand_aliasing={{}: (0, {})}"
_COST = re.compile(r'"bytes_accessed":"?(\d+)')


@dataclass
class Counts:
    """Sums over instructions.

    Attributes:
        cycles: as the TPU compiler estimates them, of everything but Pallas's kernels.
        bytes: read from and written to the chip's memory.
        launches: kernels that a GPU starts.
        collectives: of each kind, how often.
        collective_bytes: of each kind, bytes of its larger side on one chip.
        kernel_bytes: of the bytes, those of Pallas kernels.
        calls: how often each Pallas kernel runs, by the name of its instruction.
        libraries: how often each other custom call runs, by its target, such as cuDNN's.
        loops: loops whose number of steps the program decides while it runs; they are counted as one step.
        step: the last such loop's body alone.
    """

    cycles: float = 0
    bytes: float = 0
    kernel_bytes: float = 0
    launches: float = 0
    collectives: Counter = field(default_factory=Counter)
    collective_bytes: Counter = field(default_factory=Counter)
    calls: Counter = field(default_factory=Counter)
    libraries: Counter = field(default_factory=Counter)
    loops: int = 0
    step: "Counts | None" = None

    def add(self, other: "Counts", times: float = 1) -> None:
        """Add what another has counted, so many times."""
        self.cycles += times * other.cycles
        self.bytes += times * other.bytes
        self.kernel_bytes += times * other.kernel_bytes
        self.launches += times * other.launches
        self.loops += other.loops
        self.step = other.step or self.step
        for name in ("collectives", "collective_bytes", "calls", "libraries"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value


def count(module: Module) -> Counts:
    """The counts of a whole program."""
    return _Reader(module).computation(module.entry)


class _Reader:
    def __init__(self, module: Module):
        self.module = module

    def computation(self, name: str) -> Counts:
        total = Counts()
        for instruction in self.module.computations.get(name, ()):
            self._instruction(instruction, total)
        return total

    def _instruction(self, it: Instruction, total: Counts) -> None:
        if it.opcode == "while":
            return self._loop(it, total)
        if it.opcode == "conditional":
            branches = [self.computation(name) for name in it.computations()]
            return total.add(max(branches, key=lambda branch: (branch.cycles, branch.bytes))) if branches else None
        if it.opcode == "call" and (called := it.computation("to_apply")):
            return total.add(self.computation(called))
        if estimate := _CYCLES.search(it.attributes):
            total.cycles += int(estimate.group(1))
        self._collective(it, total)
        if it.opcode in _FREE or it.opcode.endswith("-done"):
            return None
        moved = self._bytes(it)
        total.launches += 1
        total.bytes += moved
        if it.opcode == "custom-call":
            target = (_TARGET.search(it.attributes) or ("", "?"))[1]
            if target == "tpu_custom_call":
                total.calls[it.name] += 1
                total.kernel_bytes += moved
            else:
                total.libraries[target] += 1

    def _loop(self, it: Instruction, total: Counts) -> None:
        body = self.computation(it.computation("body") or "")
        times = self._trips(it)
        if times is None:
            total.loops += 1
            total.step = body
        total.add(body, times or 1)

    def _trips(self, it: Instruction) -> int | None:
        """How often a loop runs, as the compiler says; None where it does not."""
        known = re.search(r'"known_trip_count":\{"n":"?(\d+)', it.attributes)
        return int(known.group(1)) if known else None

    def _collective(self, it: Instruction, total: Counts) -> None:
        kind = it.opcode.removesuffix("-start")
        inner = it.computation("calls") if it.opcode in ("fusion", "async-start") else None
        if inner:
            for part in self.module.computations.get(inner, ()):
                self._collective(part, total)
        elif kind in _COLLECTIVES:
            total.collectives[kind] += 1
            arrays = [hbm_bytes(part) for part in _parts(it.shape)]
            given = sum(hbm_bytes(shape) for shape in self.module.shapes_of(it.operands))
            total.collective_bytes[kind] += max([given, *arrays])

    # ---- bytes

    def _bytes(self, it: Instruction) -> float:
        """What an instruction reads and writes, each array once; of a slice or an update, the part."""
        if it.opcode == "custom-call" and (stated := _COST.search(it.attributes)):
            return int(stated.group(1))
        out = hbm_bytes(it.shape)
        if it.opcode == "custom-call" and _LIBRARY.search(it.attributes) and len(parts := _parts(it.shape)) > 1:
            out -= hbm_bytes(parts[-1])  # room to work in
        if it.opcode in _PARTS:
            return self._part(it.operands, it.shape)
        if it.opcode.removesuffix("-start") in _PARTS:  # ((operand), result, …)
            return self._part(it.operands, _parts(it.shape)[-2] if len(_parts(it.shape)) > 1 else it.shape)
        if it.opcode == "dynamic-update-slice":
            return 2 * sum(map(hbm_bytes, list(self.module.shapes_of(it.operands))[1:2]))
        if it.opcode.endswith("-start") and it.opcode != "async-start":
            return sum(map(hbm_bytes, _parts(it.shape)[:2]))  # the source and the target
        if it.opcode == "fusion" and (body := self.module.computations.get(it.computation("calls") or "")):
            return self._fusion_bytes(body, out)
        return out + sum(map(hbm_bytes, self.module.shapes_of(tuple(dict.fromkeys(it.operands)))))

    def _part(self, operands: tuple[str, ...], result: str) -> float:
        """What taking a part of the first operand moves."""
        source = next(iter(self.module.shapes_of(operands)), "")
        return hbm_bytes(result) + (array_bytes(result) if hbm_bytes(source) else 0)

    def _fusion_bytes(self, body: list[Instruction], out: int) -> float:
        readers: dict[str, list[Instruction]] = {}
        for it in body:
            for name in it.operands:
                readers.setdefault(name, []).append(it)
        read = 0.0
        for it in body:
            if it.opcode != "parameter":
                continue
            users = _beyond_bitcasts(it, readers)
            whole = hbm_bytes(it.shape)
            partly = [user for user, first in users if first and user.opcode in _PARTS]
            written = [user for user, first in users if first and user.opcode == "dynamic-update-slice"]
            if not users or len(partly) + len(written) < len(users):
                read += whole
                continue
            read += min(whole, sum(array_bytes(user.shape) for user in partly))
            if written:  # in place: the rest stays where it is
                out = max(out - whole, 0) + min(whole, sum(hbm_bytes(self._update(user)) for user in written))
        return read + out

    def _update(self, it: Instruction) -> str:
        update = self.module.by_name.get(it.operands[1]) if len(it.operands) > 1 else None
        return update.shape if update else ""


def _beyond_bitcasts(it: Instruction, readers: dict[str, list[Instruction]]) -> list[tuple[Instruction, bool]]:
    """Who reads an array, and whether as its first operand; a bitcast is the same array.

    So is a fusion inside a fusion whose result takes its operand's place: XLA reads a cache in 8 bits in another tiling that
    way, and makes only the part of it that is used.
    """
    found = []
    for user in readers.get(it.name, ()):
        if user.opcode == "bitcast" or (user.opcode == "fusion" and _IN_PLACE in user.attributes):
            found += _beyond_bitcasts(user, readers)
        else:
            found.append((user, user.operands[0] == it.name))
    return found


def _parts(shape: str) -> list[str]:
    """The arrays of a tuple's shape."""
    return re.findall(r"[a-z]\w*\[[\d,]*\](?:\{[^{}]*\})?", shape)
