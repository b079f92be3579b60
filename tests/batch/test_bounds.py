"""What waits is bounded in bytes, and what one record takes in memory."""

import base64
import functools
import sys
import threading
import tracemalloc
import zlib

import numpy as np
import pytest
from batch_corpus import chat, parse
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smolvlm_jax.batch import pool as pool_module
from smolvlm_jax.batch.pool import WorkerPool
from smolvlm_jax.batch.workers import Preparer, Setup
from smolvlm_jax.checkpoint import resolve
from smolvlm_jax.engine.requests import Prepared, prepare
from smolvlm_jax.engine.room import Room
from smolvlm_jax.errors import InputError
from smolvlm_jax.processing import SmolVLMProcessor
from smolvlm_jax.processing.bounds import least_tokens
from smolvlm_jax.records.sources import open_source

TINY = str(resolve("tiny"))


@functools.cache
def opened() -> SmolVLMProcessor:
    return SmolVLMProcessor.from_pretrained(TINY)


@pytest.fixture
def processor() -> SmolVLMProcessor:
    return opened()


def png(width: int, height: int) -> str:
    """A black picture that takes next to no bytes, as a data: URL."""
    row = zlib.compress(bytes(height * (1 + 3 * width)))
    chunk = lambda kind, data: len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_room_is_never_overdrawn_and_lets_the_largest_through():
    room, lock, held, seen = Room(10), threading.Lock(), [0], []

    def work(size: int) -> None:
        room.take(size, lambda: False)
        with lock:
            held[0] += size
            seen.append((held[0], size))
        with lock:
            held[0] -= size
        room.give(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in (3, 8, 40, 2, 9, 1) * 20]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(seen) == 120 and all(total <= 10 or total == size for total, size in seen)


def test_payloads_ahead_are_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(pool_module, "AHEAD_BYTES", 1000)
    taken = []

    def tasks():
        for number in range(12):
            taken.append(number)
            yield number, {"id": number, "prompt": "x", "note": "y" * 600}

    with WorkerPool(Setup(TINY, parse), 1) as pool:
        for count, (_, request) in enumerate(pool.map(tasks())):
            assert request.error is None
            assert len(taken) <= count + 3
    assert count == 11


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_record_beyond_its_memory_is_its_own_error():
    tasks = [
        (0, {"id": "small", "messages": chat("?", {"type": "image", "image": png(8, 8)})}),
        (1, {"id": "large", "messages": chat("?", {"type": "image", "image": png(9000, 9000)})}),
        (2, {"id": "after", "prompt": "Hi"}),
    ]
    with WorkerPool(Setup(TINY, parse, memory=2**27), 1) as pool:
        found = {request.id: request.error for _, request in pool.map(tasks)}
    assert found["small"] is found["after"] is None
    assert "memory" in found["large"].lower(), found


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_record_that_no_worker_can_decode_is_not_decoded_here(tmp_path):
    """As objects of Python its text takes thirty times its size."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Hi"}\n{"id": "large", "messages": [' + ", ".join(["{}"] * 4_000_000) + "]}\n")
    source = open_source(path)
    tasks = [(row.position, row.payload) for unit in source.units(10) for row in unit.rows()]
    with WorkerPool(Setup(TINY, source.parse, memory=2**27), 1) as pool:
        tracemalloc.start()
        found = {request.id: request.error for _, request in pool.map(tasks)}
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found[1] is None and "memory" in found["large"] and most < 3 * path.stat().st_size, most


def test_memory_that_runs_out_in_this_process_is_the_records_error(monkeypatch):
    def fails(*args, **options):
        raise MemoryError

    monkeypatch.setattr("smolvlm_jax.batch.workers.prepare", fails)
    assert "--record-memory" in Preparer(Setup(TINY, parse))({"id": 1, "prompt": "a"}).error


def test_a_text_that_cannot_fit_is_not_tokenised(processor, monkeypatch):
    text = [{"role": "user", "content": "number 7 " * 10**6}]
    with monkeypatch.context() as patched:
        patched.setattr(processor, "apply_chat_template", None)
        with pytest.raises(InputError, match=r"prompt too long: it takes at least \d+ tokens, and there is room for 500"):
            prepare(processor, text, longest=500)


def test_pictures_that_cannot_fit_are_not_decoded(processor, tmp_path, monkeypatch):
    Image.new("RGB", (400, 300)).save(tmp_path / "a.png")
    monkeypatch.setattr("smolvlm_jax.processing.images.load_image", None)
    messages = chat("?", *({"type": "image", "path": str(tmp_path / "a.png")} for _ in range(10)))
    needed = processor.count_prompt_tokens(messages, add_generation_prompt=True)[0]
    with pytest.raises(InputError, match=f"prompt too long: {needed} tokens"):
        prepare(processor, messages, longest=needed - 1)
    many = chat("?", *({"type": "image", "path": "nowhere.png"} for _ in range(10_000)))
    with pytest.raises(InputError, match="prompt too long: it takes at least"):
        prepare(processor, many, longest=1000)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=300) | st.text("a \n<5", max_size=2000))
def test_the_least_number_of_tokens_is_one(text):
    messages = [{"role": "user", "content": text}]
    processor = opened()
    assert least_tokens(processor, messages) <= len(prepare(processor, messages).input_ids)


def test_pixels_are_forgotten_and_their_number_is_not():
    tiles = np.ones((3, 8, 8, 3), np.uint8)
    light = Prepared.of(np.arange(5, dtype=np.int32), tiles).without_pixels()
    assert light.tiles.shape == tiles.shape and light.tiles.base.nbytes == 1 and len(light.digests) == 3


@pytest.mark.thorough
def test_an_engine_answers_however_little_may_wait(processor, tmp_path):
    from smolvlm_jax.engine import Engine, Request, SamplingParams

    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    engine = Engine.from_pretrained("tiny", ring_lengths=(256,), slots=(2,), lookahead_bytes=1)
    messages = chat("?", {"type": "image", "path": str(tmp_path / "a.png")})
    found = list(engine.generate(Request(n, messages, params=SamplingParams(max_new_tokens=2)) for n in range(5)))
    assert sorted(result.id for result in found) == [0, 1, 2, 3, 4] and all(result.tiles for result in found)
