"""`smolvlm-jax plan`. Importing this module imports nothing heavy."""

import argparse
import json
import os
import time
from pathlib import Path

from ..arguments import add_command, add_machine, add_quiet, given, whole_numbers
from ..errors import InputError
from ..progress import Progress
from ..terminal import say, show

__all__ = ["add_parser"]


def run_plan(options: argparse.Namespace) -> int:
    from .report import chart, check_chart, to_text
    from .run import plan
    from .settings import PlanConfig, Workload

    settings = {**given(options, PlanConfig), "overrides": tuple(options.overrides)}
    config = PlanConfig(**settings, workload=Workload(**given(options, Workload)))
    written = None if options.json in (None, "-") else _on_disk("--json", options.json)
    drawn = None if options.chart is None else _on_disk("--chart", options.chart)
    if written is not None and written == drawn:
        raise InputError(f"--json and --chart both write {written}: name two files")
    for path in filter(None, (written, drawn)):  # now, not after compilers have worked for minutes
        _try_to_write(path)
    if drawn is not None:
        check_chart(drawn)
    started = time.perf_counter()
    with Progress(show=not options.quiet) as progress:

        def notify(name: str, number: int, total: int) -> None:
            if not options.quiet:
                say(f"compiling {number} of {total}: {name} ({time.perf_counter() - started:.0f} s so far)")
            progress.tell(f"compiling {name}, program", number, total)

        progress.tell("starting the compiler")
        found = plan(config, notify)
    text = json.dumps(found.to_dict(), indent=2)
    if written is not None:
        try:
            written.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(written, error) from error
    if drawn is not None:
        chart(found, drawn)
    show(text if options.json == "-" else to_text(found))
    return 0


def _on_disk(option: str, path: str) -> Path:
    """Where to write; links are followed. Raises InputError for a URL."""
    if "://" in path:
        raise InputError(f"{option} {path}: plan writes to a disk, not to a URL; name a file")
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def _try_to_write(path: Path) -> None:
    """Raises InputError where a file cannot be written. What is there stays as it is, and the reader of a pipe sees no end."""
    new = not path.exists()
    if path.is_fifo():
        return
    try:
        with open(path, "ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    command = add_command(
        commands,
        "plan",
        run_plan,
        help="estimate what a model needs on chips, without having them",
        description="Compile the programs of the engine, or a recipe's training step, for chips that need not be in this "
        "machine, and print memory, work and time. TPUs need pip install 'smolvlm-jax[plan]', GPUs 'smolvlm-jax[plan-cuda]'.",
        examples=(
            "smolvlm-jax plan --model 2.2b --on v5e:2x4 --tiles 13 --prompt 1100 --new 700",
            "smolvlm-jax plan --recipe lora-256m --on h100 data.batch_size=8",
        ),
    )
    what = command.add_argument_group("model and chips")
    what.add_argument("--model", metavar="NAME|DIR", help="256m, 500m, 2.2b, a published name, a directory or a Hub id "
                         "(default: 256m, or the recipe's)")  # fmt: skip
    what.add_argument("--on", metavar="CHIPS", help="v5e:2x4, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1, h100, a100:8, l4, b200, here "
                         "(default: here, or the recipe's topology)")  # fmt: skip
    work = command.add_argument_group("the engine's work (--mode infer)")
    work.add_argument(
        "--mode",
        choices=("infer", "train"),
        help="the engine's programs or a training step (default: infer, with --recipe train)",
    )
    work.add_argument("--tiles", type=int, metavar="N", help="tiles of a record (default: 13, a 4:3 picture)")
    work.add_argument("--prompt", type=int, metavar="N", help="prompt tokens of a record (default: 1100)")
    work.add_argument("--new", type=int, metavar="N", help="new tokens of a record (default: 700)")
    work.add_argument(
        "--ring-lengths", type=whole_numbers, metavar="N,…", help="as in batch (default: the shortest that holds a record)"
    )
    work.add_argument(
        "--slots", type=whole_numbers, metavar="N,…", help="as in batch (default: what the engine takes of the memory)"
    )
    cache = "int8: caches in 8 bits, as in batch (default: as --dtype)"
    work.add_argument("--kv-cache", dest="kv_cache_dtype", choices=("int8",), help=cache)
    work.add_argument("--quantize", choices=("int8",), help="weights in 8 bits, as convert writes them (default: as stored)")
    live = "share of a ring that rows see on average while they decode, for TPUs (default: that of the records)"
    work.add_argument("--live", type=float, metavar="SHARE", help=live)
    work.add_argument("--max-slots", action="store_true", help="search the largest number of slots that fits")
    work.add_argument("--all-programs", action="store_true", help="compile every program that the engine can need")
    train = command.add_argument_group("a training step (--mode train)")
    train.add_argument("--recipe", metavar="RECIPE", help="a YAML file, or a built-in recipe such as lora-256m (default: none)")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the recipe: data.length=1024 remat=full")
    add_machine(
        command,
        dtype="bfloat16, or the recipe's",
        mesh="of the chips, e.g. data=2,tensor=4 (default: all to data, or the recipe's)",
    )
    output = command.add_argument_group("output")
    output.add_argument(
        "--json", metavar="FILE", help="also write every figure as JSON; - for nothing but that (default: none)"
    )
    output.add_argument("--chart", metavar="FILE", help="draw the memory as .svg, .png or .pdf (default: none)")
    add_quiet(output, "no progress")
