"""`TrainConfig`: all settings of a training run. bounds.py says what its numbers may be, plain.py how a recipe becomes one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..dtypes import name_fields
from ..errors import ConfigError, InputError
from ..field_types import check_types
from ..habits import named_arguments
from ..media_options import PictureOptions, from_mapping
from .bounds import RATE, STEP, check_products, check_range, check_ranges, shown

__all__ = [
    "IGNORE",
    "DataConfig",
    "DataSource",
    "EvaluationConfig",
    "LoraConfig",
    "MeshConfig",
    "TrainConfig",
]

INT8 = "int8"
_COMPUTED = ("float32", "bfloat16")  # not float16: gradients and the encoder's activations exceed its range
PARTS = ("vision", "connector", "text")
# The label of a token that is not learned, as in PyTorch and transformers.
IGNORE = -100


@named_arguments
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
        columns: pairs (our name of a column, its name in the data); "unused" is our name for one that is not to be read, and
            "answers.0" or "answers.text.0" the name of a part of a column that holds lists or objects.
    """

    path: str
    weight: float = 1.0
    limit: int | None = None
    split: str = "train"
    name: str | None = None
    columns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        check_types(self)
        _named("the path of a source", self.path)
        check_ranges(f"source {self.path}: ", self)
        _columns(f"source {self.path}: ", self.columns)


@named_arguments
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
        check_types(self)
        _choice("data.too_long", self.too_long, ("skip", "drop_pictures"))
        _choice("data.loss_on", self.loss_on, ("assistant", "last", "all"))
        _choice("data.special_tokens_in_text", self.special_tokens_in_text, ("escape", "error", "allow"))
        check_ranges("data.", self)
        _ = self.pictures

    @property
    def pictures(self) -> PictureOptions:
        """`image_options`. Raises ConfigError for one that does not exist, and for a value of the wrong type."""
        try:
            return from_mapping(dict(self.image_options))
        except InputError as error:
            raise ConfigError(f"data.image_options: {error}") from error


@named_arguments
@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: y = x W + (alpha / rank) · x A B, with A random and B zero at first.

    Attributes:
        rank: of A B.
        alpha: see above.
        targets: names of projections, such as q_proj or [q_proj, v_proj], which are meant in encoder and decoder alike, or a
            regular expression that a projection's whole path matches, such as "text_model/.*/(q|v)_proj"; the paths are those
            of the parameter tree without "model/" in front and "/kernel" behind.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = r"text_model/.*_proj"

    def __post_init__(self):
        check_types(self)
        check_ranges("lora.", self)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@named_arguments
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

    def __post_init__(self):
        check_types(self)
        check_ranges("mesh.", self)


@named_arguments
@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out conversations: the loss on them, and answers to them, of which the last assistant turn is the wanted one.

    Attributes:
        path: as `DataSource.path`.
        split: which of its splits, where it has several; default: validation, or else test.
        every: steps between evaluations, besides the one at the end (0: only that).
        samples: use the first so many.
        batch_size: rows generated together.
        max_new_tokens: room for an answer.
        exact_match: whether the share of exact answers is measured; by default where the wanted answers are short: most of them
            have at most eight words. Of longer ones only those that are shown are generated.
        show: samples on the page of examples.
        columns: as `DataSource.columns`.
    """

    path: str
    split: str | None = None
    every: int = 0
    samples: int = 500
    batch_size: int = 16
    max_new_tokens: int = 64
    exact_match: bool | None = None
    show: int = 50
    columns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        check_types(self)
        _named("evaluation.path", self.path)
        check_ranges("evaluation.", self)
        _columns("evaluation.", self.columns)


@named_arguments
@dataclass(frozen=True)
class TrainConfig:
    """Model, data, optimiser, schedule, length and bookkeeping of a run.

    Attributes:
        steps: of the whole run.
        learning_rate: the peak; it rises linearly over the warm-up and then follows `schedule`.
        warmup_steps: length of the warm-up; of a run, or a cycle of `restarts`, of no more steps, one less than these.
        warmup_fraction: the same as a share of all steps, instead; warmup_steps does not count then.
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
        model: what to start from, which a run has to name: a bundled name, a directory, a Hub id, or a PEFT adapter, which is
            merged into the base that its config names.
        adapter: a PEFT adapter that is merged into `model` before the training.
        weights: "checkpoint", or "random" to start from random weights of this checkpoint's shape, with its tokenizer and
            processor.
        output: the run's directory.
        dtype: of the computation, "float32" or "bfloat16"; default: bfloat16, on CPU float32.
        param_dtype: of the weights that are trained and of their gradients.
        frozen_dtype: of the frozen base under LoRA, "int8" for matrices in 8 bits (QLoRA); default: `dtype`, or as it is stored
            where that is in 8 bits.
        data: the training data.
        lora: adapters.
        mesh: the devices.
        evaluation: held-out data.
        loggers: "tensorboard" besides metrics.jsonl.
        distributed: this is one process of a jax job.
        topology: the accelerators that a recipe is meant for, such as "v5e:2x4"; `plan` compiles for them, a run ignores it.
        export: write OUTPUT/model at the end, in Hugging Face format, adapters merged; and of a run with adapters these alone,
            in PEFT's format, as OUTPUT/adapter.
        check: compare the arrays that training starts from with their checksums; see `load`.
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
    model: str = ""
    adapter: str | None = None
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
    check: bool = False

    def __post_init__(self):
        name_fields(self, "dtype", "param_dtype", allowed=_COMPUTED, error=ConfigError)
        name_fields(self, "frozen_dtype", allowed=(*_COMPUTED, INT8), error=ConfigError)
        check_types(self)
        if self.model:
            _named("model", self.model)
        _named("output", self.output)
        check_ranges("", self)
        check_products(self)
        for number, (start, peak) in enumerate(self.restarts):
            check_range(f"restarts[{number}][0]", start, *STEP)
            check_range(f"restarts[{number}][1]", peak, *RATE)
        if self.warmup_fraction is not None and self.warmup_steps != TrainConfig.warmup_steps:
            raise ConfigError(
                f"warmup_steps {self.warmup_steps} and warmup_fraction {self.warmup_fraction} are both of the warm-up: "
                "leave one out"
            )
        starts = [0, *(start for start, _ in self.restarts)]
        if starts != sorted(set(starts)):
            raise ConfigError(f"restarts must come in order, each after step 0: {self.restarts}")
        _choice("schedule", self.schedule, ("cosine", "linear", "constant"))
        _choice("weights", self.weights, ("checkpoint", "random"))
        _choice("remat", self.remat, ("none", "full", "dots"))
        if self.frozen_dtype == INT8 and self.lora is None:
            raise ConfigError("frozen_dtype int8 is of the base that adapters are trained over: add lora, or leave it out")
        if len(dict(self.learning_rates)) < len(self.learning_rates):
            raise ConfigError(f"learning_rates names a part twice: {self.learning_rates}")
        for part, rate in self.learning_rates:
            _choice("a key of learning_rates", part, PARTS)
            check_range(f"learning_rates.{part}", rate, 0, RATE[1])
        if self.lora is not None and self.weights == "random":
            raise ConfigError("lora adapts the weights of a checkpoint: with weights random train everything, without lora")
        for logger in self.loggers:
            _choice("an entry of loggers", logger, ("tensorboard",))

    def peak(self, part: str) -> float:
        """The peak learning rate of a part.

        Args:
            part: "vision", "connector", "text" or "lora".

        Returns:
            The rate; 0 where the part is frozen.
        """
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


def _named(key: str, value: str) -> None:
    if not value.strip() or "\0" in value:  # an empty path would be the current directory
        raise ConfigError(f"{key} is {shown(value)}: it names nothing")


def _choice(name: str, value, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {shown(value)}; the choices are {', '.join(choices)}")
