"""What a training step takes of a device's memory: an estimate before it is compiled, and what the compiler says of it."""

import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from ..errors import size_text
from ..progress import clock_text
from .partition import Partition
from .progress import Display
from .state import TrainState
from .step import Step

__all__ = ["compile_step", "peak_bytes"]

# Primitives whose own results exist beside those of the program that they run again and again.
_LOOPS = ("scan", "while")
# Programs of kernels, whose arrays are blocks on the chip.
_KERNELS = ("pallas_call",)


def compile_step(step: Step, state: TrainState, batch: Any, base: dict, partition: Partition, display: Display) -> None:
    """Compile a step for these arguments, and say before it what memory it will need, and afterwards what the compiler says.

    Args:
        step: what `make_step` returned.
        state: the first state.
        batch: the first batch, as `step` takes it.
        base: the frozen base.
        partition: what is trained.
        display: where to say it.
    """
    started = time.perf_counter()
    display.doing("compiling the training step")
    traced, arrays = step.trace(state, batch, base)
    mesh = step.mesh
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    gradients = _held(partition.split(state.params)[0])
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(partition.split(state.params)[0]))
    kinds = {
        "weights": _held((state.params, base)),
        "moments": _held(state.opt_state),
        "gradients": gradients,
        "a batch": _held(arrays),
        "activations": max(peak_bytes(traced.jaxpr.jaxpr, _gradients_end(traced.jaxpr.jaxpr)) - whole, 0) // ways,
    }
    room, where = _room(mesh)
    total = sum(kinds.values())
    parts = ", ".join(f"{name} {size_text(count)}" for name, count in kinds.items())
    display.remark(f"memory: a step needs at most about {size_text(total)} of {where}: {parts}")
    # Of activations the compiler has been seen to keep half, since it computes many values where they are read.
    if room is not None and total - kinds["activations"] // 2 > room:
        display.remark(
            f"warning: that may be more than the {size_text(room)} there are: lower data.batch_size (with accumulation) or "
            "data.length, or take remat=full"
        )
    found = step.compile(traced)
    if found is not None:
        took = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
        display.remark(f"compiled in {clock_text(time.perf_counter() - started)}: a step takes {size_text(took)} of {where}")


def peak_bytes(program: Any, stop: int | None = None) -> int:
    """Most bytes that the values which a program computes take at once, its arguments aside.

    Each value is taken to exist from the operation that makes it to the last one that reads it, in the order in which they are
    written down. A compiler fuses many of them, so this is an upper bound for most programs.

    Args:
        program: a jaxpr.
        stop: how many of its operations to look at; default: all.
    """
    ends = {var: number for number, eqn in enumerate(program.eqns) for var in eqn.invars if not hasattr(var, "val")}
    ends |= {var: len(program.eqns) for var in program.outvars if not hasattr(var, "val")}
    last: dict[int, list] = {}
    alive = most = 0
    for number, eqn in enumerate(program.eqns[:stop]):
        made = sum(map(_bytes, eqn.outvars))
        inner = max(map(peak_bytes, _programs(eqn)), default=0)
        most = max(most, alive + (made + inner if eqn.primitive.name in _LOOPS else max(made, inner)))
        alive += made
        for var in eqn.outvars:
            last.setdefault(ends.get(var, number), []).append(var)
        alive -= sum(map(_bytes, last.pop(number, ())))
    return most


def _gradients_end(program: Any) -> int:
    """How many operations of a step come before the optimiser's: gradients are constrained to their shards."""
    return 1 + max((number for number, eqn in enumerate(program.eqns) if _constrains(eqn)), default=-1)


def _constrains(eqn: Any) -> bool:
    return eqn.primitive.name == "sharding_constraint" or any(
        _constrains(inner) for program in _programs(eqn) for inner in program.eqns
    )


def _programs(eqn: Any) -> Iterator[Any]:
    """The programs that an operation runs."""
    if eqn.primitive.name in _KERNELS:
        return
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def _bytes(var: Any) -> int:
    shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 0)


def _held(tree: Any) -> int:
    """Bytes of arrays on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _room(mesh: Mesh) -> tuple[int | None, str]:
    """(the bytes that a device has for programs, None where that is unknown; in words, whose memory it is)."""
    device = mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    which = "each device" if mesh.size > 1 else "the device"
    if limit:
        return limit, f"{which}'s {size_text(limit)}"
    if device.platform != "cpu":
        return None, f"{which}'s memory"
    count = len(mesh.local_devices)
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shared = f", which {count} devices share" if count > 1 else ""
    return limit // count, f"this machine's {size_text(limit)}{shared}"
