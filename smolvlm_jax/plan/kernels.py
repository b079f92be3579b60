"""Cycles of Pallas kernels on TPU, by the instructions that the compiler has scheduled for them.

XLA estimates no cycles for a kernel. Told to, its compiler writes each kernel's schedule as text: one line for each bundle of
instructions that start in the same cycle, `>` once for each loop around it. A kernel takes at least the larger of its bundles,
each as often as its loops run, and the time for which the busiest matrix unit is held; memory may take longer than both.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

__all__ = ["Kernel", "dump_options", "read_dump", "schedule"]

_BUNDLE = re.compile(r"^\s*0x[0-9a-f]+\s*([A-Z]{2})?\s*:\s*([> ]*)\{(.*)$", re.MULTILINE)
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test \*/")
_PRODUCT = re.compile(r"vmatmul\S*\.(mxu\d)")
_LOOP_BEGINS = "LB"  # the label of a loop's first bundle
_FILE = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt$")
# The loop over a kernel's grid runs this much longer than the grid, for the ends of its pipeline of copies.
_PIPELINE_ENDS = 2


class _Line(NamedTuple):
    """A bundle: how many loops are around it, whether one begins with it, its instructions."""

    depth: int
    begins: bool
    body: str


@dataclass(frozen=True)
class Kernel:
    """What a kernel's schedule says of one call.

    Attributes:
        bundles: instruction bundles, each as often as it runs.
        products: pushes into the busiest matrix unit.
        unknown_loops: loops whose number of steps is decided on the chip; they are counted as `dynamic_trips` steps.
    """

    bundles: int
    products: int
    unknown_loops: int

    def cycles(self, product_cycles: int) -> int:
        """The larger of the bundles and the time for which a matrix unit is held, in cycles."""
        return max(self.bundles, self.products * product_cycles)


def dump_options(directory: str) -> str:
    """What makes the compiler write schedules to a directory, for LIBTPU_INIT_ARGS."""
    return f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"


def schedule(text: str, dynamic_trips: int = 1) -> Kernel:
    """Read a schedule.

    Args:
        text: of a …-final_bundles.txt.
        dynamic_trips: steps of a loop whose number of steps is decided on the chip; inside it such loops count once.
    """
    lines = [
        _Line(found.group(2).count(">"), found.group(1) == _LOOP_BEGINS, found.group(3)) for found in _BUNDLE.finditer(text)
    ]
    products: Counter = Counter()
    bundles, unknown = _block(lines, 0, 1, products, dynamic_trips)
    return Kernel(bundles, max(products.values(), default=0), unknown)


def _block(lines: list[_Line], depth: int, times: int, products: Counter, dynamic: int) -> tuple[int, int]:
    """Bundles and loops of unknown length in lines that all lie `depth` loops deep or deeper, and run `times` times."""
    bundles, unknown = 0, 0
    loops: list[list[_Line]] = []
    for line in lines:
        if line.depth == depth:
            bundles += times
            for unit in _PRODUCT.findall(line.body):
                products[unit] += times
            continue
        # A loop may be interrupted, by bundles that a branch leaves empty: it goes on until another one begins.
        if not loops or (line.begins and line.depth == depth + 1):
            loops.append([])
        loops[-1].append(line)
    for loop in loops:
        trips = _trips(loop, depth + 1)
        # Of loops of unknown length inside one another only the outermost is `dynamic` steps long.
        steps, within = (dynamic, 1) if trips is None else (trips, dynamic)
        inside, more = _block(loop, depth + 1, times * steps, products, within)
        bundles, unknown = bundles + inside, unknown + more + (trips is None)
    return bundles, unknown


def _trips(loop: list[_Line], depth: int) -> int | None:
    """Steps of a loop by the constant of its exit test, of the outermost, over the grid, without its pipeline's ends; None
    where there is no such constant."""
    for line in loop:
        if line.depth == depth and (found := _EXIT.search(line.body)):
            return max(int(found.group(1)) - (_PIPELINE_ENDS if depth == 1 else 0), 1)
    return None


def read_dump(directory: str, names: list[str], dynamic_trips: int = 1) -> dict[str, Kernel]:
    """The schedules of kernels, by the names of their calls. Of equal kernels the compiler writes one; what it has not written
    for any kernel of the name is absent from the result."""
    files: dict[str, Path] = {}
    for path in sorted(Path(directory).glob("*-final_bundles.txt")):
        if named := _FILE.match(path.name):
            files.setdefault(named.group(1), path)
    plain = {_plain(name): path for name, path in files.items()}
    read: dict[Path, Kernel] = {}
    kernels = {}
    for name in names:
        found = files.get(name) or plain.get(_plain(name))
        if found is not None:
            if found not in read:
                read[found] = schedule(found.read_text(), dynamic_trips)
            kernels[name] = read[found]
    return kernels


def _plain(name: str) -> str:
    """A kernel's name without the number of its call."""
    return re.sub(r"\.\d+$", "", name)
