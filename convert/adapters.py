"""PEFT adapters (LoRA): the directory that `PeftModel.save_pretrained` writes, merged into its base as the base is read.

A kernel W, (out, in) in PyTorch's layout, becomes V = W + B A · alpha / r, computed in float32 and rounded once to W's dtype.
With DoRA (arXiv:2402.09353) each row of V is scaled to the length that the adapter holds for it. A bias of B is added to the
module's in the same way. Its other tensors, such as modules that were trained as a whole, rows of a table and biases, replace
those of the base.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import CheckpointError, first_few
from ..io import read_json
from ..locate import ADAPTER as CONFIG
from ..locate import named_base
from .adapter_patterns import bounded
from .leaves import Leaf, TorchLeaf, own
from .readers import TensorReader, checked_path
from .regions import Region
from .rules import Match, rearrange, restore, torch_name, torch_shape
from .safetensors_file import MAX_JSON, SafetensorsReader
from .torch_bin import BinReader

__all__ = ["CONFIG", "Adapter", "is_part", "open_adapter"]

_FILES = {"adapter_model.safetensors": SafetensorsReader, "adapter_model.bin": BinReader}
_DEFAULTS = {"r": 8, "lora_alpha": 8}  # PEFT's
# Keys of the config that change what an adapter computes, and the values with which they change nothing.
_UNSUPPORTED: Mapping[str, tuple] = {
    "fan_in_fan_out": (False, None),
    "use_qalora": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None, {}),
    "use_bdlora": (False, None),
    "arrow_config": (None, {}),
}
# Ways to start, by name, that leave the base's weights alone. With others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) the adapter
# belongs to a base that is not available.
_KEEPS_BASE = ("gaussian", "eva", "orthogonal")
_FACTOR = re.compile(
    r"(.+)\.lora_(?:((?:embedding_)?[AB]|magnitude_vector)(?:\.default)?(?:\.weight)?|B(?:\.default)?\.(bias))"
)
_MAGNITUDE, _BIAS = "magnitude_vector", "bias"
_INDICES = "trainable_token_indices"
_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")


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
            if is_part(name):
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
                merged[path] = _Changed(merged[path], self._product(merged[path], module, by_part))
                if _BIAS in by_part:
                    bias = _find(by_name, f"{module}.bias")
                    if bias is None:
                        raise ValueError("lora_bias: the base has no bias there")
                    merged[bias] = _Changed(merged[bias], self._bias(merged[bias], module, by_part))
            except ValueError as fault:
                problems.append(f"{module}: {fault}")
        rows = [found for name in self.reader.shapes if (found := _ROWS.fullmatch(name))]
        if self.settings.get(_INDICES) and not rows:
            problems.append(f"{CONFIG} says {_INDICES}, and there are no such rows")
        for found in rows:
            name, module = found.group(0), found.group(1)
            path = _find(by_name, f"{module}.weight")
            try:
                if path is None:
                    raise ValueError("the base has no such parameter")
                if path in adapted:
                    raise ValueError(twice)
                adapted.add(path)
                merged[path] = _Changed(merged[path], self._rows(merged[path], module, name))
            except ValueError as fault:
                problems.append(f"{name}: {fault}")
        if problems:
            listed = "\n  ".join(first_few(sorted(problems)))
            raise CheckpointError(f"{self.path}: {len(problems)} tensors of the adapter do not fit its base\n  {listed}")
        return merged

    def _check_parts(self, by_part: Mapping[str, str]) -> None:
        """Raises ValueError unless a module has both factors, and a magnitude or a bias where the config says so."""
        for part in ("A", "B"):
            if part not in by_part:
                raise ValueError(f"lora_{part} is missing")
        for part, name, key in ((_MAGNITUDE, f"lora_{_MAGNITUDE}", "use_dora"), (_BIAS, "lora_B.bias", "lora_bias")):
            said = bool(self.settings.get(key))
            if said and part not in by_part:
                raise ValueError(f"{name} is missing, and {CONFIG} says {key}")
            if part in by_part and not said:
                raise ValueError(f"it has a {name}, and {CONFIG} does not say {key}")

    def _modules(self) -> dict[str, list[tuple[str, str]]]:
        """Module -> pairs of "A", "B", _MAGNITUDE or _BIAS and the tensor's name."""
        modules: dict[str, list[tuple[str, str]]] = {}
        for name in self.reader.shapes:
            if found := _FACTOR.fullmatch(name):
                part = (found.group(2) or found.group(3)).removeprefix("embedding_")
                modules.setdefault(found.group(1).removesuffix(".base_layer"), []).append((part, name))
        return modules

    def _product(self, leaf: Leaf, module: str, by_part: Mapping[str, str]) -> "_Product":
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
        return _Product(self.reader, a, b, magnitude, self._scale(module), turned, shape, pattern)

    def _bias(self, leaf: Leaf, module: str, by_part: Mapping[str, str]) -> "_Bias":
        """Raises ValueError if the bias of B does not fit the module's."""
        name, pattern = by_part[_BIAS], torch_name(leaf.path)[1]
        if self.reader.shapes[name] != torch_shape(pattern, leaf.shape):
            raise ValueError(f"lora_B.bias {self.reader.shapes[name]} does not fit {torch_shape(pattern, leaf.shape)}")
        return _Bias(self.reader, name, self._scale(module), pattern)

    def _rows(self, leaf: Leaf, module: str, name: str) -> "_Rows":
        """Raises ValueError if the config does not say which rows of the table these are."""
        given = self.settings.get(_INDICES)
        if isinstance(given, Mapping):
            given = next((rows for end, rows in given.items() if f".{module}".endswith(f".{end}")), None)
        pattern = torch_name(leaf.path)[1]
        size, *width = torch_shape(pattern, leaf.shape)
        rows = given if isinstance(given, list) and all(type(row) is int and 0 <= row < size for row in given) else []
        if not rows or len(set(rows)) < len(rows):
            raise ValueError(f"{_INDICES} of {CONFIG} is no list of different rows of {size}")
        if self.reader.shapes[name] != (len(rows), *width):
            raise ValueError(f"it has the shape {self.reader.shapes[name]}, {_INDICES} says {(len(rows), *width)}")
        return _Rows(self.reader, name, tuple(rows), pattern)

    def _scale(self, module: str) -> float:
        rank = self._of("rank_pattern", "r", module)
        return self._of("alpha_pattern", "lora_alpha", module) / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _of(self, patterns: str, key: str, module: str) -> float:
        """A module's rank or alpha: of the first pattern that it ends with, as PEFT looks for it, or the general one."""
        for name, value in (self.settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({name})$", module):
                return value
        return self.settings[key]


class _Change(Protocol):
    """What an adapter does to a parameter."""

    def apply(self, parameter: np.ndarray) -> None:
        """Change a parameter, float32, in place."""


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

    def apply(self, parameter: np.ndarray) -> None:
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


@dataclass(frozen=True)
class _Bias:
    """The bias of B · scale, added to the module's."""

    reader: TensorReader
    name: str
    scale: float
    pattern: str

    def apply(self, parameter: np.ndarray) -> None:
        bias = self.reader.read(self.name).astype(np.float32) * np.float32(self.scale)
        parameter += rearrange(bias, self.pattern, parameter.shape)


@dataclass(frozen=True)
class _Rows:
    """Rows of a table that were trained, in place of the base's."""

    reader: TensorReader
    name: str
    rows: tuple[int, ...]
    pattern: str

    def apply(self, parameter: np.ndarray) -> None:
        table = restore(parameter, self.pattern)
        table[list(self.rows)] = self.reader.read(self.name).astype(np.float32)
        parameter[...] = rearrange(table, self.pattern, parameter.shape)


class _Changed(Leaf):
    """A parameter as the adapter changes it, in its own dtype."""

    def __init__(self, base: Leaf, change: _Change):
        self.path, self.shape, self.dtype = base.path, base.shape, base.dtype
        self._base, self._change = base, change

    def read(self, region: Region | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        wide = self._base.read(dtype=np.dtype(np.float32))
        self._change.apply(wide)
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


def is_part(name: str) -> bool:
    """Whether a tensor is one of an adapter's own, and none of a model."""
    return bool(_FACTOR.fullmatch(name) or _ROWS.fullmatch(name))


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
        if not bounded(patterns):
            odd = next((name for name in patterns if not bounded([name])), next(iter(patterns)))
            raise CheckpointError(
                f"{path}: {key} has {odd!r:.80}: of regular expressions only characters, classes of them, their repetitions, "
                "groups and | are supported, and as many as a name is matched with quickly"
            )
