"""`smolvlm-jax convert` and `smolvlm-jax verify`. Importing this module imports nothing heavy."""

import argparse
import json
import os
import sys
from pathlib import Path

from ..errors import InputError

__all__ = ["add_parsers", "parse_mesh"]

_AXES = ("data", "fsdp", "tensor")


def parse_mesh(text: str | None) -> dict[str, int] | None:
    """ "data=1,fsdp=8,tensor=1" as a mapping; axes left out are 1. Raises InputError."""
    if text is None:
        return None
    sizes = dict.fromkeys(_AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis.strip() not in sizes or not size.strip().isdecimal() or int(size) < 1:
            raise InputError(f"{part!r} in --mesh {text} is not AXIS=SIZE with an axis of {', '.join(_AXES)} and a size from 1")
        sizes[axis.strip()] = int(size)
    return sizes


def _stay_on_cpu() -> None:
    """A conversion computes nothing: without this it would claim the accelerators of the machine it runs on."""
    if "jax" not in sys.modules:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def run_convert(args: argparse.Namespace) -> int:
    mesh = parse_mesh(args.mesh)
    if args.distributed:
        import jax

        from ..sharding import make_mesh

        jax.distributed.initialize()
        mesh = make_mesh(data=1, fsdp=-1) if mesh is None else make_mesh(**mesh)
    else:
        _stay_on_cpu()
    from .conversion import convert

    done = convert(
        args.source,
        args.destination,
        to=args.to,
        dtype=args.dtype,
        mesh=mesh,
        max_shard_size=args.max_shard_size,
        revision=args.revision,
        config=args.config,
        force=args.force,
        quiet=args.quiet,
    )
    if not args.quiet:
        print(f"{done.destination}: {done.tensors} tensors, {done.nbytes / 1e9:.3f} GB, as {done.kind}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    _stay_on_cpu()
    from .report import to_html, to_text
    from .verify import verify

    report = verify(
        args.a,
        args.b,
        stages=args.stages,
        revision=args.revision,
        position_ids=args.position_ids,
        quiet=args.quiet,
        notify=(lambda line: None) if args.quiet else (lambda line: print(f"smolvlm-jax: {line}", file=sys.stderr)),
    )
    for path, text in ((args.report, to_html), (args.json, lambda report: json.dumps(report.to_dict(), indent=2) + "\n")):
        if path is not None and str(path) != "-":
            try:
                Path(path).write_text(text(report), encoding="utf-8")
            except OSError as error:
                raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    if args.json == "-":
        print(json.dumps(report.to_dict(), indent=2))
    elif not args.quiet:
        print(to_text(report), end="")
    return 0 if report.same else 1


def add_parsers(subparsers) -> None:
    """Register both commands; each sets `run`, a function from the parsed arguments to an exit code."""
    convert = subparsers.add_parser(
        "convert",
        help="PyTorch checkpoint -> orbax, or back",
        description="Convert a checkpoint between Hugging Face safetensors and orbax, one tensor at a time. The destination "
        "appears whole or not at all; an interrupted conversion starts over.",
    )
    convert.add_argument("source", metavar="SOURCE", help="directory, Hub id (owner/name), bundled name, or safetensors file")
    convert.add_argument("destination", metavar="DEST", help="directory to write")
    convert.add_argument("--to", choices=("orbax", "hf"), help="what to write (default: what SOURCE is not)")
    convert.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    convert.add_argument("--mesh", help="cut the orbax checkpoint for this mesh, e.g. data=1,fsdp=8,tensor=1")
    convert.add_argument("--max-shard-size", default="4GB", help="of the safetensors files (default: %(default)s)")
    convert.add_argument("--revision", help="branch, tag or commit of a Hub id; the commit is recorded")
    convert.add_argument("--config", metavar="FILE", help="config.json, if it is not beside the weights")
    convert.add_argument("--force", action="store_true", help="replace an existing checkpoint at DEST")
    convert.add_argument(
        "--distributed", action="store_true", help="one process of a jax job (TPU pod, Slurm, …); each writes its part"
    )
    convert.add_argument("--quiet", action="store_true", help="no progress, no summary; warnings and errors only")
    convert.set_defaults(run=run_convert)

    verify = subparsers.add_parser(
        "verify",
        help="compare two checkpoints",
        description="Compare two checkpoints tensor by tensor, and with --stages layer by layer. "
        "Exit code 0: the same, 1: not.",
    )
    verify.add_argument("a", metavar="A", help="as SOURCE of convert")
    verify.add_argument("b", metavar="B", help="as SOURCE of convert")
    verify.add_argument(
        "--stages", action="store_true", help="run both over built-in prompts and a picture, and compare each stage"
    )
    verify.add_argument("--report", metavar="FILE", help="write a self-contained HTML page")
    verify.add_argument("--json", metavar="FILE", help="write JSON (- for standard output)")
    verify.add_argument("--revision", help="branch, tag or commit of a Hub id")
    verify.add_argument(
        "--position-ids",
        choices=("intended", "transformers-4.56"),
        default="intended",
        help="rule for our encoder's position ids (default: %(default)s)",
    )
    verify.add_argument("--quiet", action="store_true", help="nothing but the exit code and errors")
    verify.set_defaults(run=run_verify)
