"""PEFT adapters (LoRA): the directory that `PeftModel.save_pretrained` writes, merged into its base as the base is read.

A kernel W, (out, in) in PyTorch's layout, becomes V = W + B A · alpha / r, computed in float32 and rounded once to W's dtype.
With DoRA (arXiv:2402.09353) each row of V is scaled to the length that the adapter holds for it. What it holds besides, such as
modules that were trained whole and biases, takes the place of the base's.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, first_few
from ..io import read_json
from ..locate import ADAPTER as CONFIG
from ..locate import named_base
from .leaves import Leaf, TorchLeaf, own
from .readers import TensorReader, checked_path
from .regions import Region
from .rules import Match, rearrange, restore, torch_name, torch_shape
from .safetensors_file import MAX_JSON, SafetensorsReader
from .torch_bin import BinReader

__all__ = ["CONFIG", "Adapter", "is_factor", "open_adapter"]

_FILES = {"adapter_model.safetensors": SafetensorsReader, "adapter_model.bin": BinReader}
_DEFAULTS = {"r": 8, "lora_alpha": 8}  # PEFT's
# Keys of the config that change what an adapter computes, and the values with which they change nothing.
_UNSUPPORTED: Mapping[str, tuple] = {
    "fan_in_fan_out": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None, {}),
    "use_bdlora": (False, None),
    "arrow_config": (None, {}),
}
# Ways to start, by name, that leave the base's weights alone. With others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) the adapter
# belongs to a base that nobody has.
_KEEPS_BASE = ("gaussian", "eva", "orthogonal")
_FACTOR = re.compile(r"(.+)\.lora_((?:embedding_)?[AB]|magnitude_vector)(?:\.default)?(?:\.weight)?")
_MAGNITUDE = "magnitude_vector"


@dataclass(kw_only=True)
class Adapter:
    """An open adapter.

    Attributes:
        path: its directory.
        base: the name of the model it belongs to, None if the config has none.
        revision: of the base.
        settings: adapter_config.json.
        reader: of its tensors.
        files: what is read.
    """

    path: Path
    base: str | None
    revision: str | None
    settings: Mapping[str, Any]
    reader: TensorReader
    files: list[Path] = field(default_factory=list)

    def merged(self, leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
        """The base's parameters with the adapter in them.

        Raises:
            CheckpointError: one message for all tensors of the adapter that have no place in the base.
        """
        by_name = {torch_name(path)[0]: path for path in leaves}
        merged, problems = dict(leaves), []
        twice = "the adapter has it twice"
        for name, shape in self.reader.shapes.items():
            if is_factor(name):
                continue
            path = _find(by_name, name.replace(".modules_to_save.default.", ".").replace(".base_layer.", "."))
            wanted = None if path is None else torch_shape(torch_name(path)[1], leaves[path].shape)
            if path is None or shape != wanted:
                problems.append(f"{name} {shape}: the base has " + (f"the shape {wanted}" if path else "no such parameter"))
                continue
            if merged[path] is not leaves[path]:
                problems.append(f"{name}: {twice}")
                continue
            match = Match(path, name, torch_name(path)[1])
            merged[path] = _As(TorchLeaf(match, leaves[path].shape, self.reader), leaves[path].dtype)
        adapted: set[str] = set()
        # after these: PEFT saves the table of an embedding, whole, beside its factors
        for module, factors in self._modules().items():
            path = _find(by_name, f"{module}.weight")
            try:
                if path is None:
                    raise ValueError("the base has no such parameter")
                by_part = dict(factors)
                if path in adapted or len(factors) > len(by_part):
                    raise ValueError(twice)
                adapted.add(path)
                self._check_parts(by_part)
                merged[path] = self._merged(merged[path], module, by_part)
            except ValueError as fault:
                problems.append(f"{module}: {fault}")
        if problems:
            listed = "\n  ".join(first_few(sorted(problems)))
            raise CheckpointError(f"{self.path}: {len(problems)} tensors of the adapter do not fit its base\n  {listed}")
        return merged

    def _check_parts(self, by_part: Mapping[str, str]) -> None:
        """Raises ValueError unless a module has both factors, and a magnitude if this is DoRA."""
        dora = bool(self.settings.get("use_dora"))
        missing = {"A", "B", *([_MAGNITUDE] if dora else [])} - set(by_part)
        if missing:
            raise ValueError(f"lora_{min(missing)} is missing")
        if _MAGNITUDE in by_part and not dora:
            raise ValueError(f"it has a lora_{_MAGNITUDE}, and {CONFIG} does not say use_dora")

    def _modules(self) -> dict[str, list[tuple[str, str]]]:
        """Module -> pairs of "A", "B" or _MAGNITUDE and the tensor's name."""
        modules: dict[str, list[tuple[str, str]]] = {}
        for name in self.reader.shapes:
            if found := _FACTOR.fullmatch(name):
                part = found.group(2).removeprefix("embedding_")
                modules.setdefault(found.group(1).removesuffix(".base_layer"), []).append((part, name))
        return modules

    def _merged(self, leaf: Leaf, module: str, by_part: Mapping[str, str]) -> Leaf:
        """Raises ValueError if the factors do not fit the parameter."""
        a, b, magnitude = by_part["A"], by_part["B"], by_part.get(_MAGNITUDE)
        pattern = torch_name(leaf.path)[1]
        shape = torch_shape(pattern, leaf.shape)
        turned = "lora_embedding_" in a  # an embedding's factors are those of its transpose
        if not self.reader.shapes[a] or not self.reader.shapes[b]:
            raise ValueError(f"A {self.reader.shapes[a]} and B {self.reader.shapes[b]} are no matrices")
        rank, inside = self.reader.shapes[a][0], math.prod(self.reader.shapes[a][1:])
        outside, inner = self.reader.shapes[b][0], math.prod(self.reader.shapes[b][1:])
        expected = (math.prod(shape[1:]), shape[0]) if turned else (shape[0], math.prod(shape[1:]))
        if inner != rank or (outside, inside) != expected:
            raise ValueError(f"A {self.reader.shapes[a]} and B {self.reader.shapes[b]} do not make {shape}")
        if self._of("rank_pattern", "r", module) != rank:
            raise ValueError(f"A has rank {rank}, {CONFIG} says {self._of('rank_pattern', 'r', module)}")
        if magnitude is not None and turned:
            raise ValueError("use_dora of an embedding is not supported")
        if magnitude is not None and math.prod(self.reader.shapes[magnitude]) != shape[0]:
            raise ValueError(f"its magnitude {self.reader.shapes[magnitude]} is not one number for each of {shape[0]} rows")
        alpha = self._of("alpha_pattern", "lora_alpha", module)
        scale = alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
        return _Merged(leaf, _Product(self.reader, a, b, magnitude, scale, turned, shape, pattern))

    def _of(self, patterns: str, key: str, module: str) -> float:
        """A module's rank or alpha: of the first pattern that it ends with, as PEFT looks for it, or the general one."""
        for name, value in (self.settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({name})$", module):
                return value
        return self.settings[key]


@dataclass(frozen=True)
class _Product:
    """B A · scale in a parameter's layout, computed when it is needed, and the lengths of its rows, if this is DoRA."""

    reader: TensorReader
    a: str
    b: str
    magnitude: str | None
    scale: float
    turned: bool
    shape: tuple[int, ...]
    pattern: str

    def add_to(self, parameter: np.ndarray) -> None:
        """Change a parameter in float32."""
        a, b = (self.reader.read(name).astype(np.float32) for name in (self.a, self.b))
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        product = (b @ a) * np.float32(self.scale)
        product = product.T if self.turned else product
        parameter += rearrange(product.reshape(self.shape), self.pattern, parameter.shape)
        if self.magnitude is not None:
            rows = restore(parameter, self.pattern).reshape(self.shape[0], -1)
            wanted = self.reader.read(self.magnitude).astype(np.float32).reshape(-1, 1)
            rows = rows * (wanted / np.linalg.norm(rows, axis=1, keepdims=True))
            parameter[...] = rearrange(rows.reshape(self.shape), self.pattern, parameter.shape)


class _Merged(Leaf):
    """A kernel with its adapter added, in the kernel's own dtype."""

    def __init__(self, base: Leaf, product: _Product):
        self.path, self.shape, self.dtype = base.path, base.shape, base.dtype
        self._base, self._product = base, product

    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        wide = self._base.read(dtype=np.dtype(np.float32))
        self._product.add_to(wide)
        found = own(wide, self.dtype)  # rounded to the dtype of the weights first, whatever is asked for
        return own(found[... if region is None else region], dtype)


class _As(Leaf):
    """A parameter in another dtype."""

    def __init__(self, leaf: Leaf, dtype: np.dtype):
        self.path, self.shape, self.dtype = leaf.path, leaf.shape, dtype
        self._leaf = leaf

    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        found = self._leaf.read(region, self.dtype)
        return found if dtype is None else own(found, dtype)


def _find(by_name: Mapping[str, str], name: str) -> str | None:
    """The parameter with a tensor's name, which lacks the leading `model.` if the adapter was made for the base class."""
    return by_name.get(name) or by_name.get(f"model.{name}")


def is_factor(name: str) -> bool:
    """Whether a tensor is a part of an adapter."""
    return _FACTOR.fullmatch(name) is not None


def open_adapter(directory: Path) -> Adapter | None:
    """The adapter in a directory, None if it holds no adapter.

    Raises:
        CheckpointError: it is damaged, of a kind that is not supported, or beside the weights of a whole model.
    """
    present = [name for name in _FILES if (directory / name).exists()]
    if not (directory / CONFIG).exists():
        if present and not any(path.name not in _FILES for path in directory.glob("*.safetensors")):
            raise CheckpointError(f"{directory} has {present[0]}, an adapter, without its {CONFIG}")
        return None
    whole = [path.name for pattern in ("*.safetensors", "pytorch_model*.bin") for path in directory.glob(pattern)]
    whole = sorted(name for name in whole if name not in _FILES)
    if whole:
        raise CheckpointError(
            f"{directory} has an adapter ({CONFIG}) beside the weights of a whole model ({whole[0]}): "
            "remove what is not meant to be read"
        )
    if not present:
        raise CheckpointError(f"{directory} has {CONFIG}, but no {' or '.join(_FILES)}")
    path = checked_path(directory, CONFIG)
    settings = _DEFAULTS | read_json(path, what="the config of a PEFT adapter", unique_keys=True, limit=MAX_JSON)
    _check(path, settings)
    base, revision = named_base(path, settings)
    reader = _FILES[present[0]]([checked_path(directory, present[0])])
    return Adapter(
        path=directory,
        base=base,
        revision=revision,
        settings=settings,
        reader=reader,
        files=[*reader.files, path],
    )


def _check(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a config whose adapter would be merged wrongly."""
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {settings.get('peft_type')!r:.80} is not supported, only LORA is")
    for key, neutral in _UNSUPPORTED.items():
        if settings.get(key) not in neutral:
            raise CheckpointError(
                f"{path}: {key} = {settings[key]!r:.80} is not supported: merge the adapter with PEFT (merge_and_unload) and "
                "save the model"
            )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in (*_KEEPS_BASE, "true", "false"):
        raise CheckpointError(
            f"{path}: init_lora_weights = {start!r:.80} may have changed the weights of the base as well: merge the adapter "
            "with PEFT (merge_and_unload) and save the model"
        )
    for key in ("r", "lora_alpha"):
        if not number(settings.get(key)):
            raise CheckpointError(f"{path}: {key} = {settings.get(key)!r:.80} is not a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        if not isinstance(patterns, dict) or not all(number(value) for value in patterns.values()):
            raise CheckpointError(f"{path}: {key} is not a mapping from names of modules to positive numbers")
        if odd := [name for name in patterns if not re.fullmatch(r"\^?[\w.]+", name)]:
            raise CheckpointError(
                f"{path}: {key} has {odd[0]!r:.80}: only names of modules are supported, no regular expressions"
            )
