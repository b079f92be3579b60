"""The table of our parameters, the PyTorch tensors they are made of, and the rearrangements between them, for both directions.

A pattern names the dimensions of the PyTorch tensor on the left and ours on the right, in the library's alphabet; a group in
parentheses is one dimension there and several here. PyTorch linear weights are (out, in), ours (in, out) with heads apart.
The names need no table: a parameter has the tensor's path, except that a kernel, scale or embedding is called weight there.
Checkpoints of other families have names of their own (`family_names`).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ..errors import CheckpointError, first_few
from .regions import Region

__all__ = ["RULES", "check_shapes", "factor_patterns", "match_parameters", "rearrange", "restore"]
__all__ += ["torch_name", "torch_region", "torch_shape"]

_VECTOR = "d -> d"
_TABLE = "v d -> v d"
_LINEAR = "o i -> i o"
_TO_HEADS = "(n h) d -> d n h"
_FROM_HEADS = "d (n h) -> n h d"


def _under(holder: str, patterns: Mapping[str, str]) -> dict[str, str]:
    return {f"{holder}/{name}": pattern for name, pattern in patterns.items()}


# Path of a parameter -> pattern; `{l}` is the number of a layer.
RULES: Mapping[str, str] = {
    "lm_head/kernel": _LINEAR,
    "linear/kernel": _LINEAR,  # of a retrieval model
    "linear/bias": _VECTOR,
    "model/connector/modality_projection/proj/kernel": _LINEAR,
    "model/text_model/embed_tokens/embedding": _TABLE,
    "model/text_model/norm/scale": _VECTOR,
    **_under(
        "model/text_model/layers_{l}",
        {
            **{f"{norm}_layernorm/scale": _VECTOR for norm in ("input", "post_attention")},
            **{f"self_attn/{name}_proj/kernel": _TO_HEADS for name in "qkv"},
            "self_attn/o_proj/kernel": _FROM_HEADS,
            **{f"mlp/{name}_proj/kernel": _LINEAR for name in ("gate", "up", "down")},
        },
    ),
    **_under(
        "model/vision_model",
        {
            "embeddings/patch_embedding/kernel": "d c p q -> p q c d",
            "embeddings/patch_embedding/bias": _VECTOR,
            "embeddings/position_embedding/embedding": _TABLE,
            "post_layernorm/scale": _VECTOR,
            "post_layernorm/bias": _VECTOR,
        },
    ),
    **_under(
        "model/vision_model/encoder/layers_{l}",
        {
            **{f"{norm}/{name}": _VECTOR for norm in ("layer_norm1", "layer_norm2") for name in ("scale", "bias")},
            **{f"self_attn/{name}_proj/kernel": _TO_HEADS for name in "qkv"},
            **{f"self_attn/{name}_proj/bias": "(n h) -> n h" for name in "qkv"},
            "self_attn/out_proj/kernel": _FROM_HEADS,
            "self_attn/out_proj/bias": _VECTOR,
            **{f"mlp/{name}/kernel": _LINEAR for name in ("fc1", "fc2")},
            **{f"mlp/{name}/bias": _VECTOR for name in ("fc1", "fc2")},
        },
    ),
}


@lru_cache
def _parse(pattern: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """ "(n h) d -> d n h" as ((("n", "h"), ("d",)), ("d", "n", "h"))."""
    left, right = pattern.split("->")
    groups = tuple(tuple((a or b).split()) for a, b in re.findall(r"\(([^)]*)\)|(\w+)", left))
    return groups, tuple(right.split())


def torch_shape(pattern: str, shape: Iterable[int]) -> tuple[int, ...]:
    """Shape of the PyTorch tensor that becomes a parameter of `shape`."""
    groups, ours = _parse(pattern)
    size = dict(zip(ours, shape, strict=True))
    return tuple(math.prod(size[name] for name in group) for group in groups)


def factor_patterns(pattern: str) -> tuple[str, str]:
    """The patterns of a kernel's low-rank factors, as PEFT shapes them.

    Args:
        pattern: of the kernel, whose first dimension in PyTorch is the output.

    Returns:
        Of A, (r, in) there and (in, r) here, and of B, (out, r) there and (r, out) here. B's further dimensions, of a
        convolution, are 1.
    """
    (first, *rest), ours = _parse(pattern)
    group = lambda names: f"({' '.join(names)})"
    inside, outside = ([name for name in ours if (name in first) == out] for out in (False, True))
    a = f"r {' '.join(map(group, rest))} -> {' '.join(inside)} r"
    return a, f"{group(first)} r {'()' * len(rest[1:])} -> r {' '.join(outside)}"


def rearrange(tensor: np.ndarray, pattern: str, shape: Iterable[int]) -> np.ndarray:
    """PyTorch tensor -> parameter of `shape`: a view wherever numpy can make one."""
    groups, ours = _parse(pattern)
    size = dict(zip(ours, shape, strict=True))
    flat = [name for group in groups for name in group]
    return tensor.reshape([size[name] for name in flat]).transpose([flat.index(name) for name in ours])


def restore(parameter: np.ndarray, pattern: str) -> np.ndarray:
    """Parameter -> PyTorch tensor, the inverse of `rearrange`."""
    groups, ours = _parse(pattern)
    flat = [name for group in groups for name in group]
    moved = parameter.transpose([ours.index(name) for name in flat])
    return moved.reshape(torch_shape(pattern, parameter.shape))


def torch_region(pattern: str, shape: Iterable[int], region: Region) -> tuple[Region, tuple[int, ...], Region]:
    """Which part of the PyTorch tensor holds a region of the parameter of `shape`.

    Returns:
        The slices of the PyTorch tensor, the shape of that part in our layout, and the region of the part that was asked for.
        The last is the whole part, except where the region cuts an inner dimension of a group, such as h of "(n h)": then the
        whole group is read.
    """
    groups, ours = _parse(pattern)
    size = dict(zip(ours, shape, strict=True))
    bounds = {name: (part.start, part.stop) for name, part in zip(ours, region, strict=True)}
    cut = {name: slice(0, stop - start) for name, (start, stop) in bounds.items()}
    slices = []
    for group in groups:
        if not group:  # a dimension of 1 that has no counterpart here
            slices.append(slice(0, 1))
            continue
        outer, *inner = group
        unit = math.prod(size[name] for name in inner)
        if all(bounds[name] == (0, size[name]) for name in inner):
            start, stop = bounds[outer]
            slices.append(slice(start * unit, stop * unit))
            continue
        for name in (outer, *inner):
            cut[name] = slice(*bounds[name])
            bounds[name] = (0, size[name])
        slices.append(slice(0, size[outer] * unit))
    part = tuple(bounds[name][1] - bounds[name][0] for name in ours)
    return tuple(slices), part, tuple(cut[name] for name in ours)


@dataclass(frozen=True)
class Match:
    """A parameter and the tensor it is made of, whose name `torch` is as the file spells it.

    The tensor may hold several parameters, one after the other along its first dimension: this one is `part` of `parts`.
    """

    path: str
    torch: str
    pattern: str
    part: int = 0
    parts: int = 1

    def torch_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """Shape of the tensor that holds the parameter of `shape`."""
        rows, *rest = torch_shape(self.pattern, shape)
        return (rows * self.parts, *rest)


@dataclass(frozen=True, kw_only=True)
class Names:
    """How checkpoints of another family name their tensors.

    Attributes:
        rows: path of a parameter, with `{l}` for the number of a layer -> a Match with the tensor's name in the same way.
            What has no row is named as in our checkpoints.
        prefix: what stands before every name.
        left_out: beginning of a name -> what such tensors are. They are no part of the model.
    """

    rows: Mapping[str, Match] = field(default_factory=dict)
    prefix: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)

    def match(self, path: str) -> Match:
        """The tensor of a parameter."""
        row = self.rows.get(re.sub(_LAYER, "/layers_{l}/", path))
        if row is None:
            name, pattern = torch_name(path)
            return Match(path, self.prefix + name, pattern)
        number = re.search(_LAYER, path)
        name = row.torch.replace("{l}", number.group(1) if number else "")
        return Match(path, self.prefix + name, row.pattern, row.part, row.parts)

    def of_model(self, tensors: Iterable[str]) -> list[str]:
        """The names that are not left out."""
        return [name for name in tensors if not name.startswith(tuple(self.left_out))]


_LAYER = r"/layers_(\d+)/"


def torch_name(path: str) -> tuple[str, str]:
    """What PyTorch calls a parameter.

    Args:
        path: of ours, such as "model/text_model/norm/scale".

    Returns:
        The PyTorch name, and the pattern by which the array is rearranged.

    Raises:
        CheckpointError: there is no such parameter.
    """
    pattern = RULES.get(re.sub(_LAYER, "/layers_{l}/", path))
    if pattern is None:
        raise CheckpointError(f"no rule converts the parameter {path}")
    name = re.sub(r"/(kernel|scale|embedding)$", "/weight", path)
    return re.sub(_LAYER, r"/layers/\1/", name).replace("/", "."), pattern


def match_parameters(
    parameters: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, tuple[int, ...]],
    where: str,
    names: Names | None = None,
) -> list[Match]:
    """Pair every parameter with its tensor; each tensor, or part of one, is used once and each parameter produced once.

    Args:
        parameters: our path -> shape.
        tensors: PyTorch name -> shape. A checkpoint of the base class, whose names lack the leading `model.`, is understood.
        where: the name of the checkpoint, for the message.
        names: of a checkpoint of another family.

    Raises:
        CheckpointError: one message for all tensors that are missing, surplus or of the wrong shape; it lists the first ten.
    """
    if names is not None:
        matches = [names.match(path) for path in parameters]
        tensors = {name: tensors[name] for name in names.of_model(tensors)}
    else:
        bare = not any(name.startswith("model.") for name in tensors)
        matches = [
            Match(path, name.removeprefix("model.") if bare else name, pattern) for path, (name, pattern) in _named(parameters)
        ]
    expected = {match.torch: match.torch_shape(parameters[match.path]) for match in matches}
    check_shapes(expected, tensors, where)
    return matches


def _named(paths: Iterable[str]) -> Iterable[tuple[str, tuple[str, str]]]:
    return ((path, torch_name(path)) for path in paths)


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise one CheckpointError for all names that only one of two tables has, or whose shapes differ, and list ten of them."""
    problems = [f"missing   {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"surplus   {name} {tuple(shape)}" for name, shape in found.items() if name not in expected]
    problems += [
        f"misshapen {name}: file has {tuple(found[name])}, config says {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        listed = "\n  ".join(first_few(sorted(problems)))
        raise CheckpointError(f"{where}: {len(problems)} tensors do not fit the config\n  {listed}")
