"""The page of the first answers: what is on it, that nothing of a record becomes HTML, and how large it may be."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import batch_corpus as corpus
import numpy as np
import pytest
from PIL import Image

from smolvlm_jax.batch import gallery

HOSTILE = """</p></title><script>alert(1)</script><img src=x onerror='alert(2)'>"&{{ 7 * 7 }}{% raw %}\u202e\x00"""


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def read(out) -> Page:
    page = Page((out / "_gallery.html").read_text())
    known = {"html", "head", "meta", "title", "style", "body", "h1", "p", "article", "div", "img", "h2", "b"}
    assert {tag for tag, _ in page.tags} <= known
    assert {name for _, attributes in page.tags for name in attributes} <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "alt", "title", "src"
    }  # fmt: skip
    return page


def thumbnails(page: Page) -> list[Image.Image]:
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def test_the_first_answers_with_their_pictures(command, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 1100, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")
    Image.new("RGBA", (40, 90), (9, 9, 9, 0)).save(tmp_path / "small.png")
    many = [{"type": "image", "path": "small.png"}] * 11
    records = [
        {"id": HOSTILE, "prompt": HOSTILE, "image": "wide.png", "label": HOSTILE, "notes": "n" * 9000},
        {"id": 2, "messages": [{"role": "user", "content": [*many, {"type": "text", "text": "How many?"}]}]},
        {"id": 3, "prompt": "?", "image": "nowhere.png"},
        *({"id": f"more {n}", "prompt": f"{n}?"} for n in range(60)),
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, summary, said = command(source, tmp_path / "out", "--shard-size", "20", "--gallery", "--max-error-rate", "1")
    assert code == 0 and summary["gallery"] == str(tmp_path / "out" / "_gallery.html"), said
    page = read(tmp_path / "out")
    assert (
        page.tags.count(("article", {})) == gallery.ANSWERS and page.text.count("alert(1)") >= 3 and "{{ 7 * 7 }}" in page.text
    )
    shown = thumbnails(page)
    assert [picture.size for picture in shown] == [(256, 163), *[(40, 90)] * 8] and "and 3 more" in page.text
    assert "nowhere.png" in page.text and "How many?" in page.text and "9,000 characters" in page.text
    rows = corpus.rows_of(tmp_path / "out")
    assert rows[5]["text"] in page.text and "more 46" in page.text and "more 47" not in page.text
    assert (tmp_path / "out" / "_gallery.html").stat().st_size < 200_000


@pytest.mark.thorough
def test_a_finished_job_makes_it_without_a_model_and_force_moves_it_aside(command, tmp_path):
    (tmp_path / "in").mkdir()
    corpus.pictures(tmp_path / "in", 3)
    flags = (tmp_path / "in", tmp_path / "out", "--prompt", "?")
    assert command(*flags)[0] == 0 and not (tmp_path / "out" / "_gallery.html").exists()
    code, summary, _ = command(*flags, "--gallery")
    assert code == 0 and summary["new_records"] == 0 and len(thumbnails(read(tmp_path / "out"))) == 3
    assert command(*flags[:3], "Why?", "--force")[0] == 0
    assert not (tmp_path / "out" / "_gallery.html").exists()
    assert (tmp_path / "out" / "_replaced-1" / "_gallery.html").exists()


@pytest.mark.thorough
def test_a_picture_that_ends_its_process_costs_its_own_place_alone(command, tmp_path, monkeypatch):
    """Thumbnails are made by a child: one that dies says so on the page, and the next record has its pictures."""
    (tmp_path / "in").mkdir()
    corpus.pictures(tmp_path / "in", 3)
    real, names = gallery.Child.send, []

    def send(self, payload, seconds=None):
        if isinstance(payload, tuple):
            names.append(payload)
            if len(names) == 2:
                self.kill()
        return real(self, payload, seconds)

    monkeypatch.setattr(gallery.Child, "send", send)
    assert command(tmp_path / "in", tmp_path / "out", "--prompt", "?", "--gallery")[0] == 0
    page = read(tmp_path / "out")
    assert len(thumbnails(page)) == 2 and len(re.findall("its pictures cannot be shown", page.text)) == 1


def test_limits_hold_for_the_page_too(command, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"id": 1, "prompt": "?", "image": "http://127.0.0.1:9/a.png"}) + "\n")
    assert command(source, tmp_path / "out", "--gallery", "--no-urls", "--max-error-rate", "1")[0] == 0
    assert "switched off" in read(tmp_path / "out").text


@pytest.mark.thorough
def test_a_video_shows_its_first_frame(command, tmp_path):
    av = pytest.importorskip("av")
    with av.open(tmp_path / "clip.mp4", "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 320, 160, "yuv420p"
        for shade in (200, 20, 20, 20):
            frame = av.VideoFrame.from_ndarray(np.full((160, 320, 3), shade, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert command(tmp_path / "clip.mp4", tmp_path / "out", "--prompt", "?", "--gallery")[0] == 0
    (shown,) = thumbnails(read(tmp_path / "out"))
    assert shown.size == (256, 128) and 180 < np.asarray(shown).mean() < 220
