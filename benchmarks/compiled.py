"""What the programs of engine and trainer cost on chips that are not here, counted by the chips' own compilers.

    python benchmarks/compiled.py [--models 256m 500m 2.2b] [--on v5e v6e h100] [--only encode prefill insert decode train]
                                  [--rings 2048:64 …] [--kv-cache int8] [--quantize int8] [--json FILE] [--page]

For each program: cycles on TPU (XLA's operations by its estimates, kernels by their scheduled bundles and the time for which
they hold a matrix unit), bytes moved, temporaries; on GPU the kernels that are started and the calls of cuDNN and cuBLAS.
Decode programs are counted for one step. `--page` adds up a page: 13 tiles, 1,100 prompt tokens and 700 new ones with 64 slots
of 2,048 columns of which rows see half, each program by the larger of its cycles and its bytes over the bandwidth.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from smolvlm_jax.errors import SmolVLMError
from smolvlm_jax.plan import CHIPS, Chip, Cost, PlanConfig, Workload, plan

KINDS = ("encode", "prefill", "insert", "decode", "train")
PAGE = Workload(tiles=13, prompt=1100, new=700)
PAGE_RING = (2048, 64)
RINGS = (PAGE_RING, (1024, 98), (4096, 24), (256, 256))
RECIPES = {"256m": "lora-256m", "500m": "full-500m-fsdp", "2.2b": "2.2b-lora-v5e8"}
HOSTS = {"v5e": "v5e:2x4", "v6e": "v6e:2x4", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}


@dataclass(frozen=True)
class Row:
    """A program on a chip."""

    model: str
    on: str
    cost: Cost


def engine_rows(model: str, chip: str, kinds: tuple[str, ...], rings: tuple[tuple[int, int], ...], **more) -> Iterator[Row]:
    """The engine's programs on one chip; decode for each ring, the others for the first. `more` are fields of PlanConfig."""
    kinds = tuple(kind for kind in kinds if kind != "train")
    for number, (length, slots) in enumerate(rings):
        wanted = tuple(kind for kind in kinds if kind == "decode" or number == 0)
        if not wanted:
            return
        work = PAGE if number == 0 else Workload(tiles=0, prompt=length // 2, new=length // 4)
        config = PlanConfig(model=model, on=chip, ring_lengths=(length,), slots=(slots,), kinds=wanted, workload=work, **more)
        for cost in plan(config, progress).programs:
            yield Row(model, chip, cost)


def train_rows(model: str, chip: str, kinds: tuple[str, ...], rings: tuple[tuple[int, int], ...], **more) -> Iterator[Row]:
    """The step of the size's own recipe; on a GPU eight rows on one card."""
    if "train" not in kinds:
        return
    if chip in HOSTS:
        config = PlanConfig(recipe=RECIPES[model], on=HOSTS[chip], mesh="fsdp=8" if chip in ("v5e", "v6e") else "fsdp=4")
    else:
        config = PlanConfig(recipe=RECIPES[model], on=chip, mesh="data=1", overrides=("data.batch_size=8",))
    yield Row(model, config.on or chip, plan(config, progress).programs[0])


def progress(name: str, number: int, total: int) -> None:
    print(f"  compiling {number} of {total}: {name}", file=sys.stderr, flush=True)


def show(row: Row) -> str:
    cost = row.cost
    cycles = ""
    if cost.cycles is not None:
        xla, kernels = (cost.xla_cycles or 0) / 1e6, (cost.kernel_cycles or 0) / 1e6
        cycles = f"{cost.cycles / 1e6:8.2f} Mcycles (XLA {xla:.2f}, kernels {kernels:.2f}), "
    more = ", ".join(f"{count} × {name}" for name, count in {**cost.kernels, **cost.libraries}.items())
    launches = f", {cost.launches:.0f} kernels" if cost.cycles is None else ""
    unknown = f"; {cost.unknown_loops} loops of unknown length" if cost.unknown_loops else ""
    missing = f"; no schedule of {', '.join(cost.missing_kernels)}" if cost.missing_kernels else ""
    return (
        f"{row.model:5} {row.on:10} {cost.name:24} {cycles}{cost.bytes / 1e9:.3f} GB moved, "
        f"{cost.temporary_bytes / 1e9:.3f} GB temporaries{launches}; {more or 'no kernels'}{unknown}{missing}"
    )


def call_cycles(cost: Cost, chip: Chip) -> float:
    """The larger of a program's cycles and its bytes over the bandwidth, in cycles."""
    assert chip.clock is not None and cost.cycles is not None
    return max(cost.cycles, cost.bytes / chip.bandwidth * chip.clock)


def page(rows: list[Row], model: str, name: str) -> dict[str, float]:
    """Million cycles of a page on one chip, by kind of program.

    A call of the encoder takes 16 tiles, a packed row holds one prompt of 1,100 tokens, and the slots decode together.
    """
    length, slots = PAGE_RING
    chip, found = CHIPS[name], {}
    share = {"encode": PAGE.tiles / 16, "prefill": 1.0, "decode": PAGE.new / slots}
    for row in rows:
        kind = row.cost.name.split()[0]
        fits = kind != "decode" or row.cost.name.startswith(f"decode {slots} × {length}")
        if (row.model, row.on) == (model, name) and kind in share and fits:
            found[kind] = share[kind] * call_cycles(row.cost, chip) / 1e6
    return found | {"page": sum(found.values())} if found.keys() == share.keys() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["256m"], choices=RECIPES)
    parser.add_argument("--on", nargs="+", default=["v5e"], choices=CHIPS)
    parser.add_argument("--only", nargs="+", default=["encode", "prefill", "insert", "decode"], choices=KINDS)
    parser.add_argument("--rings", nargs="+", default=[f"{length}:{slots}" for length, slots in RINGS], metavar="COLUMNS:SLOTS")
    parser.add_argument("--kv-cache", choices=["int8"], help="caches in 8 bits")
    parser.add_argument("--quantize", choices=["int8"], help="weights in 8 bits")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--page", action="store_true", help="only what a page needs, and its cycles")
    options = parser.parse_args()
    rings = (PAGE_RING,) if options.page else tuple(tuple(map(int, ring.split(":"))) for ring in options.rings)
    more = {"kv_cache_dtype": options.kv_cache, "quantize": options.quantize, "live": 0.5 if options.page else None}
    rows: list[Row] = []
    failed = 0
    for model in options.models:
        for chip in options.on:
            for part in (engine_rows, train_rows):
                try:
                    for row in part(model, chip, tuple(options.only), rings, **more):
                        rows.append(row)
                        print(show(row), flush=True)
                except SmolVLMError as error:
                    failed += 1
                    print(f"{model:5} {chip:10} {error}", flush=True)
    for model in options.models:
        for chip in options.on:
            if CHIPS[chip].clock and (found := page(rows, model, chip)):
                parts = ", ".join(f"{kind} {value:.1f}" for kind, value in found.items() if kind != "page")
                print(f"{model:5} {chip:10} a page: {found['page']:.1f} Mcycles ({parts})")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(
                [{"model": row.model, "on": row.on, **asdict(row.cost), "cycles": row.cost.cycles} for row in rows],
                file,
                indent=1,
            )
            file.write("\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
