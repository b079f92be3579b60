"""What the published sizes need on chips that are not here: the table of docs/plan.md.

    python benchmarks/sizes.py DIR [--models 256m 500m 2.2b] [--on v5e v6e …] [--write docs/plan.md]

Each row is a plan of the engine for a record of 13 tiles, 1,100 prompt tokens and 700 new ones, with one ring of 2,048 columns
and the slots that the engine takes by itself; two rows search the most slots of the 2.2B on one v5e chip. Rows are kept as JSON
in DIR, and what is there is not compiled again, so that chips whose compilers are in different environments share a table: run
the command in each of them. The table has all rows that DIR holds.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from smolvlm_jax.errors import SmolVLMError
from smolvlm_jax.plan import PlanConfig, Workload, plan

MODELS = ("256m", "500m", "2.2b")
CHIPS = ("v5e", "v6e", "v5p", "a100", "h100", "b200")
HEADER = "| model | chip | slots | weights | KV cache | temporaries | other | all | usable | records/s | compiled, s |"


class Row(NamedTuple):
    """A row of the table; `more` are fields of PlanConfig."""

    model: str
    on: str
    label: str = ""
    more: Mapping[str, Any] = MappingProxyType({})

    def file(self, directory: Path) -> Path:
        return directory / ("-".join(filter(None, (self.model, self.on, *self.label.split()))) + ".json")


MOST = {"max_slots": True}
ROWS = [
    *(Row(model, on) for model in MODELS for on in CHIPS),
    Row("2.2b", "v5e", "most", MOST),
    Row("2.2b", "v5e", "most int8", MOST | {"kv_cache_dtype": "int8"}),
]


def progress(name: str, number: int, total: int) -> None:
    print(f"  compiling {number} of {total}: {name}", file=sys.stderr, flush=True)


def compile_row(row: Row, file: Path) -> None:
    """Plan a row and keep it."""
    config = PlanConfig(model=row.model, on=row.on, ring_lengths=(2048,), workload=Workload(), **row.more)
    found = plan(config, progress).to_dict()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def line(row: Row, found: dict[str, Any]) -> str:
    """A row as Markdown; memory in GB of 10⁹ bytes."""
    memory, rate = found["memory"], found["rate"]
    kinds = dict(memory["kinds"])
    shown = [kinds.pop(kind) for kind in ("weights", "KV cache", "temporaries")]
    sizes = [*shown, sum(kinds.values()), memory["total"], memory["usable"]]
    slots = f"{found['shapes']['slots'][0]:,}"
    note = {"": "", "most": ": the most", "most int8": ": the most, int8 caches"}[row.label]
    records = ""
    if rate is not None:
        low, high = rate["low"], f"{rate['high']:.3g}"
        records = f"up to {high}" if low is None else f"{low:.3g}–{high}"
    cells = [
        row.model.upper(),
        row.on,
        slots + note,
        *(f"{size / 1e9:.2f}" for size in sizes),
        records,
        f"{found['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(directory: Path) -> str:
    """All rows that a directory holds."""
    kept = [(row, row.file(directory)) for row in ROWS]
    lines = [line(row, json.loads(file.read_text(encoding="utf-8"))) for row, file in kept if file.exists()]
    return "\n".join([HEADER, "|---|---|" + "---:|" * (HEADER.count("|") - 3), *lines])


def replace_table(text: str, new: str) -> str:
    """A page with another table."""
    before, _, rest = text.partition(HEADER)
    lines = rest.split("\n")[1:]
    end = next((n for n, found in enumerate(lines) if not found.startswith("|")), len(lines))
    return "\n".join([before + new, *lines[end:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--on", nargs="*", default=CHIPS, choices=CHIPS)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table in place of the one that a page has")
    options = parser.parse_args()
    failed = 0
    for row in ROWS:
        file = row.file(options.directory)
        if row.model in options.models and row.on in options.on and not file.exists():
            print(f"{row.model} on {row.on} {row.label}", file=sys.stderr, flush=True)
            try:
                compile_row(row, file)
            except SmolVLMError as error:
                failed += 1
                print(f"  {error}", file=sys.stderr, flush=True)
    print(table(options.directory))
    if options.write is not None:
        page = options.write.read_text(encoding="utf-8")
        options.write.write_text(replace_table(page, table(options.directory)), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
