"""Compiling a program, and counting what came of it."""

import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..errors import InputError
from .chips import Chip
from .counting import Counts, count
from .figures import Collective, Cost
from .hlo import parse
from .kernels import read_dump

__all__ = ["KernelLoops", "Measurer", "TooLarge", "held_bytes"]

# Cost's names of the compiler's figures.
_SIZES = {"argument": "argument", "output": "output", "alias": "alias", "temporary": "temp", "code": "generated_code"}
# A size in what a compiler says.
_AMOUNT = r"([\d.]+)([KMGT]?)"


class TooLarge(InputError):
    """A program that the compiler refuses, because it does not fit the chip.

    Attributes:
        needed: bytes, as far as the compiler says.
        usable: likewise.
    """

    def __init__(self, name: str, text: str):
        found = re.search(rf"[Uu]sed {_AMOUNT} of {_AMOUNT}", text)
        self.needed: int | None
        self.usable: int | None
        self.needed, self.usable = (_amount(*found.group(1, 2)), _amount(*found.group(3, 4))) if found else (None, None)
        over = re.search(rf"[Ee]xceeded .{{0,60}} by {_AMOUNT}", text)
        if over and self.usable:  # the two sizes are rounded, and may look the same
            self.needed = self.usable + _amount(*over.groups())
        super().__init__(f"{name} does not fit: {' '.join(text.split())[:200]}")


def _amount(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


class KernelLoops(NamedTuple):
    """What kernels do whose work is decided on the chip.

    Attributes:
        steps: of a kernel's outermost loop of unknown length.
        share: of the bytes that the kernels state.
    """

    steps: int
    share: float


@dataclass(frozen=True)
class Measurer:
    """Compiles for a chip.

    Attributes:
        chip: None for one that is not in the table.
        dump: where the compiler writes the schedules of kernels; None if it does not.
    """

    chip: Chip | None
    dump: str | None = None

    def cost(
        self,
        name: str,
        lowered: Any,
        *,
        flops: float = 0,
        input_bytes: int = 0,
        steps: int = 1,
        loops: KernelLoops | None = None,
        in_8_bits: bool = False,
    ) -> Cost:
        """Compile a program and count.

        Args:
            name: for people.
            lowered: the program, as `jit(…).lower(…)` gives it.
            flops: of it, on one chip.
            input_bytes: see `Cost`.
            steps: that a program whose loop decides its own length takes in a call; everything but memory is for one of them.
            loops: of kernels whose work depends on what a cache holds. Default: as the kernels state it.
            in_8_bits: whether products may be of int8, at whose peak the program's floor is then.

        Raises:
            TooLarge: it does not fit the chip.
        """
        with self._dumping():
            started = time.perf_counter()
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error):
                    raise TooLarge(name, str(error)) from error
                raise
            seconds = time.perf_counter() - started
            memory = compiled.memory_analysis()
            sizes: Any = {f"{ours}_bytes": int(getattr(memory, f"{theirs}_size_in_bytes")) for ours, theirs in _SIZES.items()}
            counts = _a_step(count(parse(compiled.as_text())), steps)
            if loops is not None:
                counts.bytes += counts.kernel_bytes * (loops.share - 1)
                counts.kernel_bytes *= loops.share
            found = Cost(
                name=name,
                **sizes,
                input_bytes=input_bytes,
                flops=flops,
                bytes=counts.bytes,
                kernel_bytes=counts.kernel_bytes,
                kernels=_named(counts.calls),
                libraries={target: round(number) for target, number in counts.libraries.items()},
                launches=counts.launches,
                collectives={
                    kind: Collective(count=round(number), nbytes=round(counts.collective_bytes[kind]))
                    for kind, number in counts.collectives.items()
                },
                seconds=seconds,
            )
            if self.chip is not None and self.chip.platform == "tpu":
                found = self._with_cycles(found, counts, loops.steps if loops else 1)
            return self._with_seconds(found, in_8_bits)

    def _with_cycles(self, cost: Cost, counts: Counts, steps: int) -> Cost:
        assert self.chip is not None
        schedules = read_dump(self.dump, list(counts.calls), steps) if self.dump else {}
        return replace(
            cost,
            xla_cycles=counts.cycles,
            kernel_cycles=sum(
                counts.calls[name] * kernel.cycles(self.chip.product_cycles) for name, kernel in schedules.items()
            ),
            unknown_loops=sum(kernel.unknown_loops for kernel in schedules.values()),
            missing_kernels=tuple(sorted(set(_named(Counter(counts.calls.keys() - schedules.keys()))))),
        )

    def _with_seconds(self, cost: Cost, in_8_bits: bool) -> Cost:
        chip = self.chip
        if chip is None:
            return cost
        moving = cost.bytes / chip.bandwidth
        floor = max(cost.flops / (chip.int8_ops if in_8_bits else chip.flops), moving)
        estimated = None if cost.cycles is None or chip.clock is None else max(cost.cycles / chip.clock, moving)
        return replace(cost, floor_seconds=floor, estimated_seconds=estimated)

    @contextmanager
    def _dumping(self) -> Iterator[None]:
        """The dump directory holds what the compiler writes inside the block, and nothing afterwards: one program's schedules
        may be gigabytes."""
        self._clear()
        try:
            yield
        finally:
            self._clear()

    def _clear(self) -> None:
        for path in Path(self.dump).iterdir() if self.dump else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _a_step(counts: Counts, steps: int) -> Counts:
    """What a step of the program's own loop costs, with its share of what is done once a call."""
    if counts.step is None or steps == 1:
        return counts
    found = Counts()
    found.add(counts, 1 / steps)
    found.add(counts.step, 1 - 1 / steps)
    return found


def _named(calls: Mapping[str, float]) -> dict[str, int]:
    """How often each kernel runs, without the numbers of its calls."""
    found: dict[str, float] = {}
    for name, number in calls.items():
        plain = re.sub(r"\.\d+$", "", name)
        found[plain] = found.get(plain, 0) + number
    return {name: round(number) for name, number in found.items()}


def held_bytes(tree: Any) -> int:
    """What arrays take on each chip, padding included, as the compiler counts them; without padding if they do not fit there.

    Args:
        tree: abstract arrays with their shardings.
    """
    nothing = jax.jit(lambda tree: jnp.zeros(()), keep_unused=True)
    try:
        memory: Any = nothing.lower(tree).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return int(memory.argument_size_in_bytes)
