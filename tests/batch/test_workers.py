"""Workers: processes that import no jax, that a record may kill, and that die with their job."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

psutil = pytest.importorskip("psutil", reason="watches processes with psutil: pip install 'smolvlm-jax[test]'")

import batch_corpus as corpus

from smolvlm_jax.batch.pool import WorkerPool, default_workers
from smolvlm_jax.batch.workers import NO_MEMORY, Preparer, Setup
from smolvlm_jax.checkpoint import resolve
from smolvlm_jax.errors import SmolVLMError

TINY = str(resolve("tiny"))


def setup(**options) -> Setup:
    return Setup(TINY, corpus.parse, **options)


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Workers that meet a picture which aborts, or hangs in, its decoder."""
    monkeypatch.setenv("PYTHONPATH", corpus.environment(tmp_path / "plugins")["PYTHONPATH"])
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name, content in (("abort.png", corpus.ABORTING), ("hang.png", b"HANG! says the decoder")):
        (tmp_path / name).write_bytes(content)
    return tmp_path


def records(folder: Path, count: int) -> list[tuple[int, dict]]:
    names = corpus.pictures(folder, 6)
    prompt = lambda n: {"id": n, "prompt": "Number?", "images": [str(folder / names[(n + k) % 6]) for k in range(n % 3)]}
    return [(n, prompt(n)) for n in range(count)]


def same(a, b) -> bool:
    if a.prepared is None or b.prepared is None:
        return a == b
    return (
        (a.id, a.params, a.prepared.digests) == (b.id, b.params, b.prepared.digests)
        and np.array_equal(a.prepared.input_ids, b.prepared.input_ids)
        and a.prepared.tiles.shape == b.prepared.tiles.shape
        and np.array_equal(a.prepared.tiles, b.prepared.tiles)
    )


def test_a_worker_makes_what_the_process_itself_makes(tmp_path, plugins):
    tasks = [
        *records(tmp_path, 30),
        (30, {"id": "x", "prompt": "?", "image": "nowhere.png"}),
        (31, {"prompt": "?", "top_k": -2}),
    ]
    here = Preparer(setup())
    with WorkerPool(setup(), 0) as none, WorkerPool(setup(), 2) as two:
        for pool in (none, two):
            made = dict(pool.map(tasks))
            assert made.keys() == dict(tasks).keys()
            assert all(same(made[key], here(payload)) for key, payload in tasks)
    assert "nowhere.png" in made[30].error and "top_k" in made[31].error
    assert made[5].prepared.tiles.dtype == np.uint8 and len(made[5].prepared.tiles) > 2


def test_workers_import_no_jax(plugins):
    """Asked inside a worker that has prepared text, pictures and a video."""
    (clip,) = corpus.videos(plugins, 1)
    healthy = {"prompt": "?", "image": str(plugins / corpus.pictures(plugins, 1)[0])}
    tasks = [(0, healthy), (1, {"prompt": "?", "video": str(plugins / clip)}), (2, "which modules?")]
    with WorkerPool(setup(), 1) as pool:
        made = dict(pool.map(tasks))
    assert len(made[0].prepared.tiles) and len(made[1].prepared.tiles)
    loaded = made[2].error.split()
    assert "smolvlm_jax.processing.processor" in loaded and "numpy" in loaded
    assert not {"jax", "jaxlib", "flax", "optax", "orbax", "pyarrow", "torch", "decord", "av"} & set(loaded)


def test_a_record_that_kills_its_worker_twice_is_an_error_and_others_are_not(plugins):
    tasks = records(plugins, 20)
    for place in (3, 11):
        tasks[place] = (place, {"id": f"bad-{place}", "prompt": "?", "image": str(plugins / "abort.png")})
    with WorkerPool(setup(), 2) as pool:
        made = dict(pool.map(tasks))
        assert pool.deaths == 4
    assert [key for key in sorted(made) if made[key].error] == [3, 11]
    assert made[3].error == "preparing this record ended its worker with signal 6, 2 times in a row"
    assert made[11].id == "bad-11"


@pytest.mark.thorough
def test_a_record_that_hangs_is_an_error(plugins):
    tasks = records(plugins, 6)
    tasks[2] = (2, {"id": "slow", "prompt": "?", "image": str(plugins / "hang.png")})
    with WorkerPool(setup(), 1, timeout=4) as pool:
        made = dict(pool.map(tasks))
    assert [key for key in sorted(made) if made[key].error] == [2]
    assert made[2].error == "preparing this record took its worker more than 4 seconds, 2 times in a row"


def test_no_more_is_read_ahead_than_workers_can_use(plugins):
    taken = []

    def tasks():
        for task in records(plugins, 100):
            taken.append(task[0])
            yield task

    with WorkerPool(setup(), 2) as pool:
        made = pool.map(tasks())
        for count in range(1, 40):
            next(made)
            assert len(taken) <= count + 2 * pool.size + 2


def test_stopping_takes_nothing_more(plugins):
    stop, taken = threading.Event(), []

    def tasks():
        for task in records(plugins, 1000):
            taken.append(task[0])
            yield task

    for workers in (0, 2):
        taken.clear()
        stop.clear()
        with WorkerPool(setup(), workers) as pool:
            for count, _ in enumerate(pool.map(tasks(), stop)):
                if count == 10:
                    stop.set()
        assert count <= 11 and len(taken) < 30


def test_what_the_reader_raises_arrives(plugins):
    def tasks():
        yield from records(plugins, 3)
        raise OSError("the disk is gone")

    for workers in (0, 1):
        with WorkerPool(setup(), workers) as pool, pytest.raises(OSError, match="the disk is gone"):
            list(pool.map(tasks()))


def test_a_worker_that_cannot_start_is_one_error(plugins):
    with WorkerPool(Setup("/nowhere", corpus.parse), 2) as pool, pytest.raises(SmolVLMError, match="/nowhere"):
        list(pool.map(records(plugins, 5)))


def test_closing_ends_all_workers_at_once(plugins):
    before = set(psutil.Process().children(recursive=True))
    pool = WorkerPool(setup(), 2)
    tasks = [(n, {"id": n, "prompt": "?", "image": str(plugins / "hang.png")}) for n in range(4)]
    thread = threading.Thread(target=lambda: list(pool.map(tasks)), daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while len(workers := set(psutil.Process().children(recursive=True)) - before) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    begin = time.monotonic()
    pool.close()
    thread.join(timeout=5)
    assert not thread.is_alive() and time.monotonic() - begin < 5
    assert not psutil.wait_procs(list(workers), timeout=5)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="a hanging decoder's death with its parent is Linux's own service")
def test_workers_die_with_a_job_that_is_killed_even_while_they_hang(plugins):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_workers import setup
from smolvlm_jax.batch.pool import WorkerPool
pool = WorkerPool(setup(), 2)
list(pool.map([(n, {{"id": n, "prompt": "?", "image": {str(plugins / "hang.png")!r}}}) for n in range(4)]))
"""
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    deadline = time.monotonic() + 60
    while len(workers := psutil.Process(parent.pid).children(recursive=True)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_the_default_number_of_workers():
    assert 1 <= default_workers() <= 64


def test_a_record_that_cannot_be_parsed_for_want_of_memory_says_so():
    class Parse:
        def __call__(self, payload):
            raise MemoryError

        def identify(self, payload):
            return "known"

    assert Preparer(Setup(TINY, Parse()))(b"{}").error == NO_MEMORY
    with WorkerPool(Setup(TINY, Parse()), 0) as pool:
        ((_, request),) = pool.map([(0, b"{}")])
    assert (request.id, request.error) == ("known", NO_MEMORY)
