"""Stores that the tests of a run share, and places in new buckets of theirs."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
from object_stores import Front, serve

from smolvlm_jax.storage import StorePath, place, stores

_numbers = itertools.count()


@pytest.fixture(scope="session")
def front_of() -> Iterator[Callable[[str], Front]]:
    """Starts each kind once."""
    pytest.importorskip("s3fs", reason="reads and writes S3: pip install 'smolvlm-jax[s3]'")
    pytest.importorskip("gcsfs", reason="reads and writes Google Cloud Storage: pip install 'smolvlm-jax[gcs]'")
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda kind: stack.enter_context(serve(kind)))


# moto takes three seconds to start.
@pytest.fixture(params=["gs", pytest.param("s3", marks=pytest.mark.thorough)])
def front(request, front_of, monkeypatch) -> Iterator[Front]:
    """A store that this process, and those that it starts, use."""
    front = front_of(request.param)
    for name, value in front.environment.items():
        monkeypatch.setenv(name, value)
    yield front
    front.denied.clear()
    front.down(0)
    front.page, front.delay = 1000, 0.0


@pytest.fixture
def bucket(front) -> StorePath:
    return place(front.make(f"bucket-{next(_numbers)}"))


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(stores, "PATIENCE", 0.0)
