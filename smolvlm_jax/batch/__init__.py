"""The batch job: files of records in, one row for each record out, on one machine or on many hosts.

    from smolvlm_jax.batch import BatchConfig, run_batch

    summary = run_batch(BatchConfig(input="photos", output="answers", model="tiny", prompt="What is this?"))

config.py, run.py    the job from Python; cli.py: from the command line
job.py               records to requests, results to rows; signals.py: stopping it; hosts.py: its share of the input
pool.py, workers.py  processes that prepare records
parts.py, sinks.py   rows on disk; manifest.py: what they depend on; progress.py: figures of a running job
documents.py         documents made of the rows of pages
ray.py               the same under Ray Data

Importing this package imports no jax.
"""

from ..lazy import lazy_exports
from .config import BatchConfig, PictureOptions

_lazy, __getattr__ = lazy_exports(__name__, {"batch.run": ("run_batch",)})
__all__ = ["BatchConfig", "PictureOptions", *_lazy]
