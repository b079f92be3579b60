"""Where records are: files, directories and data sets, all of which give the same conversations."""

import csv
import gzip
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from train_helpers import assistant, write_records

from smolvlm_jax.checkpoint import resolve
from smolvlm_jax.errors import ChangedError, ConfigError, InputError
from smolvlm_jax.train import records as records_module
from smolvlm_jax.train.config import DataConfig, DataSource
from smolvlm_jax.train.plain import from_dict
from smolvlm_jax.train.records import messages_of as messages_of_element
from smolvlm_jax.train.records import open_records
from smolvlm_jax.train.samples import Prepare


def messages_of(record, folder=""):
    return messages_of_element((record, folder, "here"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_records(folder, 24)
    return folder


def test_sources_hold_the_same_records(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="Parquet and the like need datasets (train extra)")
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    lines = open_records(str(folder / "train.jsonl"))
    want = [messages_of_element(lines[i]) for i in range(len(lines))]
    rows = [{"messages": json.dumps(messages), "id": i} for i, messages in enumerate(want)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "all.parquet", row_group_size=5)
    # Pictures in a column of the feature Image, which a reader would decode if it were not told otherwise.
    saved, splits = tmp_path / "saved", tmp_path / "splits"
    written = [as_dataset_row(messages) for messages in want]
    dataset = datasets.Dataset.from_list(written).cast_column("images", datasets.Sequence(datasets.Image()))
    dataset.save_to_disk(saved)
    datasets.DatasetDict(test=dataset.select(range(3)), train=dataset).save_to_disk(splits)
    with pyarrow.ipc.new_stream(tmp_path / "all.arrow", pyarrow.Table.from_pylist(written).schema) as stream:
        stream.write_table(pyarrow.Table.from_pylist(written))
    with open(tmp_path / "all.json", "w") as file:
        json.dump([{"messages": messages} for messages in want], file)
    with open(tmp_path / "all.csv", "w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([row["messages"]] for row in rows)])
    text = (folder / "train.jsonl").read_text().replace('"train/', f'"{folder}/train/').encode()
    (tmp_path / "all.jsonl.gz").write_bytes(gzip.compress(text))
    published = tmp_path / "published" / "data"
    published.mkdir(parents=True)
    (published / "train-00000-of-00001.parquet").write_bytes((tmp_path / "all.parquet").read_bytes())
    (published / "test-00000-of-00001.parquet").write_bytes(b"not read")
    prepare = Prepare(resolve("tiny"), DataConfig())
    samples = [prepare(lines[i]) for i in range(len(lines))]
    files = [tmp_path / f"all.{ending}" for ending in ("parquet", "arrow", "csv", "json", "jsonl.gz")]
    for source in (*files, saved, splits, tmp_path / "published"):
        records = pickle.loads(pickle.dumps(open_records(str(source))))
        assert len(records) == len(lines)
        for i in (0, 11, 23, 4):
            got = prepare(records[i])
            assert np.array_equal(got.input_ids, samples[i].input_ids) and np.array_equal(got.tiles, samples[i].tiles), source
    assert len(open_records(DataSource(str(saved), limit=7))) == 7


def test_lines_of_unlike_shapes_stay_what_they_are(tmp_path, monkeypatch):
    """Why JSON lines have a reader of their own: one type for all rows of a column makes other records of them."""
    datasets = pytest.importorskip("datasets", reason="the comparison is with datasets (train extra)")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    turns = [{"role": "user", "content": "7?"}, {"role": "assistant", "content": [{"type": "text", "text": "7"}]}]
    rows = [
        {"messages": turns, "id": 1},
        {"messages": [{**turns[0], "name": None}, {"role": "assistant", "content": "7"}], "id": "two"},
        {"prompt": "7?", "answer": "7", "image": None},
    ]
    path = tmp_path / "unlike.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = open_records(str(path))
    assert [records[i][0] for i in range(3)] == rows
    try:
        theirs = list(datasets.load_dataset("json", data_files=str(path), split="train"))
    except (datasets.exceptions.DatasetsError, ValueError):
        theirs = None  # refused, by its older versions
    assert theirs != rows


def test_nothing_is_written_beside_the_data(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="Parquet and the like need datasets (train extra)")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    row = {"prompt": "7?", "answer": "7"}
    datasets.Dataset.from_list([row]).to_parquet(data / "train.parquet")
    (data / "validation.csv.gz").write_bytes(gzip.compress(b"prompt,answer\n8?,8\n9?,9\n"))
    before = sorted(tmp_path.joinpath("data").iterdir())
    assert open_records(str(data / "train.parquet"))[0][0] == row
    assert [len(open_records(DataSource(str(data / "validation.csv.gz"), limit=n))) for n in (1, 9)] == [1, 2]
    assert sorted(tmp_path.joinpath("data").iterdir()) == before


def test_a_split_that_is_asked_for(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="Parquet and the like need datasets (train extra)")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    row = lambda answer: {"prompt": "?", "answer": answer}
    (tmp_path / "both").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_list([row(split)]).to_parquet(tmp_path / "both" / f"{split}-00000-of-00001.parquet")
    for split in ("train", "test"):
        assert open_records(DataSource(str(tmp_path / "both"), split=split))[0][0] == row(split)
    with pytest.raises(InputError, match="has no split other; it has train, test"):
        open_records(DataSource(str(tmp_path / "both"), split="other"))


def test_splits_that_do_not_exist_are_refused(folder):
    for path in (folder / "train.jsonl", folder):
        with pytest.raises(InputError, match="neither splits nor configurations"):
            open_records(DataSource(str(path), split="test"))


def test_columns_under_other_names(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"frage": "7?", "answer": "7", "mask": "m.png"}) + "\n")
    columns = (("question", "frage"), ("unused", "mask"))
    records = open_records(DataSource(str(tmp_path / "a.jsonl"), columns=columns))
    (question, answer) = messages_of_element(records[0])
    assert (question["content"][0]["text"], answer["content"][0]["text"]) == ("7?", "7")
    assert from_dict({"path": "x", "columns": {"question": "frage"}}, DataSource).columns == columns[:1]
    with pytest.raises(ConfigError, match="questoin"):
        DataSource("x", columns=(("questoin", "frage"),))


def test_lines_that_change_end_the_run(folder, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes((folder / "train.jsonl").read_bytes())
    records = open_records(str(path))
    assert records[3][0]["messages"]
    os.truncate(path, 100)
    for reader in (records, pickle.loads(pickle.dumps(records))):
        with pytest.raises(ChangedError, match=r"train\.jsonl has changed"):
            reader[4]
    path.unlink()
    with pytest.raises(ChangedError, match=r"train\.jsonl cannot be read any more"):
        pickle.loads(pickle.dumps(records))[4]


def test_a_card_beside_lines_does_not_matter_and_hidden_folders_are_not_read(folder, tmp_path):
    (tmp_path / ".cache").mkdir()
    for name in ("train.jsonl", ".cache/other.jsonl"):
        (tmp_path / name).write_text('{"prompt": "?", "answer": "1"}\n')
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_files: x\n---\n")
    assert len(open_records(str(tmp_path))) == 1


def test_lines_compressed_with_zstandard(folder, tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="reading .zst needs zstandard (train extra)")
    (tmp_path / "train.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress((folder / "train.jsonl").read_bytes()))
    packed, plain = open_records(str(tmp_path / "train.jsonl.zst")), open_records(str(folder / "train.jsonl"))
    assert [packed[i][0] for i in range(len(packed))] == [plain[i][0] for i in range(len(plain))]


def test_json_lines_need_no_datasets(folder):
    code = f"import sys; from smolvlm_jax.train.records import open_records; open_records({str(folder / 'train.jsonl')!r})[3]"
    code += "; print('datasets' in sys.modules, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


def as_dataset_row(messages):
    """Pictures in a column of their own, items that only say where they go: as datasets for other trainers have it."""
    images, turns = [], []
    for message in messages:
        content = []
        for item in message["content"]:
            if item["type"] == "image":
                with open(item["path"], "rb") as file:
                    images.append({"bytes": file.read(), "path": None})
            content.append({"type": item["type"], "text": item.get("text")})
        turns.append({"role": message["role"], "content": content})
    return {"messages": turns, "images": images}


def test_records_as_the_batch_job_has_them(tmp_path):
    short = messages_of({"id": 3, "prompt": "Number?", "image": "a.png", "answer": "7"}, "/data")
    assert short[0]["content"][0] == {"type": "image", "image": "/data/a.png"} and short[-1]["role"] == "assistant"
    whole = {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}, assistant("7")]}
    assert messages_of(whole, "/data")[0]["content"][0]["path"] == "/data/a.png"
    strings = [{"role": "user", "content": "2 and 3?"}, {"role": "assistant", "content": "5"}]
    assert messages_of({"messages": strings}) == strings
    stop = {"role": "user", "content": [{"type": "text", "text": "."}]}
    assert messages_of({"messages": [stop, assistant("Yes?")]}) == [stop, assistant("Yes?")]
    with pytest.raises(InputError, match="nothing to learn"):
        messages_of({"messages": strings[:1]})
    with pytest.raises(InputError, match="no images left"):
        messages_of({"messages": [{"role": "user", "content": [{"type": "image"}]}, assistant("7")]})
    with pytest.raises(InputError, match="no such file"):
        open_records(str(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match="holds no conversations"):
        open_records(str(tmp_path))


@pytest.mark.parametrize("kind", ["saved", "arrow"])
def test_mapped_files_that_change_end_the_run(tmp_path, kind):
    """A file that was truncated would end the process with a signal where it is read."""
    datasets = pytest.importorskip("datasets", reason="Arrow files need datasets (train extra)")
    import pyarrow

    table = pyarrow.Table.from_pylist([{"prompt": f"{n}? " * 50, "answer": "7"} for n in range(500)])
    if kind == "saved":
        datasets.Dataset(table).save_to_disk(tmp_path / "data")
        (file,) = (tmp_path / "data").glob("*.arrow")
        source = tmp_path / "data"
    else:
        file = source = tmp_path / "data.arrow"
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    records = open_records(str(source))
    assert records[499][0]["answer"] == "7"
    os.truncate(file, 4096)
    with pytest.raises(ChangedError, match=f"{file.name} has changed"):
        records[400]


def parquet_of(path):
    """Rows in three groups, whose pages have checksums."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([{"prompt": f"What is {n}?", "answer": str(n)} for n in range(30)])
    options = {"row_group_size": 10, "compression": "none", "use_dictionary": False, "write_page_checksum": True}
    parquet.write_table(table, path, **options)
    return path


def test_a_damaged_page_of_parquet_is_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="Parquet and the like need datasets (train extra)")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = parquet_of(tmp_path / "a.parquet")
    assert len(open_records(str(path))) == 30
    path.write_bytes(path.read_bytes().replace(b"What is 14?", b"What is 15?", 1))
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match=r"a\.parquet is damaged: row group 1 cannot be read"):
        open_records(str(path))


def test_parquet_that_changes_while_it_is_converted_is_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="Parquet and the like need datasets (train extra)")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path, load = parquet_of(tmp_path / "a.parquet"), records_module._load

    def changed(*args):
        found = load(*args)
        os.utime(path, (5, 5))
        return found

    monkeypatch.setattr(records_module, "_load", changed)
    with pytest.raises(ChangedError, match=r"a\.parquet has changed"):
        open_records(str(path))


def test_a_line_beyond_any_record_is_one_error(tmp_path, monkeypatch):
    for module in ("smolvlm_jax.train.records", "smolvlm_jax.records.sources.jsonl"):
        monkeypatch.setattr(f"{module}.MAX_LINE", 200)
    good = json.dumps({"prompt": "?", "answer": "!"})
    (tmp_path / "a.jsonl").write_text("\n".join([good, "x" * 450, " " * 200 + "y" * 200, good, " " * 20]))
    records = open_records(str(tmp_path / "a.jsonl"))
    assert len(records) == 4
    assert [isinstance(records[n][0], InputError) for n in range(4)] == [False, True, True, False]
    assert "longer than 200 bytes" in str(records[1][0])
