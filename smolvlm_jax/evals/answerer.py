"""`Answerer`: questions of a harness through the workers and the engine of a batch job, so that answers are a batch job's.

A question is a record. It is read, prepared and answered by the same functions as a line of a batch job's input, by requests
that the engine takes in as it has room for them.
"""

import itertools
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from ..batch.pool import WorkerPool, default_workers
from ..batch.workers import Preparer, Setup, longest_prompt
from ..config import SmolVLMConfig
from ..engine.loading import is_docling, load_engine
from ..engine.requests import Request, Result, Score
from ..errors import InputError, device_errors
from ..generation_config import SamplingParams
from ..locate import adapted, resolve, stack
from ..media_options import PictureOptions
from ..processing.options import check_options
from ..records.record import Record, record_from
from .prompts import Family

__all__ = ["Answerer", "Desk", "Question"]

_SMALLER = "slots or ring_lengths"  # what lowers the memory that is taken


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: A string or a whole number, from which the seed of a sampled answer is made.
        record: What a line of a batch job's JSONL would hold, with pictures as Pillow's or as paths.
        begin: How the answer begins: the model goes on after it, and it is not part of the answer.
    """

    id: str | int
    record: Mapping[str, Any]
    begin: str = ""


class _Reader:
    """The parser of questions, as a source of a batch job has one."""

    def __call__(self, payload: Question) -> Record:
        record = record_from(payload.record, payload.id)
        if not payload.begin or record.messages is None:
            return record
        return replace(record, messages=[*record.messages, {"role": "assistant", "content": payload.begin}])

    def identify(self, payload: Question) -> str | int:
        return payload.id


@dataclass(kw_only=True)
class Answerer:
    """A checkpoint that answers questions. The engine is loaded with the first one.

    Attributes:
        model: Bundled name, directory, Hub id, or a PEFT adapter, as of a batch job.
        adapter: A PEFT adapter that is merged into `model`; where that is None, into the base that its config names.
        sampling: Of questions that set nothing for themselves.
        pictures: Overrides of the checkpoint's processor.
        workers: Processes that prepare questions, by default one per core, less one; 0 prepares in this process.
        keep_special_tokens: Whether special tokens stay in the text; by default for checkpoints that write doctags.
        engine_options: Keywords of `load_engine`.
        family: By whose published prompts it is asked; as the checkpoint says.

    Raises:
        SmolVLMError: for a checkpoint that cannot be read and for settings that contradict it.
    """

    model: str | os.PathLike[str] | None = None
    adapter: str | os.PathLike[str] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    pictures: PictureOptions = field(default_factory=PictureOptions)
    workers: int | None = None
    keep_special_tokens: bool | None = None
    engine_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        model, base = adapted(self.model, self.adapter)
        parts = stack(model, base=base)
        self._model, self._base = parts[0], parts[1] if len(parts) > 1 else None
        directory = resolve(self._model, base=self._base)
        first = SmolVLMConfig.from_pretrained(directory).model_type == "idefics3"
        self.family: Family = "docling" if is_docling(directory) else "smolvlm" if first else "smolvlm2"
        longest = longest_prompt(directory, self.engine_options.get("ring_lengths"))
        self._setup = Setup(str(directory), _Reader(), self.sampling, self.pictures, longest)
        check_options(self._setup.processor())
        self._engine: Any = None

    @property
    def engine(self):
        """The Engine; it answers one stream of requests at a time."""
        if self._engine is None:
            keep = self.family == "docling" if self.keep_special_tokens is None else self.keep_special_tokens
            self._engine = load_engine(self._model, base=self._base, keep_special_tokens=keep, **self.engine_options)
        return self._engine

    def preparer(self) -> Preparer:
        """Makes requests of questions, in the calling process."""
        return Preparer(self._setup)

    def prepared(self, questions: Iterable[Question]) -> Iterator[tuple[int, Request]]:
        """(number of the question, its request), in the order in which the workers finish them."""
        workers = default_workers() if self.workers is None else self.workers
        with WorkerPool(self._setup, workers) as pool:
            for number, request in pool.map(enumerate(questions)):
                yield number, replace(request, id=number)

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[int, Result]]:
        """Answer questions, read as the engine has room for them.

        Yields:
            (number of the question, its answer), as they are finished. A faulty question has a result with an error.

        Raises:
            JobError: the device is out of memory or fails.
        """
        requests = (request for _, request in self.prepared(questions))
        first = next(requests, None)
        if first is None:
            return
        with device_errors(_SMALLER):
            for result in self.engine.generate(itertools.chain([first], requests)):
                yield result.id, result

    def score(self, pairs: Iterable[tuple[Question, str]]) -> list[Score]:
        """How probable given answers are: (question, answer) each, to which a score belongs, in their order.

        Raises:
            JobError: the device is out of memory or fails.
        """
        given: dict[int, str] = {}

        def questions() -> Iterator[Question]:
            for number, (question, text) in enumerate(pairs):
                given[number] = text
                yield question

        requests = (
            replace(request, params=SamplingParams(), continuation=given.pop(number))
            for number, request in self.prepared(questions())
        )
        with device_errors(_SMALLER):
            return sorted(self.engine.loglikelihood(requests), key=lambda score: score.id)


class Desk:
    """Answers questions of many threads with one engine, in continuous batches: each thread waits for its own answer.

    Args:
        answerer: Whose engine answers.
    """

    def __init__(self, answerer: Answerer):
        self._answerer, self._prepare = answerer, answerer.preparer()
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._open: dict[int, Future[Result]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ask(self, question: Question) -> Result:
        """Its answer, once it is there.

        Raises:
            InputError: the desk is closed.
        """
        request, number = self._prepare(question), next(self._numbers)
        future: Future[Result] = Future()
        with self._lock:
            if self._failed is not None:
                raise self._failed
            self._open[number] = future
        self._requests.put(replace(request, id=number))
        return future.result()

    def close(self) -> None:
        """Answer what was asked, then take no more."""
        self._requests.put(None)
        self._thread.join()

    def _run(self) -> None:
        why: BaseException = InputError("the desk is closed")
        try:
            for result in self._answerer.engine.generate(iter(self._requests.get, None)):
                with self._lock:
                    future = self._open.pop(result.id)
                future.set_result(result)
        except BaseException as error:
            why = error
        with self._lock:
            self._failed = why
            for future in self._open.values():
                future.set_exception(why)
            self._open.clear()
