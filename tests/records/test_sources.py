"""Records and sources: what a line, row or file asks for; units that depend on the input alone."""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from units import everything

from smolvlm_jax.batch.summary import error_kind
from smolvlm_jax.engine import SamplingParams
from smolvlm_jax.errors import InputError, MediaError
from smolvlm_jax.processing.fetch import load_image
from smolvlm_jax.records.conversations import conversation_of
from smolvlm_jax.records.record import record_from, request_seed, with_overrides
from smolvlm_jax.records.sources import jsonl, open_source

# ---- records


def test_a_record_in_the_chat_format():
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]
    record = record_from(
        {"id": "x", "messages": [{"role": "user", "content": content}], "label": 3, "top_k": 2}, 1, folder="/data"
    )
    assert record.messages[0]["content"] == [{"type": "image", "path": "/data/a.png"}, {"type": "text", "text": "What?"}]
    assert (record.id, record.overrides, record.error) == ("x", {"top_k": 2}, None)


def test_a_line_of_an_openai_batch():
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    body = {"model": "m", "messages": [{"role": "user", "content": parts}], "max_tokens": 9, "temperature": 0.5, "stop": "\n"}
    record = record_from({"custom_id": "c-1", "method": "POST", "body": body}, 1, folder="/data")
    assert record.id == "c-1"
    assert record.messages[0]["content"][1] == {"type": "image", "url": "data:image/png;base64,AAAA"}
    params = with_overrides(SamplingParams(), record)
    assert (params.max_new_tokens, params.do_sample, params.temperature, params.stop) == (9, True, 0.5, ("\n",))
    greedy = record_from({"custom_id": "c", "body": {**body, "temperature": 0}}, 1)
    assert with_overrides(SamplingParams(do_sample=True, temperature=2.0), greedy).do_sample is False


def test_requests_for_other_endpoints_are_refused():
    body = {"model": "m", "input": "Hello"}
    for url, error in {
        "/v1/responses": None,
        "/openai/v1/chat/completions?api-version=2024": None,
        None: None,
        "/v1/embeddings": "/v1/embeddings",
        "/v1/moderations": "/v1/moderations",
    }.items():
        found = record_from({"custom_id": "c", "method": "POST", "url": url, "body": body}, 1).error
        assert found is None if error is None else error in found, url


def test_long_records_are_read_in_time_that_grows_with_their_length():
    """A key that occurs twice among many, and a text with many endings of pictures: either took minutes."""
    began = time.perf_counter()
    keys = ",".join(f'"k{n}":0' for n in range(50_000))
    with pytest.raises(InputError, match="'k49999' occurs twice"):
        jsonl.decode_json("line 1", f'{{{keys},"k49999":0}}'.encode())
    assert record_from({"prompt": "a", "note": "http://" + "a.jpg#" * 50_000 + " "}, 1).unread == ("note",)
    assert time.perf_counter() - began < 5


def test_settings_without_their_plural_are_misspelt():
    for name in ("max_new_token", "max_token", "top_ks"):
        assert f"nothing reads the column '{name}'" in record_from({"prompt": "a", name: 5}, 1).error
    assert record_from({"prompt": "a", "questions": "x"}, 1).unread == ("questions",)


def test_a_record_without_messages_takes_the_jobs_prompt():
    record = record_from({"images": ["a.png", {"bytes": b"png", "path": None}]}, 7, folder="/data", prompt="Number?")
    assert record.id == 7
    assert record.messages[0]["content"] == [
        {"type": "image", "image": "/data/a.png"},
        {"type": "image", "image": b"png"},
        {"type": "text", "text": "Number?"},
    ]
    own = record_from({"picture": "a.png", "prompt": "Mine?"}, 7, prompt="Number?", columns=(("image", "picture"),))
    assert own.messages[0]["content"] == [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Mine?"}]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1], "JSON object"),
        ({"id": [1]}, "id"),
        ({"id": True, "prompt": "a"}, "id"),
        ({}, "--prompt"),
        ({"prompt": 3}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": "{"}, "messages"),
        ({"messages": "[" * 100_000}, "messages"),
        ({"messages": [3]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "Hm."}]}, "assistant"),
        ({"body": 3}, "body"),
        ({"body": {"n": 2, "messages": []}}, "n is 2"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": 3}]}]}, "path"),
        ({"image": 3, "prompt": "a"}, "image"),
    ],
)
def test_a_faulty_record_says_so_itself(value, words):
    record = record_from(value, 5)
    assert words in record.error and record.messages is None


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


def test_training_reads_conversations_that_end_with_the_assistants_turn():
    chat = [turn("user", [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]), turn("assistant", "A cat.")]
    resolved = [turn("user", [{"type": "image", "path": "/data/a.png"}, {"type": "text", "text": "What?"}]), chat[1]]
    for record in (
        {"messages": chat, "id": [1], "body": "of a letter"},
        {"body": {"messages": chat}},
        {"messages": json.dumps(chat)},
    ):
        assert conversation_of(record, folder="/data", last="assistant") == resolved
    answered = [turn("user", [{"type": "text", "text": "12 and 7?"}]), turn("assistant", [{"type": "text", "text": "12."}])]
    assert conversation_of({"prompt": "12 and 7?", "answer": "12."}, last="assistant") == answered
    assert conversation_of({"messages": answered[:1], "answer": "12."}, last="assistant") == answered
    assert record_from({"messages": answered[:1], "answer": "12."}, 1).messages == answered[:1], "a job's own column"


def test_training_gives_bare_picture_items_the_records_pictures_in_order():
    bare = {"type": "image", "text": None}
    chat = [
        turn("user", [bare, {"type": "text", "text": "?"}, {"type": "image", "path": "x.png"}, bare]),
        turn("assistant", "1"),
    ]
    (question, _) = conversation_of({"messages": chat, "images": ["a.png", b"png"]}, folder="/data", last="assistant")
    assert question["content"] == [
        {"type": "image", "image": "/data/a.png"},
        {"type": "text", "text": "?"},
        {"type": "image", "path": "/data/x.png"},
        {"type": "image", "image": b"png"},
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1], "JSON object"),
        ({"messages": []}, "messages"),
        ({"messages": "{"}, "messages"),
        ({"messages": [turn("user", "Hm?")]}, "nothing to learn"),
        ({"prompt": "Hm?"}, "nothing to learn"),
        ({"prompt": "Hm?", "answer": 7}, "answer is a int"),
        ({"answer": "7"}, "neither messages nor a prompt"),
        ({"messages": [turn("user", [{"type": "image"}]), turn("assistant", "7")]}, "no images left"),
        ({"messages": [turn("user", "?"), turn("assistant", "7")], "images": 7}, "images is a int"),
    ],
)
def test_what_training_cannot_learn_is_refused(value, words):
    with pytest.raises(InputError, match=words):
        conversation_of(value, last="assistant")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=3)
KEYS = st.sampled_from(
    ["id", "messages", "prompt", "image", "images", "body", "role", "content", "type", "text", "path", "url", "n"]
)
WORDS = st.sampled_from(["image", "image_url", "text", "user", "assistant"])
ANYTHING = st.recursive(
    SCALARS | WORDS, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=5), max_leaves=12
)


@settings(max_examples=300, deadline=None)
@given(value=ANYTHING)
def test_no_value_raises(value):
    record = record_from(value, 5, folder="/data", prompt="What?")
    assert (record.error is None) == (record.messages is not None)
    assert isinstance(record.id, (str, int))


@pytest.mark.parametrize(
    "overrides", [{"temperature": 0}, {"temperature": "hot"}, {"do_sample": "yes"}, {"max_new_tokens": 0.5}, {"stop": [""]}]
)
def test_faulty_overrides(overrides):
    with pytest.raises(InputError):
        with_overrides(SamplingParams(), record_from({"prompt": "a", **overrides}, 1))


def test_seeds_follow_from_the_jobs_seed_and_the_id():
    seeds = {request_seed(job, key) for job in (0, 1) for key in ("1", 1, "a", "b")}
    assert len(seeds) == 8 and all(0 <= seed < 2**32 for seed in seeds)
    assert with_overrides(SamplingParams(seed=3), record_from({"prompt": "a"}, 9)).seed == request_seed(3, 9)
    assert with_overrides(SamplingParams(seed=3), record_from({"prompt": "a", "seed": 5}, 9)).seed == 5


# ---- JSON lines


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.sampled_from([b'{"prompt": "a"}', b"", b"   ", b"{", b"[1]"]), max_size=12), size=st.integers(1, 5))
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_lines_keep_their_numbers(tmp_path_factory, lines, size, end):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    joint = end or b"\n"
    path.write_bytes(joint.join(lines) + (end if lines else b""))
    found = [record.id for unit in everything(open_source(path), size) for record in unit]
    assert found == [number for number, line in enumerate(lines, 1) if line.strip()]


def test_units_are_the_same_whoever_reads_which(tmp_path, monkeypatch):
    """A host that reads every third unit finds in them what one that reads all finds, whatever the block size."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": n, "prompt": "x" * (n * 37 % 200)}) + "\n" for n in range(100)))
    want = [list(range(start, min(start + 7, 100))) for start in range(0, 100, 7)]
    for block in (2, 50, 2**20):
        monkeypatch.setattr(jsonl, "_BLOCK", block)
        source = open_source(path)
        assert [[r.id for r in unit] for unit in everything(source, 7)] == want
        for host in range(3):
            mine = {u.index: [source.parse(r.payload).id for r in u.rows()] for u in source.units(7) if u.index % 3 == host}
            assert mine == {index: want[index] for index in range(host, len(want), 3)}


def test_long_lines_marks_and_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE", 100)
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n' + b"x" * 5000 + b'\n{"prompt": "b"}')
    (tmp_path / "a.ndjson").write_text('{"prompt": "\\ud800"}\n')
    (tmp_path / "_ignored.jsonl").write_text("{}\n")
    records = [record for unit in everything(open_source(tmp_path), 2) for record in unit]
    assert [record.id for record in records] == ["a.ndjson:1", "b.jsonl:1", "b.jsonl:2", "b.jsonl:3"]
    assert [record.error for record in records] == [None, None, "line 2 is longer than 100 bytes", None]
    assert open_source(tmp_path).describe()["files"] == {"a.ndjson": 21, "b.jsonl": 5035}


# ---- pictures and videos


@pytest.fixture
def album(tmp_path) -> Path:
    for name in ("b.png", "a.JPG", "deep/er/c.mp4", "deep/d.webp", "notes.txt", ".hidden.png", "deep/.git/e.png", "[x].png"):
        path = tmp_path / "album" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    os.symlink(tmp_path / "album", tmp_path / "album" / "loop")
    return tmp_path / "album"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["[x].png", "a.JPG", "b.png", "deep/d.webp", "deep/er/c.mp4"]),
        ("/*.png", ["[x].png", "b.png"]),
        ("/deep/*", ["d.webp"]),
        ("/**/*.webp", ["deep/d.webp"]),
        ("/**", ["[x].png", "a.JPG", "b.png", "deep/d.webp", "deep/er/c.mp4", "notes.txt"]),
        ("/*/*/?.mp4", ["deep/er/c.mp4"]),
        ("/b.png", ["b.png"]),
        ("/[[]x].png", ["[x].png"]),
    ],
)
def test_pictures_by_directory_glob_and_name(album, pattern, names):
    records = [r for unit in everything(open_source(f"{album}{pattern}", prompt="What?"), 2) for r in unit]
    base = album / "deep" if pattern == "/deep/*" else album
    assert [record.id for record in records] == names
    for record in records:
        kind = "video" if record.id.endswith("mp4") else "image"
        assert record.messages[0]["content"] == [
            {"type": kind, "path": str(base / record.id)},
            {"type": "text", "text": "What?"},
        ]


def test_names_that_are_not_utf8_and_names_that_look_like_patterns(tmp_path):
    (tmp_path / "[1]").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/[1]/\xff.png")).write_bytes(b"?")
    (record,) = [r for unit in everything(open_source(tmp_path / "[1]", prompt="What?"), 9) for r in unit]
    assert record.id == "\\xff.png" and os.path.exists(record.messages[0]["content"][0]["path"])
    source = open_source(tmp_path / "[1]" / os.fsdecode(b"\xff.png"), prompt="What?")
    assert source.describe()["count"] == 1


def test_a_renamed_or_resized_picture_changes_the_description(album):
    describe = lambda: open_source(album, prompt="What?").describe()
    first = describe()
    assert describe() == first
    (album / "b.png").write_bytes(b"??")
    second = describe()
    (album / "b.png").rename(album / "bb.png")
    assert len({d["names and sizes"] for d in (first, second, describe())}) == 3


# ---- Parquet


def test_files_that_are_added_are_named(tmp_path, album):
    for folder, name, pattern in ((tmp_path / "lines", "b.jsonl", "lines/*.jsonl"), (album, "new.png", "**/*.png")):
        folder.mkdir(exist_ok=True)
        if name == "b.jsonl":
            (folder / "a.jsonl").write_text('{"prompt": "?"}\n')
        for path in (folder, tmp_path / pattern if name == "b.jsonl" else folder / pattern):
            source = open_source(path, prompt="?")
            assert source.added() == []
            (folder / name).write_bytes((folder / "a.jsonl").read_bytes() if name == "b.jsonl" else b"x")
            assert source.added() == [name]
            (folder / name).unlink()


# ---- mistakes


def test_mistakes_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_text("no")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for path, options, words in [
        (tmp_path / "nowhere", {}, "nowhere"),
        (tmp_path / "empty", {"prompt": "a"}, "no picture and no video"),
        (tmp_path / "a.png", {}, "--prompt"),
        (tmp_path / "*.jsonl", {}, "nothing in"),
        (tmp_path / "none" / "*.png", {"prompt": "a"}, "no directory"),
        (tmp_path / "a.png", {"name": "xml"}, "jsonl, parquet, json, csv, tar, media"),
        (tmp_path / "a.png", {"prompt": "a", "columns": (("id", "x"),)}, "columns"),
    ]:
        with pytest.raises(InputError, match=words):
            open_source(path, **options)
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'smolvlm-jax[parquet]'")
    with pytest.raises(InputError, match="no Parquet file"):
        open_source(tmp_path / "bad.parquet")


def test_a_file_that_is_not_there_says_where_relative_paths_start(tmp_path):
    far = f"{'folder/' * 12}a.png"
    for name, relative in (("a.png", True), (far, True), (str(tmp_path / "a.png"), False), (f"{'QUJD' * 20}", False)):
        (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "image": name}) + "\n")
        [row] = [row for unit in open_source(tmp_path / "a.jsonl").units(1) for row in unit.rows()]
        record = open_source(tmp_path / "a.jsonl").parse(row.payload)
        source = next(item["image"] for item in record.messages[0]["content"] if item["type"] == "image")
        with pytest.raises(MediaError) as raised:
            load_image(source)
        kind = error_kind(str(raised.value))
        assert ("(relative paths start from the folder of the file of records)" in kind) == relative, (name, kind)
