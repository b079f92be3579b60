"""`BatchConfig`: everything that a batch job is told. Imports no jax."""

import os
from dataclasses import dataclass, field
from numbers import Real

from ..dtypes import name_fields
from ..errors import InputError
from ..field_types import check_types
from ..generation_config import SamplingParams
from ..habits import named_arguments
from ..media_options import PictureOptions
from .logprobs import LOGPROBS

__all__ = ["BatchConfig", "PictureOptions"]

# Of numbers, which nan is never within. The upper ends are far beyond any use, and within what the system can count.
_RANGES = {
    "max_error_rate": (0, 1),
    "record_timeout": (1e-3, 1e6),
    "record_memory": (2**20, 2**60),
    "workers": (0, 1024),
    "shard_size": (1, 10**9),
    "num_shards": (1, 10**9),
    "shard_index": (0, 10**9),
}


@named_arguments
@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """A batch job, as `run_batch` takes it.

    Attributes:
        input: JSONL, Parquet, or a directory or glob of pictures, videos and PDFs.
        output: Directory for the answers.
        model: Bundled name, directory, Hub id, or a PEFT adapter, which is merged into the base that its config names. Either
            this or `adapter` has to be given.
        adapter: A PEFT adapter that is merged into `model`; where that is None, into the base that its config names.
        check: Compare the arrays of the checkpoint with their checksums; see `load`.
        prompt: The question for records that bring none.
        sampling: How answers are continued. A record may set any of it for itself, and draws by a seed made of this one and
            its id.
        pictures: How pictures and videos become tiles, and what may be read for them.
        source: Kind of the input; by default recognised by its names.
        columns: Pairs (name of a record's key, its name in the input).
        format: "jsonl" or "parquet".
        keep: Names of columns of the input that the rows of answers have too; None: all that the job does not read.
        gallery: Write a page of the first answers with their pictures, OUTPUT/_gallery.html.
        logprobs: Columns with the log-probabilities of answers: "mean" for the mean and the least of an answer's tokens,
            "tokens" for those of all tokens too.
        shard_size: Records of a part of the output.
        num_shards: Number of hosts; by default as the launcher says, else 1.
        shard_index: Which of them this is, from 0.
        max_error_rate: Share of records with an error, from 0 to 1, up to which the job counts as successful.
        force: Move the output of another job aside and start afresh.
        quiet: Show no progress and no remarks.
        keep_special_tokens: Whether special tokens stay in the text; by default for checkpoints that write doctags.
        document: Form of the documents that are made of DocTags, one for each file of pages or pictures: "markdown", "html",
            "json" or "doctags"; None: none are made.
        workers: Processes that prepare records, by default one per core, less one; 0 prepares in the calling process.
        record_timeout: Seconds to prepare one record.
        record_memory: Bytes that a worker process may take to prepare one record, beside what it has anyway. On Linux only.
        dtype: Of the computation; by default bfloat16, on CPU float32.
        attention: "auto", or the form of attention to use wherever it fits; "einsum" does without the kernels for TPUs.
        mesh: Of this host's devices, such as "data=2,tensor=2"; by default every device is data parallel.
        slots: Rows decoded at once, for each ring.
        ring_lengths: Columns of the caches, ascending.
        kv_cache_dtype: "int8" for caches in 8 bits; by default as the computation.
        compilation_cache: Directory, or URL of an object store, in which compiled programs are kept for the next start; by
            default what JAX_COMPILATION_CACHE_DIR says, else one below the user's cache directory.

    Raises:
        ConfigError: a value has the wrong type.
        InputError: a value is out of range, or no model is named.
    """

    input: str | os.PathLike[str]
    output: str | os.PathLike[str]
    model: str | os.PathLike[str] | None = None
    adapter: str | os.PathLike[str] | None = None
    check: bool = False
    prompt: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    pictures: PictureOptions = field(default_factory=PictureOptions)
    source: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    format: str = "jsonl"
    keep: tuple[str, ...] | None = None
    gallery: bool = False
    logprobs: str | None = None
    shard_size: int = 1000
    num_shards: int | None = None
    shard_index: int | None = None
    max_error_rate: float = 0.05
    force: bool = False
    quiet: bool = False
    keep_special_tokens: bool | None = None
    document: str | None = None
    workers: int | None = None
    record_timeout: float = 120.0
    record_memory: int = 4 * 2**30
    dtype: str | None = None
    attention: str = "auto"
    mesh: str | None = None
    slots: tuple[int, ...] | None = None
    ring_lengths: tuple[int, ...] | None = None
    kv_cache_dtype: str | None = None
    compilation_cache: str | os.PathLike[str] | None = None

    def __post_init__(self):
        from ..documents import FORMS
        from ..records.columns import UNUSED
        from ..records.record import check_names  # late: the command line starts without numpy

        name_fields(self, "dtype")
        check_types(self)
        if self.model is None and self.adapter is None:
            raise InputError(
                "no model is named: --model NAME (model=NAME), a directory or a name that `smolvlm-jax models` lists"
            )
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and value <= most and not value < least):
                flag = f"--{name.replace('_', '-')} ({name})"
                raise InputError(f"{flag} must be a number from {least:g} to {most:g}, got {value!r:.80}")
        if self.logprobs is not None and self.logprobs not in LOGPROBS:
            raise InputError(f"--logprobs (logprobs) is one of {', '.join(LOGPROBS)}, got {self.logprobs!r:.80}")
        if self.sampling.logprobs is not None:
            raise InputError('sampling.logprobs is for requests to the engine; a job has logprobs="mean" or "tokens"')
        if self.document is not None and self.document not in FORMS:
            raise InputError(f"--document {self.document!r:.80} is none of {', '.join(FORMS)}")
        check_names(self.columns)
        named: dict[str, str] = {}
        for name, column in self.columns:
            if name != UNUSED and named.setdefault(name, column) != column:
                raise InputError(f"--column {name}={named[name]} and {name}={column} (columns): leave one out")
