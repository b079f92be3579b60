"""`TrainConfig`: all settings of a training run, from a recipe (YAML) and `key=value` words or from Python."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError, ConfigError, InputError
from ..media_options import PictureOptions, from_mapping

__all__ = [
    "IGNORE",
    "DataConfig",
    "DataSource",
    "EvaluationConfig",
    "LoraConfig",
    "MeshConfig",
    "TrainConfig",
    "from_dict",
    "require_same",
    "to_dict",
]

PARTS = ("vision", "connector", "text")
# The label of a token that is not learned, as in PyTorch and transformers.
IGNORE = -100


@dataclass(frozen=True)
class DataSource:
    """Conversations from one place.

    Attributes:
        path: a file (.jsonl, .json, .csv, .tsv, .tar, .parquet, .arrow; .gz, .bz2, .xz or .zst may follow), a directory of such
            files, one that `Dataset.save_to_disk` wrote, or the Hub id of a dataset (owner/name).
        weight: how often it is drawn from, against the other sources of the mixture.
        limit: use only its first so many records.
        split: which of its splits, where it has several.
        name: which of its configurations, for a dataset of the Hub that has several.
        columns: pairs (our name of a column, its name in the data); "unused" is our name for one that is not to be read.
    """

    path: str
    weight: float = 1.0
    limit: int | None = None
    split: str = "train"
    name: str | None = None
    columns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        _positive(f"source {self.path}: ", self, "weight", "limit")
        _columns(f"source {self.path}: ", self.columns)


@dataclass(frozen=True)
class DataConfig:
    """The data of a run, and how it becomes batches.

    Attributes:
        train: the mixture.
        length: tokens of a row.
        batch_size: rows of one batch over all devices.
        packing: put several conversations into a row.
        tiles_per_row: room for tiles in a row; default: as many as a row of image tokens could hold.
        too_long: "skip" a sample that does not fit, or "drop_pictures", whole ones from the end, until it does.
        loss_on: "assistant" turns, the "last" of them, or "all" words; never image tokens or padding.
        shuffle: anew in each pass; otherwise the records keep their order.
        workers: processes that read pictures (0: threads).
        window_rows: rows that are planned together when packing.
        special_tokens_in_text: see `apply_chat_template`.
        image_options: fields of `PictureOptions`: how pictures and videos are read, such as max_tiles or num_frames.
    """

    train: tuple[DataSource, ...] = ()
    length: int = 2048
    batch_size: int = 8
    packing: bool = True
    tiles_per_row: int | None = None
    too_long: str = "skip"
    loss_on: str = "assistant"
    shuffle: bool = True
    workers: int = 0
    window_rows: int = 4
    special_tokens_in_text: str = "escape"
    image_options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        _choice("data.too_long", self.too_long, ("skip", "drop_pictures"))
        _choice("data.loss_on", self.loss_on, ("assistant", "last", "all"))
        _choice("data.special_tokens_in_text", self.special_tokens_in_text, ("escape", "error", "allow"))
        _positive("data.", self, "length", "batch_size", "window_rows")
        _ = self.pictures
        if self.workers < 0 or (self.tiles_per_row is not None and self.tiles_per_row < 0):
            raise ConfigError("data.workers and data.tiles_per_row cannot be negative")

    @property
    def pictures(self) -> PictureOptions:
        """`image_options`. Raises ConfigError for one that does not exist, and for a value of the wrong type."""
        try:
            return from_mapping(dict(self.image_options))
        except InputError as error:
            raise ConfigError(f"data.image_options: {error}") from error


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: y = x W + (alpha / rank) · x A B, with A random and B zero at first.

    Attributes:
        rank: of A B.
        alpha: see above.
        targets: a regular expression that a projection's whole path matches, such as "text_model/.*/(q|v)_proj"; the paths are
            those of the parameter tree without "model/" in front and "/kernel" behind.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = r"text_model/.*_proj"

    def __post_init__(self):
        _positive("lora.", self, "rank", "alpha")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class MeshConfig:
    """The mesh.

    Attributes:
        data: size of the axis; -1 takes the devices that are left.
        fsdp: likewise.
        tensor: likewise.
        devices: use only the first so many.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    devices: int | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out conversations; the last assistant turn of each is the wanted answer.

    Attributes:
        path: as `DataSource.path`.
        split: which of its splits, where it has several; default: validation, or else test.
        every: steps between evaluations, besides the one at the end (0: only that).
        samples: use the first so many.
        batch_size: rows generated together.
        max_new_tokens: room for an answer.
        show: samples on the page of examples.
        columns: as `DataSource.columns`.
    """

    path: str
    split: str | None = None
    every: int = 0
    samples: int = 500
    batch_size: int = 16
    max_new_tokens: int = 64
    show: int = 50
    columns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        _positive("evaluation.", self, "samples", "batch_size", "max_new_tokens")
        _between("evaluation.", self, 0, math.inf, "every", "show")
        _columns("evaluation.", self.columns)


@dataclass(frozen=True)
class TrainConfig:
    """Model, data, optimiser, schedule, length and bookkeeping of a run.

    Attributes:
        steps: of the whole run.
        learning_rate: the peak; it rises linearly over the warm-up and then follows `schedule`.
        warmup_steps: length of the warm-up.
        warmup_fraction: the same as a share of all steps, instead.
        schedule: "cosine" or "linear" down to `final_fraction` of the peak, or "constant".
        final_fraction: see there.
        restarts: further cycles of the same form, as (first step, peak); the first cycle then ends where the second begins.
        learning_rates: peaks of the parts vision, connector, text; 0 freezes. A part that is not named has `learning_rate`;
            under LoRA it is frozen, and the adapters have `learning_rate`.
        weight_decay: of matrices.
        beta1: of AdamW.
        beta2: of AdamW.
        epsilon: of AdamW.
        clip_norm: largest norm of the gradient.
        accumulation: batches that make one step.
        remat: "none", "full" (recompute each layer in the backward pass), "dots" (keep the results of matrix products).
        attention: "auto", or the form of attention to use wherever it fits; "einsum" does without the kernels for TPUs.
        scan_layers: layers in a loop instead of one after the other: for accelerators, where a step then needs less memory and
            compiles in a fraction of the time.
        tile_chunk: tiles that one device encodes at a time; default: all.
        loss_chunk: tokens of one device whose logits exist at a time.
        seed: of everything random.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints.
        keep: how many of the newest checkpoints are kept, besides the best by evaluation.
        model: what to start from: a bundled name, a directory or a Hub id.
        weights: "checkpoint", or "random" to start from random weights of this checkpoint's shape, with its tokenizer and
            processor.
        output: the run's directory.
        dtype: of the computation, "float32" or "bfloat16"; default: bfloat16, on CPU float32.
        param_dtype: of the weights that are trained and of their gradients.
        frozen_dtype: of the frozen base under LoRA; default: `dtype`.
        data: the training data.
        lora: adapters.
        mesh: the devices.
        evaluation: held-out data.
        loggers: "tensorboard" besides metrics.jsonl.
        distributed: this is one process of a jax job.
        topology: the accelerators that a recipe is meant for, such as "v5e:2x4"; `memory` compiles for them, a run ignores it.
        export: write OUTPUT/model at the end, in Hugging Face format, adapters merged.
    """

    steps: int
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    warmup_fraction: float | None = None
    schedule: str = "cosine"
    final_fraction: float = 0.0
    restarts: tuple[tuple[int, float], ...] = ()
    learning_rates: tuple[tuple[str, float], ...] = ()
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    accumulation: int = 1
    remat: str = "none"
    scan_layers: bool = False
    attention: str = "auto"
    tile_chunk: int | None = None
    loss_chunk: int = 256
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 500
    keep: int = 2
    model: str = "tiny"
    weights: str = "checkpoint"
    output: str = "runs/train"
    dtype: str | None = None
    param_dtype: str = "float32"
    frozen_dtype: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvaluationConfig | None = None
    loggers: tuple[str, ...] = ()
    distributed: bool = False
    topology: str | None = None
    export: bool = True

    def __post_init__(self):
        _positive("", self, "steps", "learning_rate", "checkpoint_every", "accumulation", "loss_chunk", "tile_chunk")
        _positive("", self, "log_every", "keep", "epsilon")
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm must be positive, not {self.clip_norm!r}")
        _between("", self, 0, math.inf, "weight_decay", "warmup_steps", "warmup_fraction", "final_fraction")
        _between("", self, 0, 1, "beta1", "beta2")
        _between("", self, 0, 2**31, "seed", "steps")
        starts = [0, *(start for start, _ in self.restarts)]
        if starts != sorted(set(starts)):
            raise ConfigError(f"restarts must come in order, each after step 0: {self.restarts}")
        if not all(0 < peak < math.inf for _, peak in self.restarts):
            raise ConfigError(f"the peaks of restarts must be positive and finite: {self.restarts}")
        _choice("schedule", self.schedule, ("cosine", "linear", "constant"))
        _choice("weights", self.weights, ("checkpoint", "random"))
        _choice("remat", self.remat, ("none", "full", "dots"))
        for name in ("dtype", "param_dtype", "frozen_dtype"):
            # Not float16: gradients and the encoder's activations exceed its range.
            if getattr(self, name) not in (None, "float32", "bfloat16") or (name == "param_dtype" and self.param_dtype is None):
                raise ConfigError(f"{name} must be float32 or bfloat16, not {getattr(self, name)!r}")
        for part, rate in self.learning_rates:
            _choice("a key of learning_rates", part, PARTS)
            if not 0 <= rate < math.inf:
                raise ConfigError(f"the learning rate of {part} is {rate!r}: it cannot be negative, nor without end")
        if self.lora is not None and self.weights == "random":
            raise ConfigError("lora adapts the weights of a checkpoint: with weights random train everything, without lora")
        for logger in self.loggers:
            _choice("an entry of loggers", logger, ("tensorboard",))

    def peak(self, part: str) -> float:
        """The peak learning rate of vision, connector, text or lora; 0 where it is frozen."""
        rates = dict(self.learning_rates)
        if part == "lora":
            return self.learning_rate
        return rates.get(part, 0.0 if self.lora is not None else self.learning_rate)

    @property
    def warmup(self) -> int:
        """Steps of the warm-up."""
        return self.warmup_steps if self.warmup_fraction is None else max(1, round(self.warmup_fraction * self.steps))


def _columns(where: str, columns: tuple[tuple[str, str], ...]) -> None:
    if not columns:
        return
    from ..records.columns import LEARNED  # late: the command line starts without numpy

    for name, column in columns:
        if name not in LEARNED or not column:
            raise ConfigError(f"{where}columns gives {column!r} the name {name!r}; names are {', '.join(LEARNED)}")


def _positive(where: str, config: Any, *names: str) -> None:
    """Raise ConfigError unless these fields are positive, or None. where: prefix of their names in the message."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{where}{name} must be positive and finite, not {value!r}")


def _between(where: str, config: Any, low: float, high: float, *names: str) -> None:
    """Raise ConfigError unless low <= field < high, or the field is None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value < high:
            limit = "" if high == math.inf else f" and less than {high}"
            raise ConfigError(f"{where}{name} must be at least {low}{limit}, not {value!r}")


def _choice(name: str, value, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; the choices are {', '.join(choices)}")


def require_same(what: str, before: Mapping[str, Any], now: Mapping[str, Any], *names: str) -> None:
    """Raise CheckpointError unless a run continues with the values of these keys that `what` was made with."""
    for name in names:
        if before.get(name) != now[name]:
            raise CheckpointError(
                f"{what} has {name} {before.get(name)!r}, but now it is {now[name]!r}: continue with the same, or choose "
                "another output directory"
            )


def to_dict(config) -> dict[str, Any]:
    """A config as plain data, which `from_dict` reads."""
    pairs = ("learning_rates", "image_options")
    plain = lambda items: {name: dict(value) if name in pairs else value for name, value in items}
    return json.loads(json.dumps(dataclasses.asdict(config, dict_factory=plain)))  # lists in place of tuples, as in a file


def from_dict(data: Mapping[str, Any], cls=TrainConfig, where: str = "") -> Any:
    """A config from plain data.

    Args:
        data: keys and values.
        cls: the dataclass to make.
        where: prefix of keys in messages.

    Raises:
        ConfigError: a key is unknown, missing or of the wrong type; the message names it and the keys that are known.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where.rstrip('.') or 'a recipe'} must be a mapping of keys to values, not {data!r}")
    hints = typing.get_type_hints(cls)
    known = {entry.name: entry for entry in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            raise ConfigError(f"unknown key {where}{key!s}; known are {', '.join(known)}")
    values = {key: _convert(value, hints[key], f"{where}{key}") for key, value in data.items()}
    required = [n for n, e in known.items() if e.default is e.default_factory is dataclasses.MISSING]
    missing = [f"{where}{name}" for name in required if name not in values]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)}")
    return cls(**values)


def _convert(value, kind, where: str):
    """A value converted to its field's type: YAML 1.1 reads 5e-6 as a string, and one path may stand for a list of sources."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if kind in (DataSource, EvaluationConfig) and isinstance(value, str):
            value = {"path": value}
        return value if isinstance(value, kind) else from_dict(value, kind, f"{where}.")
    if typing.get_origin(kind) is tuple:
        return _convert_tuple(value, typing.get_args(kind), where)
    try:
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is int and not isinstance(value, bool):
            if isinstance(value, int):
                return value
            if float(value) == int(float(value)):
                return int(float(value))
        elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{where} is {value!r}; it needs a value of type {kind.__name__}")


def _convert_tuple(value, inner, where: str):
    sources = inner[0] is DataSource
    if isinstance(value, Mapping) and not sources:
        value = list(value.items())
    if isinstance(value, (str, Mapping)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} is {value!r}; it needs a {'path, or a list of sources' if sources else 'list'}")
    if typing.get_origin(inner[0]) is tuple:
        kinds = typing.get_args(inner[0])
        if not all(isinstance(v, (list, tuple)) and len(v) == len(kinds) for v in value):
            raise ConfigError(f"{where} is {value!r}; it needs groups of {len(kinds)} values")
        return tuple(tuple(x if k is Any else _convert(x, k, where) for x, k in zip(v, kinds, strict=True)) for v in value)
    return tuple(_convert(v, inner[0], f"{where}[{i}]") for i, v in enumerate(value))
