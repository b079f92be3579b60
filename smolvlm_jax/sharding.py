"""Logical axis names, the rules that map them to a mesh, and shardings for parameters, batches and activations.

A mesh has the axes `data`, `fsdp` and `tensor`. Parameters and activations name their dimensions (`embed`, `heads`, …);
`AXIS_RULES` says which mesh axes a name may use. A dimension that its mesh axes do not divide is replicated instead, with one
warning per name: SmolVLM's 9 and 15 query heads divide by neither 2, 4 nor 8, which data parallelism does not need.

Activations are constrained only inside `jax.set_mesh(mesh)`, or `activate(mesh)`, which is the same. With no mesh in scope
`constrain` returns its input, so code for a single device needs no mesh.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .errors import InputError
from .habits import named_arguments

AXES = ("data", "fsdp", "tensor")
_declaring: ContextVar[bool] = ContextVar("declaring", default=False)

# logical name -> mesh axes, most important first. Names that are absent are replicated.
AXIS_RULES: Mapping[str, tuple[str, ...]] = {
    # parameters
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "shuffled": ("fsdp",),  # input of the connector: scale² × vision width
    # activations; their width stays whole, their rows are spread over both data axes
    "batch": ("data", "fsdp"),
    "tile": ("data", "fsdp"),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}


@named_arguments
def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, tensor), of type Auto: the compiler propagates shardings.

    Args:
        data: devices along this axis, or -1 in one of the three for the devices that are left.
        fsdp: see `data`.
        tensor: see `data`.
        devices: default: all.

    Returns:
        The mesh.

    Raises:
        InputError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    given = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in given.items():
        if not isinstance(size, Integral):
            raise InputError(f"{name} is {size!r:.60}; give each axis its size, such as make_mesh(data=4, tensor=2)")
    sizes = list(given.values())
    if sizes.count(-1) > 1:
        raise InputError(f"only one mesh axis may be -1, got data={data}, fsdp={fsdp}, tensor={tensor}")
    if -1 in sizes:
        known = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = len(devices) // known if known > 0 else 0
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        shape = " × ".join("?" if size == -1 else str(size) for size in given.values())
        raise InputError(
            f"a mesh of {shape} does not use {len(devices)} devices exactly (data × fsdp × tensor; -1 in "
            "one of them takes what is left)"
        )
    return Mesh(_arranged(tuple(sizes), devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _arranged(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices as an array of this shape, neighbours beside each other as far as their network has such axes."""
    try:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices).devices
    except NotImplementedError:  # an axis of the chips' network would have to be divided, which jax does by itself on v5e alone
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except AssertionError:  # chips that make no whole block of the network, such as three of four
        return np.asarray(devices).reshape(sizes)


def activate(mesh: Mesh | None) -> AbstractContextManager:
    """Put a mesh in scope, inside which activations are constrained.

    Args:
        mesh: the mesh; None puts none in scope.

    Returns:
        A context manager.
    """
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


@functools.cache
def _warn_once(name: str | None, size: int, axes: str, ways: int) -> None:
    warnings.warn(f"axis {name!r} of size {size} is replicated: the mesh axes {axes} would split it {ways} ways", stacklevel=4)


def partition_spec(names: Sequence[str | None], shape: Sequence[int], mesh, *, quiet: bool = False) -> PartitionSpec:
    """The spec of an array whose dimensions carry these logical names.

    A mesh axis is left out that does not divide the dimension, that has size one, or that an earlier dimension of the same
    array uses.

    Args:
        names: logical axis of each dimension, None = never sharded.
        shape: of the array.
        mesh: a mesh, abstract or not.
        quiet: do not warn of axes that do not divide.

    Raises:
        InputError: if there are not as many names as dimensions.
    """
    if len(names) != len(shape):
        raise InputError(f"{len(names)} axis names {tuple(names)} for an array of shape {tuple(shape)}")
    sizes = dict(mesh.shape)
    used: set[str] = set()
    entries = []
    for name, size in zip(names, shape, strict=True):
        wanted = [a for a in AXIS_RULES.get(str(name), ()) if sizes.get(a, 1) > 1 and a not in used]
        chosen = list(wanted)
        while chosen and size % math.prod(sizes[a] for a in chosen):
            chosen.pop()  # the last axis is the least important
        if chosen != wanted and not quiet:
            _warn_once(name, size, "×".join(wanted), math.prod(sizes[a] for a in wanted))
        used.update(chosen)
        entries.append(chosen[0] if len(chosen) == 1 else tuple(chosen) or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def shards(name: str, size: int, mesh=None) -> int:
    """Over how many parts a dimension with this logical name and size is spread: on a mesh, or the one in scope, outside of the
    parts that `on_each_device` runs."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return 1
    (*found,) = partition_spec((name,), (size,), mesh, quiet=True)
    axes = found[0] if found else ()
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def on_each_device(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Run a kernel, which the compiler cannot split, on each device's part of its arrays.

    With no mesh in scope, or within a device's part already, the function is called as it is.

    Args:
        function: of the arrays; all its results have the dimensions (b, heads, …, …).
        *arrays: (b, heads, …, …), split by rows and, where they divide, by heads; (b, …), split by rows; or (). The second one
            has the key/value heads, whose number decides.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return function(*arrays)
    found = partition_spec(("batch", "act_kv_heads"), arrays[1].shape[:2], mesh, quiet=True)
    rows, heads = (*found, None, None)[:2]
    specs = tuple(PartitionSpec(*(rows, heads if x.ndim == 4 else None)[: x.ndim]) for x in arrays)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(rows, heads), check_vma=False)(*arrays)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Tell the compiler how an activation is sharded on the mesh in scope; without a mesh, the identity.

    flax's `with_logical_constraint` would require dimensions that divide, and do nothing, without a warning, under
    `with mesh:`.

    Args:
        x: the activation.
        *names: logical axis of each dimension.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, mesh, quiet=True))


class Dimension(NamedTuple):
    """Size and logical axis of a parameter's dimension; axis None is never sharded."""

    size: int
    axis: str | None = None


@struct.dataclass
class Declared(nn.LogicallyPartitioned):
    """A parameter as `init` returns it: value and logical axes (`names`), and what a projection says of its kernel.

    Attributes:
        summed: leading dimensions of a projection's kernel that are summed over; None for any other parameter.
    """

    summed: int | None = struct.field(default=None, pytree_node=False)


def parameter(module: nn.Module, name: str, init: Any, *dimensions: Dimension, summed: int | None = None) -> jax.Array:
    """Declare a parameter once; shapes, shardings, initial values and adapters are all derived from this.

    Args:
        module: the module that the parameter belongs to.
        name: its name there.
        init: function of a key and a shape.
        *dimensions: sizes and logical axes.
        summed: see `Declared`.
    """
    shape, axes = tuple(d.size for d in dimensions), tuple(d.axis for d in dimensions)
    # Only `init` needs the values: `apply` compares shapes, for which Flax would trace the random numbers of each parameter.
    make = init if module.is_initializing() and not is_declaring() else _zeros
    value: Any = module.param(name, lambda *args: Declared(make(*args), axes, summed=summed), shape)
    return value  # without its box, which only `init` returns


def _zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def is_declaring() -> bool:
    """Whether this is within the block of `declaring`."""
    return _declaring.get()


@contextmanager
def declaring() -> Iterator[None]:
    """Within the block `init` makes parameters of zeros, those of all layers like the first's: shapes and axes count."""
    token = _declaring.set(True)
    try:
        yield
    finally:
        _declaring.reset(token)


def parameter_shardings(abstract_params, axes, mesh: Mesh):
    """The tree of NamedShardings of parameters.

    Args:
        abstract_params: a tree of anything with a `.shape`.
        axes: the same tree of logical axes, as `logical_axes` returns it.
        mesh: where the parameters go.
    """
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, partition_spec(names, leaf.shape, mesh)),
        abstract_params,
        axes,
    )


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Rows over (data, fsdp), other dimensions whole: for tokens (b, t), tiles (N, T, T, 3) and scalars alike."""
    names = ("batch", *[None] * (len(shape) - 1))[: len(shape)]
    return NamedSharding(mesh, partition_spec(names, shape, mesh, quiet=True))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())
