"""Streams of batches: what they hold, and where a run takes up again."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from train_helpers import assistant, user, write_records

from smolvlm_jax.checkpoint import resolve
from smolvlm_jax.errors import CheckpointError, ConfigError
from smolvlm_jax.train.config import DataConfig, DataSource
from smolvlm_jax.train.pipeline import TrainingData, check_position
from smolvlm_jax.train.records import open_records
from smolvlm_jax.train.samples import Prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_records(folder, 24)
    return folder


def config_for(folder, **changes) -> DataConfig:
    return DataConfig(train=(DataSource(str(folder / "train.jsonl")),), length=192, batch_size=2, tiles_per_row=12, **changes)


def stream(config, steps, state=None, **options):
    data = TrainingData(config, str(resolve("tiny")), seed=1, **options)
    try:
        if state is not None:
            data.restore(state)
        out = []
        for _ in range(steps):
            batch = next(data)
            out.append((batch, json.loads(json.dumps(data.state()))))
        return out
    finally:
        data.close()


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_goes_on_where_it_stood(folder, packing):
    config = config_for(folder, packing=packing)
    whole = stream(config, 9)
    for stop in (1, 4, 7):
        rest = stream(config, 9 - stop, whole[stop - 1][1])
        for (got, state), (want, wanted) in zip(rest, whole[stop:], strict=True):
            assert same(got, want) and state == wanted
    assert not same(whole[0][0], whole[1][0])


def test_workers_change_nothing(folder):
    """Two worker processes: the same batches and positions as in this one."""
    alone = stream(config_for(folder), 5)
    helped = stream(config_for(folder, workers=2), 5)
    assert all(same(a, b) and s == t for (a, s), (b, t) in zip(alone, helped, strict=True))


def test_processes_share_the_records(folder):
    """Unpacked, the batches of two processes together hold the samples of the batch of one."""
    config = config_for(folder, packing=False)
    one = stream(config, 6)
    parts = [stream(config, 6, index=i, count=2) for i in range(2)]
    for (whole, _), *halves in zip(one, *parts, strict=True):
        rows = np.concatenate([half["input_ids"] for half, _ in halves])
        assert sorted(map(tuple, rows)) == sorted(map(tuple, whole["input_ids"]))


def test_mixtures_keep_their_weights(folder, tmp_path):
    write_records(tmp_path, 6, seed=9, name="other")
    sources = (DataSource(str(folder / "train.jsonl"), weight=3), DataSource(str(tmp_path / "other.jsonl"), weight=1))
    config = DataConfig(train=sources, length=192, batch_size=4, packing=False, tiles_per_row=12)
    prepare = Prepare(resolve("tiny"), config)
    other = open_records(str(tmp_path / "other.jsonl"))
    others = {tuple(prepare(other[i]).input_ids) for i in range(6)}
    rows = [
        row[ids]
        for batch, _ in stream(config, 10)
        for row, ids in zip(batch["input_ids"], batch["segment_ids"] == 1, strict=True)
    ]
    assert sum(tuple(row) in others for row in rows) == 10


def test_what_is_skipped_is_counted_and_named(folder, tmp_path):
    lines = (folder / "train.jsonl").read_text().splitlines()[:4]
    (tmp_path / "train").symlink_to(folder / "train")
    long = {"messages": [user("word " * 300), assistant("yes")]}
    (tmp_path / "train.jsonl").write_text(
        "\n".join([*lines, "{broken", json.dumps(long), "", json.dumps({"messages": 3})]) + "\n"
    )
    data = TrainingData(config_for(tmp_path, packing=False, shuffle=False), str(resolve("tiny")), seed=0)
    for _ in range(4):
        next(data)
    data.close()
    assert (data.counts["faulty"], data.counts["too_long"], data.counts["samples"]) == (2, 1, 8)
    assert len(data.told) == 3 and any("train.jsonl:6: 1215 tokens" in line and "too_long" in line for line in data.told)


def test_data_without_a_sample_is_an_error(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"messages": 3}\n')
    data = TrainingData(config_for(tmp_path), str(resolve("tiny")), seed=0)
    with pytest.raises(ConfigError, match=r"none of the 1 records makes a sample; the first, train\.jsonl:1: "):
        next(data)
    data.close()


def test_a_position_of_other_data_is_refused(folder, tmp_path):
    (_, state), *_ = stream(config_for(folder), 1)
    write_records(tmp_path, 5)
    with pytest.raises(CheckpointError, match="records"):
        stream(config_for(tmp_path), 1, state)


def changed_inputs(tmp_path, kind: str):
    """(path of a source, (), a function that changes an answer in it and nothing else)."""
    records = [{"prompt": f"{n}?", "answer": str(n)} for n in range(12)]
    path = tmp_path / f"data.{kind}"

    def write(answer: str) -> None:
        rows = [*records[:-1], {**records[-1], "answer": answer}]
        if kind == "parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif kind == "saved":
            datasets = pytest.importorskip("datasets", reason="needs datasets (train extra)")
            datasets.Dataset.from_list(rows).save_to_disk(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("eleven")
    return path, lambda: write("twelve")


@pytest.mark.parametrize("kind", ["jsonl", *(pytest.param(k, marks=pytest.mark.thorough) for k in ("parquet", "saved"))])
def test_a_position_of_other_data_of_the_same_length_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    path, change = changed_inputs(tmp_path, kind)
    config = DataConfig(train=(DataSource(str(path)),), length=64, batch_size=1)
    (_, state), *_ = stream(config, 1)
    path.rename(tmp_path / f"moved.{kind}")  # the same data elsewhere are the same
    moved = dataclasses.replace(config, train=(DataSource(str(tmp_path / f"moved.{kind}")),))
    stream(moved, 1, state)
    (tmp_path / f"moved.{kind}").rename(path)
    if kind == "saved":
        shutil.rmtree(path)
    change()
    with pytest.raises(CheckpointError, match=rf"data\.{kind} does not hold the records"):
        stream(config, 1, state)
    older = {name: value for name, value in state.items() if name not in ("contents", "settings", "model")}
    check_position(older)  # of a version that did not write them down
    stream(config, 1, older)


@pytest.mark.parametrize(
    "change",
    [
        {"length": 160},
        {"window_rows": 5},
        {"too_long": "drop_pictures"},
        {"shuffle": False},
        {"image_options": (("max_tiles", 1),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_position_under_other_settings_of_the_rows_is_refused(folder, change):
    (_, state), *_ = stream(config_for(folder), 1)
    check_position(state)
    with pytest.raises(CheckpointError, match=rf"the data of the checkpoint has {next(iter(change))} "):
        stream(dataclasses.replace(config_for(folder), **change), 1, state)


def test_a_position_with_another_model_or_mixture_is_refused(folder):
    (_, state), *_ = stream(config_for(folder), 1, model="one")
    stream(dataclasses.replace(config_for(folder), batch_size=4), 1, state, model="one")
    with pytest.raises(CheckpointError, match="the model that training started from does not hold"):
        stream(config_for(folder), 1, state, model="other")
    two = lambda a, b: (DataSource(str(folder / "train.jsonl"), weight=a), DataSource(str(folder / "train.jsonl"), weight=b))
    (_, state), *_ = stream(dataclasses.replace(config_for(folder), train=two(1, 3)), 1)
    stream(dataclasses.replace(config_for(folder), train=two(2, 6)), 1, state)
    with pytest.raises(CheckpointError, match="shares of the sources"):
        stream(dataclasses.replace(config_for(folder), train=two(1, 1)), 1, state)


def test_stacked_batches_are_the_batches(folder):
    single = stream(config_for(folder), 4)
    stacked = stream(config_for(folder), 2, accumulation=2)
    for step, (batch, state) in enumerate(stacked):
        assert all(same({k: v[i] for k, v in batch.items()}, single[2 * step + i][0]) for i in range(2))
        assert state == single[2 * step + 1][1]


def test_preparing_needs_no_jax():
    code = "import sys; import smolvlm_jax.train.samples, smolvlm_jax.train.packing; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
