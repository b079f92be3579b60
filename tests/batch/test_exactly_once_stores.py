"""Every record has one row where input, pictures and output are in an object store, whatever dies."""

import random
from pathlib import Path

import pytest
from object_stores import running, serve

psutil = pytest.importorskip("psutil", reason="watches processes with psutil: pip install 'smolvlm-jax[test]'")
pytest.importorskip("av", reason="writes its videos with PyAV: pip install 'smolvlm-jax[pyav]'")
pytest.importorskip("s3fs", reason="reads and writes S3: pip install 'smolvlm-jax[s3]'")
pytest.importorskip("gcsfs", reason="reads and writes Google Cloud Storage: pip install 'smolvlm-jax[gcs]'")

import batch_corpus as corpus

from smolvlm_jax.storage import StorePath, place, upload_tree

RECORDS = 2000
pytestmark = [pytest.mark.network, pytest.mark.slow]  # some five minutes a store on two idle cores


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> tuple[Path, set, dict]:
    """(folder of the input, ids of the records that must end in an error, the rows of an undisturbed job on files)."""
    data = tmp_path_factory.mktemp("data")
    source, wrong = corpus.write_corpus(data, RECORDS)
    out = data.with_name("rows")
    process = corpus.start(source, out, *corpus.FLAGS, plugins=data.with_name("plugins"))
    assert process.communicate() and process.returncode == 0
    return data, wrong, corpus.multiset(corpus.rows_of(out), data)


def check(out: StorePath, data: StorePath, local: tuple) -> None:
    rows = corpus.rows_of(out)
    assert len(rows) == len({row["id"] for row in rows}) == RECORDS
    assert {row["id"] for row in rows if row["error"]} == local[1]
    assert corpus.multiset(rows, data) == local[2]
    assert not [
        entry.name for entry in out.entries() if not entry.name.startswith(("part-", "_manifest", "_summary", "_rows-of"))
    ]
    assert [path.read_bytes().count(b"\n") for path in out.glob("part-*")] == [100] * (RECORDS // 100)


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_two_thousand_records_in_a_bucket_survive_kill_9(kind, local, tmp_path, monkeypatch):
    seed = random.randrange(10**6)
    print("seed", seed)
    rng, plugins = random.Random(seed), tmp_path / "plugins"
    with serve(kind) as front, running(front.beside()) as watched:
        for name, value in watched.environment.items():
            monkeypatch.setenv(name, value)
        bucket = place(front.make("bucket"))
        data = bucket / "data"
        upload_tree(local[0], data)
        options = {"plugins": plugins, "more": front.environment}

        front.forget()
        corpus.run_to_the_end(f"{data}/records.jsonl", bucket / "one", 4, rng, **options)
        print_costs("one host, killed four times", front)
        check(bucket / "one", data, local)

        front.forget()
        for index in rng.sample(range(2), 2):
            shard = ("--num-shards", "2", "--shard-index", str(index))
            twin = None
            if index == 1:  # two runners on one shard do no harm
                twin = corpus.start(f"{data}/records.jsonl", bucket / "two", *corpus.FLAGS, *shard, **options)
            corpus.run_to_the_end(f"{data}/records.jsonl", bucket / "two", 1, rng, *shard, **options)
            if twin is not None:
                assert twin.communicate(timeout=900) and twin.returncode == 0
        print_costs("two hosts, each killed once, and a twin of one", front)
        check(bucket / "two", data, local)


def print_costs(what: str, front) -> None:
    requests = sum(front.requests.values())
    print(
        f"{front.kind}, {what}: {requests / RECORDS:.2f} requests, {front.sent / RECORDS:,.0f} bytes read and "
        f"{front.received / RECORDS:,.0f} written a record ({dict(front.requests)})"
    )
