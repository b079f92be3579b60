"""PDF files that a record names: their pages are pictures of the one conversation, in batch jobs and in training."""

import json

import pytest
from pdf_files import lines, pdf

from smolvlm_jax import resolve
from smolvlm_jax.batch.config import BatchConfig
from smolvlm_jax.batch.ray import SmolVLMPreprocessor
from smolvlm_jax.errors import InputError, MediaError
from smolvlm_jax.processing import SmolVLMProcessor
from smolvlm_jax.processing.limits import MediaLimits
from smolvlm_jax.processing.pdf import PdfPage
from smolvlm_jax.processing.pdf_pages import PdfFile, with_pages
from smolvlm_jax.records.columns import DOCUMENTS, LEARNED
from smolvlm_jax.records.conversations import read_conversation
from smolvlm_jax.records.record import FIELDS, check_names, own_columns, record_from
from smolvlm_jax.train.config import DataConfig, DataSource, EvaluationConfig
from smolvlm_jax.train.records import open_records
from smolvlm_jax.train.samples import Sample, make_sample

pytest.importorskip("pypdfium2", reason="needs pypdfium2: pip install 'smolvlm-jax[documents]'")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "report.pdf").write_bytes(pdf([lines(f"page {n}") for n in range(1, 4)]))
    return tmp_path


def pages(record, folder, **options):
    messages = with_pages(read_conversation(record, folder=str(folder), **options).messages, MediaLimits())
    items = [item for message in messages for item in message["content"] if item["type"] == "image"]
    assert all(isinstance(item["image"], PdfPage) for item in items)
    return [(item["image"].source.removeprefix(f"{folder}/"), item["image"].number) for item in items]


@pytest.mark.parametrize(
    "record",
    [
        {"document": "report.pdf"},
        {"documents": ["report.pdf"]},
        {"image": "report.pdf"},
        {"images": ["report.PDF"]},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "report.pdf"}, {"type": "text", "text": "?"}]}]},
        {
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
            "document": "report.pdf",
        },
    ],
)
def test_a_file_is_its_pages(folder, record):
    (folder / "report.PDF").write_bytes((folder / "report.pdf").read_bytes())
    asked = record if "messages" in record else {**record, "prompt": "?"}
    assert [(name.lower(), number) for name, number in pages(asked, folder)] == [("report.pdf", n) for n in (1, 2, 3)]
    assert own_columns({**asked, "label": 1}) == ("label",)


def test_one_page_and_several_files_in_order(folder):
    record = {"prompt": "?", "documents": ["report.pdf#2", "report.pdf"], "image": "report.pdf#3"}
    assert [number for _, number in pages(record, folder)] == [3, 2, 1, 2, 3]


def test_what_is_no_name_of_a_pdf_is_the_users_own(folder):
    record = {"prompt": "?", "document": "a long text", "documents": ["a.pdf", 5]}
    assert read_conversation(record).unread == ("document", "documents") and own_columns(record) == ("document", "documents")
    with pytest.raises(InputError, match=r"'file', which holds a PDF: rename it \(--column image=file;"):
        read_conversation({"prompt": "?", "file": "report.pdf"})
    seen = read_conversation({"prompt": "?", "image": "page.png", "source": "report.pdf"})  # says where a picture is from
    assert seen.unread == ("source",)
    with pytest.raises(InputError, match="behind a URL, which is not fetched"):
        read_conversation({"prompt": "?", "document": "https://x/report.pdf"})


def test_files_that_are_missing_or_have_too_many_pages(folder):
    messages = read_conversation({"prompt": "?", "document": "gone.pdf"}, folder=str(folder)).messages
    assert isinstance(messages[0]["content"][0]["image"], PdfFile)
    with pytest.raises(MediaError, match=r"gone\.pdf"):
        with_pages(messages, MediaLimits())
    messages = read_conversation({"prompt": "?", "document": "report.pdf"}, folder=str(folder)).messages
    with pytest.raises(MediaError, match=r"has 3 pages, above the limit of 2 \(max_frames\)"):
        with_pages(messages, MediaLimits(max_frames=2))


def test_training_learns_from_pages(folder):
    record = {"prompt": "How many pages?", "document": "report.pdf", "answer": "3"}
    (folder / "train.jsonl").write_text(json.dumps(record) + "\n")
    messages = read_conversation(open_records(str(folder / "train.jsonl"))[0][0], folder=str(folder), last="assistant").messages
    processor = SmolVLMProcessor.from_pretrained(resolve("tiny"))
    sample = make_sample(processor, messages, DataConfig(length=2048))
    one = processor.image_processor.plan(1584, 1224).num_tiles
    assert isinstance(sample, Sample) and len(sample.tiles) == 3 * one
    short = make_sample(processor, messages, DataConfig(length=64))
    assert not isinstance(short, Sample) and f"{3 * one} tiles" in short.detail


@pytest.mark.parametrize("name", ["document", "documents", "image", "images"])
def test_a_column_of_another_name_is_read_like_one_of_pictures(folder, name):
    columns = ((name, "file"),)
    for value in ("report.pdf", ["report.pdf"], '["report.pdf"]'):
        record = {"prompt": "?", "file": value, "label": 1}
        assert [number for _, number in pages(record, folder, columns=columns)] == [1, 2, 3]
        assert read_conversation(record, columns=columns).unread == own_columns(record, columns) == ("label",)
    assert record_from({"prompt": "?", "file": None}, 1, columns=columns).error is None


def test_training_reads_a_column_of_another_name(folder):
    lines = [{"prompt": "?", "answer": "3", "file": value} for value in ("report.pdf#2", "a long text")]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = DataSource(str(folder / "train.jsonl"), columns=(("document", "file"),))
    good, wrong = (element[0] for element in open_records(source))
    assert [number for _, number in pages(good, folder, last="assistant")] == [2]
    assert isinstance(wrong, InputError) and "column document=file: 'a long text' is not the name of a PDF" in str(wrong)


@pytest.mark.parametrize("value", ["a long text", 5, ["report.pdf", 5]])
def test_a_column_that_is_said_to_name_pdfs_and_does_not_is_an_error(value):
    record = record_from({"prompt": "?", "file": value, "id": "a"}, 1, columns=(("document", "file"),))
    assert record.id == "a" and "column document=file: " in record.error and "is not the name of a PDF file" in record.error


def test_every_door_takes_the_same_names_of_columns():
    for name in FIELDS:
        check_names(((name, "file"),))
        BatchConfig(input="in", output="out", model="tiny", columns=((name, "file"),))
    for name in LEARNED:
        DataSource("train.jsonl", columns=((name, "file"),))
        EvaluationConfig("test.jsonl", columns=((name, "file"),))
    assert {*DOCUMENTS} <= {*FIELDS} & {*LEARNED}
    for door in (
        lambda: BatchConfig(input="in", output="out", model="tiny", columns=(("imgae", "file"),)),
        lambda: SmolVLMPreprocessor("tiny", columns={"imgae": "file"}),
    ):
        with pytest.raises(InputError, match=r"imgae=file is not NAME=COLUMN with a name of .*document"):
            door()
