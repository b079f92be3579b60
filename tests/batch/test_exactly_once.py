"""Every record has one row, whatever dies: jobs with the real engine, killed at random moments and started again."""

import random
from pathlib import Path

import pytest

psutil = pytest.importorskip("psutil", reason="watches processes with psutil: pip install 'smolvlm-jax[test]'")
pytest.importorskip("av", reason="writes its videos with PyAV: pip install 'smolvlm-jax[pyav]'")

import batch_corpus as corpus


def check(records: int, tmp_path: Path, seed: int) -> None:
    print("seed", seed)
    rng, plugins = random.Random(seed), tmp_path / "plugins"
    data = tmp_path / "data"
    data.mkdir()
    source, wrong = corpus.write_corpus(data, records)
    shared = set(Path("/dev/shm").iterdir()) if Path("/dev/shm").is_dir() else set()

    one = tmp_path / "one"
    corpus.run_to_the_end(source, one, 4, rng, plugins=plugins)
    rows = corpus.rows_of(one)
    ids = [row["id"] for row in rows]
    assert len(ids) == len(set(ids)) == records
    assert {row["id"] for row in rows if row["error"]} == wrong
    for row in rows:
        assert (row["text"] is None) == (row["error"] is not None) == (row["finish_reason"] == "error")
    assert {"stop", "length", "error"} <= {row["finish_reason"] for row in rows}
    errors = " ".join(row["error"] for row in rows if row["error"])
    for words in (
        "nowhere.png",
        "torn.png",
        "torn.mp4",
        "not valid JSON",
        "signal 6, 2 times",
        "prompt too long",
        "temperature",
    ):
        assert words in errors, words

    three = tmp_path / "three"
    for index in rng.sample(range(3), 3):
        shard = ("--num-shards", "3", "--shard-index", str(index))
        twin = corpus.start(source, three, *corpus.FLAGS, *shard, plugins=plugins) if index == 1 else None
        corpus.run_to_the_end(source, three, 1, rng, *shard, plugins=plugins)
        if twin is not None:  # two runners on one shard do no harm
            assert twin.communicate(timeout=600) and twin.returncode == 0
    assert corpus.multiset(corpus.rows_of(three)) == corpus.multiset(rows)

    for out in (one, three):
        left = [path.name for path in out.iterdir() if path.name.startswith(".")]
        assert not left, "working files stay behind"
        parts = [path.read_bytes().count(b"\n") for path in sorted(out.glob("part-*"))]
        assert parts == [100] * (records // 100)
    if shared:
        assert not {path for path in set(Path("/dev/shm").iterdir()) - shared if path.owner() == Path.home().owner()}


@pytest.mark.thorough
def test_two_thousand_records_survive_kill_9(tmp_path):
    check(2000, tmp_path, random.randrange(10**6))
