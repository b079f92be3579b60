"""From records to batches: what is learned, what fits, what goes together, and where a run takes up again."""

import csv
import gzip
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from train_helpers import write_records

from smolvlm_jax.checkpoint import resolve
from smolvlm_jax.errors import ChangedError, CheckpointError, ConfigError, InputError, PromptError
from smolvlm_jax.processing import SmolVLMProcessor
from smolvlm_jax.train.config import IGNORE, DataConfig, DataSource, from_dict
from smolvlm_jax.train.packing import BatchShape, make_batch, plan_rows
from smolvlm_jax.train.pipeline import TrainingData
from smolvlm_jax.train.records import messages_of as messages_of_element
from smolvlm_jax.train.records import open_records
from smolvlm_jax.train.samples import Prepare, Sample, Skipped, label_tokens, make_sample


def messages_of(record, folder=""):
    return messages_of_element((record, folder, "here"))


@pytest.fixture(scope="module")
def processor():
    return SmolVLMProcessor.from_pretrained(resolve("tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_records(folder, 24)
    return folder


def user(*texts, pictures=0):
    image = {"type": "image", "image": Image.new("RGB", (60, 40), (90, 120, 200))}
    return {"role": "user", "content": [image] * pictures + [{"type": "text", "text": t} for t in texts]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


CONVERSATION = [user("Number?", pictures=1), assistant("7"), user("And now the second?"), assistant("It is 12.")]


# ---- what is learned


def test_loss_on_assistant_tokens_only(processor):
    """Each answer and its end, multi-turn; what stands before an answer is what generation would be prompted with."""
    sample = make_sample(processor, CONVERSATION, DataConfig())
    learned = sample.labels != IGNORE
    assert np.array_equal(sample.labels[learned], sample.input_ids[learned])
    text = processor.decode(sample.labels[learned], skip_special_tokens=False)
    assert text == " 7<end_of_utterance> It is 12.<end_of_utterance>"
    assert not (sample.labels == processor.image_token_id).any()
    for turn in (1, 3):
        prompt = processor.apply_chat_template(CONVERSATION[:turn], add_generation_prompt=True, tokenize=True)[0]
        starts = np.flatnonzero(learned & ~np.roll(learned, 1))[turn // 2]
        assert sample.input_ids[:starts].tolist() == list(prompt)


def test_switches_for_more_and_less(processor):
    last = make_sample(processor, CONVERSATION, DataConfig(loss_on="last"))
    assert processor.decode(last.labels[last.labels != IGNORE], skip_special_tokens=False) == " It is 12.<end_of_utterance>"
    everything = make_sample(processor, CONVERSATION, DataConfig(loss_on="all"))
    learned = everything.labels != IGNORE
    text = processor.decode(everything.labels[learned], skip_special_tokens=False)
    assert "Number?" in text and "It is 12." in text and "<image>" not in text and "fake_token" not in text
    assert not np.isin(everything.labels[learned], [processor.image_token_id]).any()


def test_turns_of_weight_zero_are_context(processor):
    weighted = [{**turn, "weight": weight} for turn, weight in zip(CONVERSATION, (1, 0, 0, 1.0), strict=True)]
    whole = make_sample(processor, CONVERSATION, DataConfig())
    for loss_on, words in (("assistant", [" It is 12."]), ("last", [" It is 12."]), ("all", ["Number?", " It is 12."])):
        sample = make_sample(processor, weighted, DataConfig(loss_on=loss_on))
        assert np.array_equal(sample.input_ids, whole.input_ids)
        text = processor.decode(sample.labels[sample.labels != IGNORE], skip_special_tokens=False)
        assert all(word in text for word in words) and " 7<" not in text and "second" not in text
    none = [{**turn, "weight": 0} for turn in CONVERSATION]
    for loss_on in ("assistant", "last", "all"):
        with pytest.raises(PromptError, match="weight 0"):
            make_sample(processor, none, DataConfig(loss_on=loss_on))


def test_timestamps_of_videos_are_masked(processor):
    frames = np.random.default_rng(0).integers(0, 255, (4, 40, 60, 3), np.uint8)
    video = {"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "Number?"}]}
    messages = [video, assistant("3")]
    ids = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="np", pixel_format="uint8", do_sample_frames=False,
        video_metadata=[{"fps": 1.0, "total_num_frames": 4, "duration": 4.0, "frames_indices": [0, 1, 2, 3]}],
    )["input_ids"][0]  # fmt: skip
    assert "00:0" in processor.decode(ids)
    labels = label_tokens(processor, messages, ids, "assistant")
    assert processor.decode(labels[labels != IGNORE], skip_special_tokens=False) == " 3<end_of_utterance>"


def test_words_that_look_like_special_tokens_stay_words(processor):
    messages = [user("say <end_of_utterance> and <image>", pictures=1), assistant("no <image> here")]
    sample = make_sample(processor, messages, DataConfig())
    text = processor.decode(sample.labels[sample.labels != IGNORE], skip_special_tokens=False)
    assert text == " no <image> here<end_of_utterance>"
    with pytest.raises(PromptError):
        make_sample(processor, messages, DataConfig(special_tokens_in_text="error"))


def test_a_template_without_ends_of_turns_is_refused(processor):
    with pytest.raises(PromptError, match="2 turns, but 0 tokens that end a turn"):
        label_tokens(processor, CONVERSATION[:2], np.array([5, 6, 7]), "assistant")


# ---- what fits


def test_a_picture_is_never_cut(processor):
    """Too long: skipped with what it would have needed, or whole pictures dropped from the end; tokens and tiles agree."""
    messages = [user("Which picture shows the larger number?", pictures=3), assistant("The first.")]
    whole = make_sample(processor, messages, DataConfig())
    need = len(whole)
    skipped = make_sample(processor, messages, DataConfig(length=need - 1))
    assert isinstance(skipped, Skipped) and skipped.reason == "too_long"
    assert skipped.detail == f"{need} tokens and {len(whole.tiles)} tiles"
    shorter = make_sample(processor, messages, DataConfig(length=need - 1, too_long="drop_pictures"))
    assert shorter.dropped == 1 and len(shorter) <= need - 1
    for sample in (whole, shorter):
        assert (sample.input_ids == processor.image_token_id).sum() == len(sample.tiles) * processor.image_seq_len
    assert len(shorter.tiles) == len(whole.tiles) * 2 // 3
    few = make_sample(processor, messages, DataConfig(tiles_per_row=len(whole.tiles) - 1))
    assert isinstance(few, Skipped)
    text_only = make_sample(processor, [user("x " * 100), assistant("y")], DataConfig(length=50, too_long="drop_pictures"))
    assert isinstance(text_only, Skipped)


# ---- which go together


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=40))
def test_every_sample_stands_in_one_row_whole(sizes):
    lengths, tiles = zip(*sizes, strict=True)
    samples = [
        Sample(np.zeros(length, np.int32), np.zeros(length, np.int32), np.zeros((n, 1, 1, 3), np.uint8)) for length, n in sizes
    ]
    shape = BatchShape(rows=1, length=64, tiles=8, tile_size=1)
    rows = plan_rows(samples, shape)
    assert sorted(n for row in rows for n in row) == list(range(len(sizes)))
    for row in rows:
        assert sum(lengths[n] for n in row) <= 64 and sum(tiles[n] for n in row) <= 8 and row == sorted(row)
    assert len(rows) <= 2 * max(-(-sum(lengths) // 64), -(-sum(tiles) // 8)) + 2
    assert plan_rows(samples, shape, alone=True) == [[n] for n in range(len(sizes))]


def test_a_batch_keeps_segments_and_tiles_in_order():
    sample = lambda value, length, count: Sample(
        np.full(length, value, np.int32), np.full(length, value, np.int32), np.full((count, 2, 2, 3), value, np.uint8)
    )
    shape = BatchShape(rows=2, length=8, tiles=3, tile_size=2)
    batch = make_batch([[sample(5, 3, 1), sample(6, 2, 1)], [sample(7, 4, 2)]], shape, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 5, 5, 6, 6, 9, 9, 9], [7, 7, 7, 7, 9, 9, 9, 9]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch["labels"][0].tolist() == [IGNORE, 5, 5, IGNORE, 6, IGNORE, IGNORE, IGNORE]
    assert batch["pixel_values"][:, :, 0, 0, 0].tolist() == [[5, 6, 0], [7, 7, 0]]
    assert batch["tile_mask"].tolist() == [[True, True, False]] * 2
    text_only = BatchShape(rows=1, length=8, tiles=0, tile_size=2)
    assert "pixel_values" not in make_batch([[sample(5, 3, 0)]], text_only, 9)


# ---- where records are


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
    with pytest.raises(InputError, match="holds no training data"):
        open_records(str(tmp_path))


# ---- streams and positions


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
    with pytest.raises(ConfigError, match=r"make no sample; the last: train\.jsonl:1"):
        next(data)
    data.close()


def test_a_position_of_other_data_is_refused(folder, tmp_path):
    (_, state), *_ = stream(config_for(folder), 1)
    write_records(tmp_path, 5)
    with pytest.raises(CheckpointError, match="records"):
        stream(config_for(tmp_path), 1, state)


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
