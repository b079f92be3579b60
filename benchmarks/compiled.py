"""What the programs of engine and trainer cost on chips that are not here, counted by the chips' own compilers.

    python benchmarks/compiled.py [--models 256m 500m 2.2b] [--on v5e v6e h100] [--only encode prefill insert decode train]
                                  [--rings 2048:64 …] [--live 0.25 0.5 1] [--kv-cache int8] [--quantize int8] [--json FILE]
                                  [--page]

For each program: cycles on TPU (XLA's operations by its estimates, kernels by their scheduled bundles and the time for which
they hold a matrix unit), bytes moved, temporaries; on GPU the kernels that are started and the calls of cuDNN and cuBLAS.
Decode programs are counted for one step. With `--live`, once for each share of a ring's columns that rows see, and their bytes
are set beside the least that a step in bfloat16 can read: the decoder's weights and those columns. `--page` adds up a page:
13 tiles, 1,100 prompt tokens and 700 new ones with 64 slots of 2,048 columns of which rows see half, each program by the larger
of its cycles and its bytes over the bandwidth.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from smolvlm_jax.errors import SmolVLMError
from smolvlm_jax.plan import CHIPS, Chip, Cost, PlanConfig, Workload, plan
from smolvlm_jax.plan.settings import SHORT_NAMES
from smolvlm_jax.sizes import published_config

KINDS = ("encode", "prefill", "insert", "decode", "train")
PAGE = Workload(tiles=13, prompt=1100, new=700)
PAGE_RING = (2048, 64)
PAGE_LIVE = 0.5
RINGS = (PAGE_RING, (1024, 98), (4096, 24), (256, 256))
RECIPES = {"256m": "lora-256m", "500m": "full-500m-fsdp", "2.2b": "2.2b-lora-v5e8"}
HOSTS = {"v5e": "v5e:2x4", "v6e": "v6e:2x4", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}


@dataclass(frozen=True)
class Row:
    """A program on a chip."""

    model: str
    on: str
    cost: Cost
    ring: tuple[int, int] | None = None
    live: float | None = None


def engine_rows(
    model: str, chip: str, kinds: tuple[str, ...], rings: tuple[tuple[int, int], ...], shares: tuple[float | None, ...], **more
) -> Iterator[Row]:
    """The engine's programs on one chip; decode for each ring and share of live columns, the others once for the first ring.

    `more` are fields of PlanConfig.
    """
    kinds = tuple(kind for kind in kinds if kind != "train")
    for number, ((length, slots), live) in enumerate(product(rings, shares)):
        wanted = tuple(kind for kind in kinds if kind == "decode" or number == 0)
        if not wanted:
            return
        # The first ring's records have the pictures and the prompt of a page, as far as they fit.
        work = Workload(tiles=PAGE.tiles if number == 0 else 0, prompt=max(length // 2, 1), new=max(length // 4, 1))
        if (length, slots) == rings[0] and PAGE.prompt + PAGE.new <= length:
            work = PAGE
        sizes = {"ring_lengths": (length,), "slots": (slots,), "live": live}
        for cost in plan(PlanConfig(model=model, on=chip, kinds=wanted, workload=work, **sizes, **more), progress).programs:
            yield Row(model, chip, cost, (length, slots), live)


def train_rows(model: str, chip: str, kinds: tuple[str, ...], *_, **__) -> Iterator[Row]:
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
    least = ""
    if row.ring and row.live and cost.name.startswith("decode"):
        ratio = cost.bytes / decode_bytes(row.model, *row.ring, row.live)
        least = f" ({ratio:.3f} × weights and the {row.live:.0%} of columns that are live)"
    return (
        f"{row.model:5} {row.on:10} {cost.name:24} {cycles}{cost.bytes / 1e9:.3f} GB moved{least}, "
        f"{cost.temporary_bytes / 1e9:.3f} GB temporaries{launches}; {more or 'no kernels'}{unknown}{missing}"
    )


def decode_bytes(model: str, length: int, slots: int, live: float) -> float:
    """Bytes that a step in bfloat16 cannot do without: the decoder's weights with its head, and live keys and values."""
    text = published_config(SHORT_NAMES[model]).text_config
    width, queries, pairs = text.hidden_size, text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    layer = 2 * width * queries + 2 * width * pairs + 3 * width * text.intermediate_size + 2 * width
    weights = text.num_hidden_layers * layer + width + text.vocab_size * width
    return 2 * (weights + text.num_hidden_layers * 2 * pairs * slots * length * live)


def call_cycles(cost: Cost, chip: Chip) -> float:
    """The larger of a program's cycles and its bytes over the bandwidth, in cycles."""
    assert chip.clock is not None and cost.cycles is not None
    return max(cost.cycles, cost.bytes / chip.bandwidth * chip.clock)


def page(rows: list[Row], model: str, name: str) -> dict[str, float]:
    """Million cycles of a page on one chip, by kind of program.

    A call of the encoder takes 16 tiles, a packed row holds one prompt of 1,100 tokens, and the slots decode together.
    """
    chip, found = CHIPS[name], {}
    share = {"encode": PAGE.tiles / 16, "prefill": 1.0, "decode": PAGE.new / PAGE_RING[1]}
    for row in rows:
        kind = row.cost.name.split()[0]
        fits = kind != "decode" or (row.ring == PAGE_RING and row.live in (None, PAGE_LIVE))
        if (row.model, row.on) == (model, name) and kind in share and fits:
            found[kind] = share[kind] * call_cycles(row.cost, chip) / 1e6
    return found | {"page": sum(found.values())} if found.keys() == share.keys() else {}


def ring(text: str) -> tuple[int, int]:
    length, _, slots = text.partition(":")
    if not (length.isdecimal() and slots.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not COLUMNS:SLOTS, such as 2048:64")
    return int(length), int(slots)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["256m"], choices=RECIPES)
    parser.add_argument("--on", nargs="+", default=["v5e"], choices=CHIPS)
    parser.add_argument("--only", nargs="+", default=["encode", "prefill", "insert", "decode"], choices=KINDS)
    usual = " ".join(f"{length}:{slots}" for length, slots in RINGS)
    parser.add_argument("--rings", nargs="+", type=ring, metavar="COLUMNS:SLOTS", help=f"(default: {usual})")
    parser.add_argument("--live", nargs="+", type=float, metavar="SHARE", help="of a ring's columns (default: the records')")
    parser.add_argument("--kv-cache", choices=["int8"], help="caches in 8 bits")
    parser.add_argument("--quantize", choices=["int8"], help="weights in 8 bits")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--page", action="store_true", help="only what a page needs, and its cycles")
    options = parser.parse_args()
    if options.page and (options.rings or options.live):
        parser.error("--page has a ring and a share of its own: leave out --rings and --live")
    if options.only == ["train"] and (options.rings or options.live or options.kv_cache or options.quantize):
        parser.error("--rings, --live, --kv-cache and --quantize are of the engine's programs, and --only names train alone")
    if options.json and not Path(options.json).resolve().parent.is_dir():  # now, not after hours
        parser.error(f"--json {options.json}: there is no such directory")
    rings = (PAGE_RING,) if options.page else tuple(options.rings or RINGS)
    more = {"kv_cache_dtype": options.kv_cache, "quantize": options.quantize}
    rows: list[Row] = []
    failed = 0
    for model in options.models:
        for chip in options.on:
            # On GPUs a step reads all columns.
            given = (PAGE_LIVE if CHIPS[chip].platform == "tpu" else None,) if options.page else tuple(options.live or (None,))
            for part in (engine_rows, train_rows):
                try:
                    for row in part(model, chip, tuple(options.only), rings, given, **more):
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
            entries = [
                {"model": row.model, "on": row.on, "live": row.live, **asdict(row.cost), "cycles": row.cost.cycles}
                for row in rows
            ]
            json.dump(entries, file, indent=1)
            file.write("\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
