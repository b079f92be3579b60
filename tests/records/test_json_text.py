"""JSON text that is walked through without being decoded: what is found is what decoding it finds, in bounded memory."""

import io
import json
import tarfile
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_jax.records import json_text
from smolvlm_jax.records.json_text import element_lines, members
from smolvlm_jax.records.sources import open_source

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a",\\[]{}:\n é', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('id",\\{}', max_size=4), inner, max_size=3),
    max_leaves=12,
)


def blocks(text: bytes, size: int) -> list[bytes]:
    return [text[place : place + size] for place in range(0, len(text), size)]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(VALUES, max_size=5),
    size=st.integers(1, 40),
    indent=st.sampled_from((None, 1)),
    ascii=st.booleans(),
)
def test_elements_are_those_that_decoding_finds(values, size, indent, ascii):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii).encode()
    lines = b"".join(element_lines(blocks(text, size))).splitlines()
    assert [json.loads(line) for line in lines if line.strip()] == values


@pytest.mark.parametrize("text", ["[1,,2]", "[,1]", "[1,]", "[1", '["a]', "[[1]", "[1] 2", "[1]]", "[1,\n \n,2]", "[\n,1]"])
def test_arrays_that_are_none(text):
    for size in (1, 2, 100):
        with pytest.raises(ValueError, match=r"missing|follows|end"):
            list(element_lines(blocks(text.encode(), size)))


@settings(max_examples=60, deadline=None)
@given(value=st.dictionaries(st.text('id",\\{}', max_size=4), VALUES, max_size=5), found=st.integers() | st.text(max_size=9))
def test_members_are_those_that_decoding_finds(value, found):
    value["custom_id"] = found
    for block in (3, 2**18):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(json_text, "_BLOCK", block)
            want = {k: v for k, v in value.items() if k in ("custom_id", "id") and type(v) in (int, str)}
            assert members(json.dumps(value).encode(), ("id", "custom_id")) == want


@pytest.mark.parametrize(
    "text", [b'{"id": 1', b'{"id": 1, "id": 2}', b'[{"id": 1}]', b'{"a": {"id": 1}}', b"", b'{"id": [1]}', b"7"]
)
def test_members_that_are_not_there(text):
    assert members(text, ("id",)) == {}


@pytest.mark.thorough
@pytest.mark.parametrize("item", [b"{}", b'"\\"",""', b'{"id":0}', b'"id":1,{"id":"'])
def test_memory_does_not_grow_with_the_text(item):
    text = b'{"x": [' + b",".join([item] * 8_000) + b'], "id": "last"}'
    whole = blocks(b"[" + text + b"]", 2**18)
    tracemalloc.start()
    try:
        found = members(text, ("id",))
        for _ in element_lines(whole):
            pass
        most = tracemalloc.get_traced_memory()[1]
    except ValueError:  # the last is no JSON
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == ({} if item.endswith(b'"id":"') else {"id": "last"}) and most < 2**23


RECORD = b'{"id": "r7", "messages": [' + b",".join([b"{}"] * 1000) + b"]}"


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "object.json", "renamed.jsonl", "a.csv", "a.tar", "several", "broken.jsonl"]
)
def test_records_are_identified_as_they_are_read(tmp_path, name):
    """By every source: the id without decoding is the id of the record."""
    path, columns = tmp_path / name, ()
    if name == "a.tar":
        with tarfile.open(path, "w") as archive:
            for member, data in {"x/0.json": b'{"prompt": "?"}', "x/1.json": RECORD, "x/3.id": b"own"}.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    elif name == "a.csv":
        path.write_text('id,prompt\nq,1\n"a ""b""",2\n,3\n')
    elif name == "several":
        path.mkdir()
        for number in range(2):
            (path / f"{number}.jsonl").write_bytes(RECORD + b'\n{"prompt": "a"}\n')
    else:
        data = {"a.json": b"[" + RECORD + b', {"custom_id": 3.0}, 5]', "object.json": RECORD.replace(b",", b"\n,")}
        lines = RECORD + b'\n{"id": 4, "custom_id": 5}\n{"id": true}\n{"custom_id": "c", "prompt": "{\\"id\\": 1}"}\nnone\n'
        columns = (("id", "key"),) if name == "renamed.jsonl" else ()
        lines = lines.replace(b'"id"', b'"key"') if columns else lines
        path.write_bytes(data.get(name, lines[:-40] if name == "broken.jsonl" else lines))
    source = open_source(path, columns=columns)
    payloads = [row.payload for unit in source.units(3) for row in unit.rows()]
    assert [source.parse.identify(payload) for payload in payloads] == [source.parse(payload).id for payload in payloads]
    assert len(payloads) > (name != "object.json")
