"""Conservation: what a record gives is used, or the record is refused by a message that names it. Forms are in forms.py."""

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import forms
from batch_corpus import rows_of
from batch_double import Double
from pdf_files import lines, pdf
from tiers import fast_first

from smolvlm_jax.batch.config import PictureOptions
from smolvlm_jax.batch.job import BatchJob, Shard
from smolvlm_jax.batch.pool import WorkerPool
from smolvlm_jax.batch.ray import PREPARED, SmolVLMPreprocessor
from smolvlm_jax.batch.sinks import open_sink
from smolvlm_jax.batch.workers import Preparer, Setup
from smolvlm_jax.checkpoint import resolve
from smolvlm_jax.child import PlainUnpickler
from smolvlm_jax.engine.requests import prepare
from smolvlm_jax.errors import InputError, MissingExtraError
from smolvlm_jax.processing.decode import choose_backend
from smolvlm_jax.records.conversations import read_conversation
from smolvlm_jax.records.record import record_from
from smolvlm_jax.records.sources import open_source
from smolvlm_jax.train.config import DataConfig, DataSource
from smolvlm_jax.train.samples import Prepare, Skipped

TINY = str(resolve("tiny"))
ANSWER = "marmot"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    forms.write_files(folder)
    try:
        choose_backend()
    except MissingExtraError:
        return folder  # forms of video files are left out
    sys.path.insert(0, str(Path(__file__).parents[1] / "processing"))
    from video_files import write_video

    write_video(folder / "clip.avi", [np.full((32, 48, 3), 60 * number, np.uint8) for number in range(forms.FRAMES)], rate=1)
    return folder


@pytest.fixture(scope="module")
def doors(folder):
    """What reads a record, by name: (ids, tiles, None), or (None, None, error)."""
    one_tile = PictureOptions(do_image_splitting=False)
    batch = Preparer(Setup(TINY, lambda value: record_from(value, 1, folder=str(folder)), pictures=one_tile))
    processor = Setup(TINY, None, pictures=one_tile).processor()
    ray = SmolVLMPreprocessor("tiny", do_image_splitting=False)
    train = Prepare(TINY, DataConfig(train=(DataSource("x"),), image_options=(("do_image_splitting", False),)))

    def of_request(request):
        made = request.prepared
        return (None, None, request.error) if made is None else (made.input_ids, made.tiles, None)

    def by_ray(record):
        columns = {name: np.empty(1, object) for name in record}
        for name, value in record.items():
            columns[name][0] = value
        return of_request(PlainUnpickler(io.BytesIO(ray(columns)[PREPARED][0])).load())

    def by_training(record, answered):
        sample = train((record if answered else {**record, "answer": ANSWER}, str(folder), "here"))
        return (None, None, sample.detail) if isinstance(sample, Skipped) else (sample.input_ids, sample.tiles, None)

    def by_processor(record):
        try:
            made = prepare(processor, record["messages"])
        except InputError as error:
            return None, None, str(error)
        return made.input_ids, made.tiles, None

    return {
        "batch": lambda form: of_request(batch(form.record)),
        "ray": lambda form: by_ray(form.record),
        "training": lambda form: by_training(form.record, form.answered),
        "processor": lambda form: by_processor(form.record),
    }, processor


def outcome(form, found, processor) -> str | None:
    """What is wrong with what was made of a form; None if it was used, or refused by name."""
    ids, tiles, error = found
    if error is not None:
        if "\n" in error:
            return f"an error of several lines: {error}"
        if form.named is None:
            return f"refused: {error}"
        return None if any(word in error for word in form.named) else f"refused without a word of {form.named}: {error}"
    text = processor.decode(ids)
    lost = [word for word in form.words if text.count(word) != 1]
    if lost:
        return f"{lost} not once in {text!r}"
    return None if len(tiles) == form.pictures else f"{len(tiles)} tiles of {form.pictures} pictures"


@pytest.mark.parametrize("kind", ["documented", "undocumented"])
def test_what_a_record_gives_is_used_or_named(kind, folder, doors, monkeypatch, record_property):
    monkeypatch.chdir(folder)  # the processor and Ray have no folder of the input
    readers, processor = doors
    walked, wrong = 0, []
    for form in getattr(forms, kind)(folder):
        names = [
            *form.doors,
            *(["processor"] if set(form.record) == {"messages"} and isinstance(form.record["messages"], list) else []),
        ]
        for name in names:
            if form.answered and name != "training":
                continue
            walked += 1
            trouble = outcome(form, readers[name](form), processor)
            if trouble:
                wrong.append(f"{name}, {form.name}: {trouble}")
    print(f"{kind}: {walked} readings")
    record_property("readings", walked)
    assert not wrong, "\n".join([f"{len(wrong)} of {walked}:", *wrong[:20]])
    assert walked > {"documented": 400, "undocumented": 1000}[kind]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=3)
WORDS = st.sampled_from([
    "image", "video", "image_url", "text", "user", "assistant", "human", "<image>", "p0.png", "[{", "a\nb",
])  # fmt: skip
KEYS = st.sampled_from([
    "id", "messages", "conversations", "texts", "prompt", "image", "images", "videos", "body", "role", "from", "value",
    "content", "type", "text", "path", "url", "index", "weight", "answer", "n", "top_k", "imgae", "label",
])  # fmt: skip
ANYTHING = st.recursive(
    SCALARS | WORDS, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=5), max_leaves=12
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(KEYS, ANYTHING, max_size=5) | ANYTHING)
def test_no_record_ends_a_job(value, doors, folder):
    """Whatever a record is, it is read, or has an error of one line."""
    readers, _ = doors
    for name in ("batch", "training"):
        form = forms.Form("anything", value, answered=True)
        ids, tiles, error = readers[name](form)
        assert (error is None) == (ids is not None) == (tiles is not None)
        assert error is None or (error and "\n" not in error)


def test_a_file_of_all_forms_has_a_row_for_each(folder, tmp_path):
    """A job reads them as lines of JSON; none ends it, and every error is one line."""
    lines = []
    for form in (*forms.documented(folder), *forms.undocumented(folder)):
        with contextlib.suppress(TypeError):  # bytes and arrays
            lines.append(json.dumps(form.record) + "\n")
    (folder / "forms.jsonl").write_text("".join(lines))
    source = open_source(folder / "forms.jsonl")
    setup = Setup(TINY, source.parse, pictures=PictureOptions(do_image_splitting=False))
    with WorkerPool(setup, 0) as pool:
        summary = BatchJob(source, tmp_path, open_sink("jsonl"), Shard(), pool, Double, quiet=True).run()
    rows = rows_of(tmp_path)
    assert summary["complete"] and len(rows) == summary["records"] == len(lines)
    assert all(row["error"] is None or "\n" not in row["error"] for row in rows)
    assert len(lines) > 500 and 100 < summary["answers"] < len(lines)


def test_a_turn_that_only_training_reads_is_refused_elsewhere(folder, doors):
    readers, _ = doors
    for form in forms.documented(folder):
        if form.answered and "batch" in form.doors:
            assert "assistant's own" in readers["batch"](form)[2], form.name


def test_columns_of_the_users_own_are_named(folder):
    record = {"prompt": "Hm?", "label": 3, "score": 0.5, "empty": None, "image": str(folder / "p0.png"), "file": "p0.png"}
    for last in ("user", "assistant"):
        read = read_conversation({**record, "answer": "7"}, last=last)
        assert read.unread == ("label", "score", "file")
    read = read_conversation({**record, "mask": b"png"}, columns=(("unused", "mask"), ("unused", "label")))
    assert read.unread == ("score", "file")
    with pytest.raises(InputError, match="column image=mask: another column has this name"):
        read_conversation({**record, "mask": "p1.png"}, columns=(("image", "mask"),))


@pytest.mark.parametrize("beside", fast_first(2, [None, "a.jsonl", "a.csv", "a.json", "a.tar.gz"]))
def test_every_file_of_a_folder_is_records_or_named(beside, tmp_path):
    """A page of a PDF is a record, once; a file that is none is counted by its ending; pictures may belong to records."""
    pytest.importorskip("pypdfium2", reason="needs pypdfium2: pip install 'smolvlm-jax[documents]'")
    (tmp_path / "a.pdf").write_bytes(pdf([lines(str(number)) for number in range(5)], damaged=2))
    (tmp_path / "b.PDF").write_bytes(b"torn")
    for name in ("c.png", "notes.txt", "d.docx"):
        (tmp_path / name).write_bytes(b"torn")
    pages = [*(f"a.pdf#{number}" for number in range(1, 6)), "b.PDF", "c.png"]
    if beside is not None:
        (tmp_path / beside).write_text('{"id": "a line", "prompt": "?"}\n')
    source = open_source(tmp_path, prompt="?")
    ids = [source.parse(row.payload).id for unit in source.units(2) for row in unit.rows()]
    others = {".txt": 1, ".docx": 1}
    if beside == "a.jsonl":
        assert ids == ["a line"] and source.unread == {**others, ".pdf": 2}
    else:
        assert sorted(ids) == pages
        assert source.unread == others | ({f".{beside.split('.', 1)[1].removesuffix('.gz')}": 1} if beside else {})
