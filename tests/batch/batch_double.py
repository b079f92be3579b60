"""An engine whose answers follow from the prompt alone, at once: for tests of everything around the real one."""

import contextlib
import time
from pathlib import Path

from smolvlm_jax.batch.job import BatchJob, Shard
from smolvlm_jax.batch.pool import WorkerPool
from smolvlm_jax.batch.sinks import open_sink
from smolvlm_jax.batch.workers import Setup
from smolvlm_jax.checkpoint import resolve
from smolvlm_jax.engine import SamplingParams
from smolvlm_jax.engine.counters import Counters
from smolvlm_jax.engine.requests import Result
from smolvlm_jax.records.sources import open_source


class Decoder:
    """What the job asks of the engine's processor."""

    def decode(self, ids, skip_special_tokens: bool) -> str:
        return " ".join(str(i) for i in ids)


class Double:
    """pause: seconds per answer. after: called with the number of answers so far, errors aside."""

    def __init__(self, pause: float = 0.0, after=lambda count: None):
        self.stats = Counters(seconds=1.0, device_idle_seconds=0.25)
        self.processor = Decoder()
        self._pause, self._after = pause, after
        self.seen: list = []
        self.closed = False

    def summary(self) -> dict:
        return self.stats.summary()

    def answer(self, request) -> Result:
        ids = [int(i) for i in request.prepared.input_ids]
        limit = request.params.max_new_tokens
        text = f"{sum(ids)} of {len(ids)}, {len(request.prepared.tiles)} tiles, seed {request.params.seed}"
        return Result(request.id, text, None, "length", len(ids), limit, len(request.prepared.tiles), (1,) * limit, 0.5)

    def generate(self, requests):
        try:
            for request in requests:
                if request.error is not None:
                    yield Result(request.id, None, request.error, "error", 0, 0, 0)
                    continue
                self.seen.append(request.id)
                time.sleep(self._pause)
                yield self.answer(request)
                self._after(len(self.seen))
        finally:
            self.closed = True


@contextlib.contextmanager
def batch(path: Path, out: Path, engine=None, shard=None, workers: int = 0, format: str = "jsonl"):
    shard = shard or Shard(size=10)
    source = open_source(path)
    out.mkdir(exist_ok=True)
    engine = engine or Double()
    with WorkerPool(Setup(str(resolve("tiny")), source.parse, SamplingParams(seed=3)), workers) as pool:
        yield BatchJob(source, out, open_sink(format), shard, pool, lambda: engine, quiet=True)


def run(*args, **options) -> dict:
    with batch(*args, **options) as job:
        return job.run()
