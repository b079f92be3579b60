"""THE table: each PyTorch tensor name, our parameter path, and the rearrangement between them. Both directions read it.

A pattern names the dimensions of the PyTorch tensor on the left and ours on the right, in the library's alphabet; a group in
parentheses is one dimension there and several here. PyTorch linear weights are (out, in), ours (in, out) with heads apart.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..errors import CheckpointError

__all__ = ["RULES", "Match", "Rule", "Region", "match_parameters", "rearrange", "restore", "torch_name", "torch_region"]

Region = tuple[slice, ...]  # one slice with explicit start and stop per dimension


@dataclass(frozen=True)
class Rule:
    """One row: `{l}` stands for a layer number on both sides."""

    torch: str
    path: str
    pattern: str


def _layer(prefix: str, path: str, rows: Iterable[tuple[str, str, str]]) -> list[Rule]:
    return [Rule(f"{prefix}.{torch}", f"{path}/{ours}", pattern) for torch, ours, pattern in rows]


_SAME = "d -> d"
_LINEAR = "o i -> i o"

RULES: tuple[Rule, ...] = (
    Rule("lm_head.weight", "lm_head/kernel", _LINEAR),
    Rule("model.connector.modality_projection.proj.weight", "model/connector/modality_projection/proj/kernel", _LINEAR),
    Rule("model.text_model.embed_tokens.weight", "model/text_model/embed_tokens/embedding", "v d -> v d"),
    Rule("model.text_model.norm.weight", "model/text_model/norm/scale", _SAME),
    *_layer(
        "model.text_model.layers.{l}",
        "model/text_model/layers_{l}",
        [
            ("input_layernorm.weight", "input_layernorm/scale", _SAME),
            ("post_attention_layernorm.weight", "post_attention_layernorm/scale", _SAME),
            ("self_attn.q_proj.weight", "self_attn/q_proj/kernel", "(n h) d -> d n h"),
            ("self_attn.k_proj.weight", "self_attn/k_proj/kernel", "(k h) d -> d k h"),
            ("self_attn.v_proj.weight", "self_attn/v_proj/kernel", "(k h) d -> d k h"),
            ("self_attn.o_proj.weight", "self_attn/o_proj/kernel", "d (n h) -> n h d"),
            ("mlp.gate_proj.weight", "mlp/gate_proj/kernel", _LINEAR),
            ("mlp.up_proj.weight", "mlp/up_proj/kernel", _LINEAR),
            ("mlp.down_proj.weight", "mlp/down_proj/kernel", _LINEAR),
        ],
    ),
    *_layer(
        "model.vision_model",
        "model/vision_model",
        [
            ("embeddings.patch_embedding.weight", "embeddings/patch_embedding/kernel", "d c p q -> p q c d"),
            ("embeddings.patch_embedding.bias", "embeddings/patch_embedding/bias", _SAME),
            ("embeddings.position_embedding.weight", "embeddings/position_embedding/embedding", "p d -> p d"),
            ("post_layernorm.weight", "post_layernorm/scale", _SAME),
            ("post_layernorm.bias", "post_layernorm/bias", _SAME),
        ],
    ),
    *_layer(
        "model.vision_model.encoder.layers.{l}",
        "model/vision_model/encoder/layers_{l}",
        [
            ("layer_norm1.weight", "layer_norm1/scale", _SAME),
            ("layer_norm1.bias", "layer_norm1/bias", _SAME),
            ("layer_norm2.weight", "layer_norm2/scale", _SAME),
            ("layer_norm2.bias", "layer_norm2/bias", _SAME),
            *(
                row
                for name in ("q_proj", "k_proj", "v_proj")
                for row in (
                    (f"self_attn.{name}.weight", f"self_attn/{name}/kernel", "(n h) d -> d n h"),
                    (f"self_attn.{name}.bias", f"self_attn/{name}/bias", "(n h) -> n h"),
                )
            ),
            ("self_attn.out_proj.weight", "self_attn/out_proj/kernel", "d (n h) -> n h d"),
            ("self_attn.out_proj.bias", "self_attn/out_proj/bias", _SAME),
            ("mlp.fc1.weight", "mlp/fc1/kernel", _LINEAR),
            ("mlp.fc1.bias", "mlp/fc1/bias", _SAME),
            ("mlp.fc2.weight", "mlp/fc2/kernel", _LINEAR),
            ("mlp.fc2.bias", "mlp/fc2/bias", _SAME),
        ],
    ),
)


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

    Returns (slices of the PyTorch tensor, shape of that part in our layout, region to cut out of it). The third covers the
    part wholly, except where a region cuts the inner dimension of a group, such as h of "(n h)": then the whole group is read.
    """
    groups, ours = _parse(pattern)
    size = dict(zip(ours, shape, strict=True))
    bounds = {name: (part.start, part.stop) for name, part in zip(ours, region, strict=True)}
    cut = {name: slice(0, stop - start) for name, (start, stop) in bounds.items()}
    slices = []
    for outer, *inner in groups:
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
    """A parameter and the tensor it comes from: `torch` is the name as the file spells it."""

    path: str
    torch: str
    pattern: str


def torch_name(path: str) -> tuple[str, str]:
    """The PyTorch name and pattern of one of our paths."""
    for rule in RULES:
        found = re.fullmatch(re.escape(rule.path).replace(r"\{l\}", r"(\d+)"), path)
        if found:
            return rule.torch.format(l=found.group(1) if found.groups() else ""), rule.pattern
    raise CheckpointError(f"no rule converts the parameter {path}")


def match_parameters(
    parameters: Mapping[str, tuple[int, ...]], tensors: Mapping[str, tuple[int, ...]], where: str
) -> list[Match]:
    """Pair every parameter with its tensor; each tensor is used once and each parameter produced once.

    `parameters` and `tensors` map names to shapes. A base-model file, whose names lack the leading `model.`, is understood.
    Raises one CheckpointError that lists everything missing, surplus or of the wrong shape.
    """
    bare = not any(name.startswith("model.") for name in tensors)
    spelled = {("model." + name if bare and name != "lm_head.weight" else name): name for name in tensors}
    problems, matches, used = [], [], set()
    for path, shape in parameters.items():
        name, pattern = torch_name(path)
        expected = torch_shape(pattern, shape)
        if name not in spelled:
            problems.append(f"missing   {name} {expected}")
            continue
        used.add(name)
        found = tuple(tensors[spelled[name]])
        if found != expected:
            problems.append(f"misshapen {name}: file has {found}, config says {expected}")
        matches.append(Match(path, spelled[name], pattern))
    problems += [f"surplus   {spelled[name]} {tuple(tensors[spelled[name]])}" for name in sorted(set(spelled) - used)]
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} tensors do not fit the config\n  " + "\n  ".join(sorted(problems)))
    return matches
