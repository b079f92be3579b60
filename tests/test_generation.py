"""Decoding: against recorded answers, and the equivalences cached = uncached, batched = alone, streamed = generated."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import fast_first

from smolvlm_jax import GenerationConfig, generate, stream
from smolvlm_jax.cache import KVCache
from smolvlm_jax.errors import InputError
from smolvlm_jax.generation import _decode, _prefill, bucket
from smolvlm_jax.generation_config import Sampling
from smolvlm_jax.prompt_arrays import padded_length
from smolvlm_jax.sampling import RowSampling, choose, min_p, repetition_penalty, row_keys, top_k, top_p


def new_tokens(tiny, **options):
    ids = options.pop("input_ids", tiny.ids)
    mask = options.pop("attention_mask", np.ones_like(ids))
    options.setdefault("pixel_values", tiny.pixels)
    out = generate(tiny.model, tiny.params, ids, mask, **{"max_new_tokens": 12, "eos_token_id": None, **options})
    assert np.array_equal(out[:, : ids.shape[1]], ids)
    return out[:, ids.shape[1] :].tolist()


def test_greedy_tokens_of_the_reference(tiny, golden):
    want = golden["G38_G39_G40_model"][f"{tiny.name}_identity"]
    assert new_tokens(tiny) == [want["greedy"]]
    batch = dict(input_ids=tiny.batch_ids, attention_mask=tiny.batch_mask, pixel_values=tiny.batch_pixels)
    assert new_tokens(tiny, **batch) == want["batch_greedy"]


def test_padding_side_does_not_matter(tiny_a):
    batch = dict(attention_mask=tiny_a.batch_mask, pixel_values=tiny_a.batch_pixels)
    want = new_tokens(tiny_a, input_ids=tiny_a.batch_ids, **batch)
    shift = -(tiny_a.tokens + 1)
    right = np.stack([tiny_a.batch_ids[0], np.roll(tiny_a.batch_ids[1], shift)])
    batch["attention_mask"] = np.stack([tiny_a.batch_mask[0], np.roll(tiny_a.batch_mask[1], shift)])
    assert new_tokens(tiny_a, input_ids=right, **batch) == want
    # the mask is inferred from pad tokens where the caller gives none
    out = generate(
        tiny_a.model,
        tiny_a.params,
        right,
        pixel_values=tiny_a.batch_pixels,
        max_new_tokens=12,
        eos_token_id=None,
        pad_token_id=2,
    )
    assert out[:, right.shape[1] :].tolist() == want


def test_cached_equals_uncached(tiny_a):
    """Every step of the decode loop equals a full forward over everything so far."""
    cached = new_tokens(tiny_a)[0]
    apply = jax.jit(tiny_a.model.apply)
    t = tiny_a.ids.shape[1]
    ids = np.zeros((1, t + 12), np.int64)  # one shape for all steps: what stands behind a token cannot reach it
    ids[:, :t] = tiny_a.ids
    for step in range(12):
        logits = apply(tiny_a.variables, input_ids=ids, pixel_values=tiny_a.pixels).logits
        assert int(logits[0, t + step - 1].argmax()) == cached[step]
        ids[0, t + step] = cached[step]


@pytest.mark.thorough
def test_prefill_in_chunks_equals_one_forward(tiny_a):
    """The forward's own cache: any split of the prompt gives the logits of the whole, also where the ring has wrapped."""
    whole = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels).logits
    t = tiny_a.ids.shape[1]
    first = 2 + tiny_a.tokens  # the first picture whole
    out = tiny_a.apply(input_ids=tiny_a.ids[:, :first], pixel_values=tiny_a.pixels[:, :1], use_cache=True, cache_length=64)
    parts, cache = [out.logits], out.past_key_values
    assert int(cache.get_seq_length()) == first
    out = tiny_a.apply(input_ids=tiny_a.ids[:, first:-2], pixel_values=tiny_a.pixels[:, 1:], past_key_values=cache)
    parts.append(out.logits)
    for column in (t - 2, t - 1):
        out = tiny_a.apply(input_ids=tiny_a.ids[:, column : column + 1], past_key_values=out.past_key_values)
        parts.append(out.logits)
    assert np.abs(np.concatenate(parts, axis=1) - whole).max() <= 2e-5


def test_ring_wraps(tiny_a):
    """A row keeps its last L tokens when more than L columns were written: equal to a cache that never wrapped, masked."""
    config = tiny_a.model.config.text_config
    ids = np.random.default_rng(0).integers(3, 140, (1, 40))
    step = jax.jit(lambda token, position, cache: tiny_a.apply(input_ids=token, position_ids=position, past_key_values=cache))
    ring, long = KVCache.create(config, 1, 16), KVCache.create(config, 1, 64)
    for column in range(40):
        token, position = ids[:, column : column + 1], np.array([[column]])
        a = step(token, position, ring)
        # the long cache forgets by hand what the ring overwrites
        forget = jnp.arange(64)[None] > column - 16
        b = step(token, position, dataclasses.replace(long, visible=long.visible & forget))
        ring, long = a.past_key_values, b.past_key_values
        assert np.abs(a.logits - b.logits).max() <= 2e-5, column


@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_batched_equals_alone(tiny_a, rows):
    """Rows of unlike length, with no, one and two pictures: the ids each row gets alone."""
    rng = np.random.default_rng(rows)
    image = [150] * tiny_a.tokens
    prompts, tiles = [], []
    for row in range(rows):
        count = (row + rows) % 3
        prompts.append([1, *rng.integers(3, 140, int(rng.integers(1, 9))), *(image * count), 7])
        tiles.append(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
    length = max(map(len, prompts))
    ids = np.array([[2] * (length - len(p)) + p for p in prompts])
    mask = np.array([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    flat = np.concatenate(tiles)
    pixel = lambda t: {"pixel_values": t if len(t) else None}
    together = new_tokens(tiny_a, input_ids=ids, attention_mask=mask, **pixel(flat))
    alone = [new_tokens(tiny_a, input_ids=np.array([p]), **pixel(t))[0] for p, t in zip(prompts, tiles, strict=True)]
    assert together == alone


def test_stream_yields_what_generate_returns(tiny_a):
    for options in ({}, {"do_sample": True, "seed": 5}, {"eos_token_id": (157, 47)}):
        settings = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 2, **options}
        args = (tiny_a.model, tiny_a.params, tiny_a.batch_ids, tiny_a.batch_mask, tiny_a.batch_pixels)
        whole = generate(*args, **settings)[:, tiny_a.batch_ids.shape[1] :]
        pieces = np.stack(list(stream(*args, **settings)), axis=1)
        assert np.array_equal(whole, pieces)


def test_stops(tiny_a, golden):
    """Several stop ids; finished rows are filled; the loop ends when all rows are done."""
    want = golden["G38_G39_G40_model"]["A_identity"]["batch_greedy"]
    stops = (want[0][2], want[1][5])
    first = [min(i for i, t in enumerate(row) if t in stops) for row in want]
    got = new_tokens(
        tiny_a,
        input_ids=tiny_a.batch_ids,
        attention_mask=tiny_a.batch_mask,
        pixel_values=tiny_a.batch_pixels,
        eos_token_id=stops,
        pad_token_id=2,
    )
    assert len(got[0]) == max(first) + 1
    for row, stop, tokens in zip(want, first, got, strict=True):
        assert tokens == row[: stop + 1] + [2] * (len(tokens) - stop - 1)


@pytest.mark.thorough
def test_uint8_tiles_equal_float_pixels(tiny_a):
    tiles = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    values = ((tiles.astype(np.float64) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
    floats = np.einsum("ihwc->ichw", values)[None]
    a = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiles).logits
    b = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=floats).logits
    assert np.array_equal(a, b)
    assert new_tokens(tiny_a, pixel_values=tiles) == new_tokens(tiny_a, pixel_values=floats)


@pytest.mark.thorough
def test_image_hidden_states_stand_in_for_pixels(tiny_a):
    out = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels)
    again = tiny_a.apply(input_ids=tiny_a.ids, image_hidden_states=out.image_hidden_states)
    assert np.array_equal(out.logits, again.logits)
    assert new_tokens(tiny_a, pixel_values=None, image_hidden_states=out.image_hidden_states) == new_tokens(tiny_a)


@pytest.mark.thorough
def test_seeds(tiny_a):
    sample = lambda **kw: new_tokens(tiny_a, do_sample=True, **kw)[0]
    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert sample(seed=1, top_k=1) == new_tokens(tiny_a)[0]
    # a seed for each row: the draw of a row does not depend on where it stands
    batch = dict(input_ids=np.repeat(tiny_a.ids, 3, 0), pixel_values=np.repeat(tiny_a.pixels, 3, 0))
    rows = new_tokens(tiny_a, do_sample=True, seed=[7, 8, 7], **batch)
    assert rows[0] == rows[2] != rows[1]
    assert rows[1] == sample(seed=[8])
    # one seed for a batch still draws rows apart
    rows = new_tokens(tiny_a, do_sample=True, seed=7, **batch)
    assert rows[0] != rows[1]


def test_one_program_for_many_shapes(tiny_a):
    """Prompts of 3 to 60 tokens and 1 to 8 tiles compile a handful of programs, and none a second time."""
    rng = np.random.default_rng(0)
    image = [150] * tiny_a.tokens

    def ask(text, tiles):
        ids = np.array([[1, *rng.integers(3, 140, text), *(image * tiles)]])
        pixels = rng.integers(0, 256, (tiles, 32, 32, 3), dtype=np.uint8)
        generate(tiny_a.model, tiny_a.params, ids, np.ones_like(ids), pixels, max_new_tokens=4, eos_token_id=None)

    for text, tiles in [(60, 1), (40, 3), (5, 2)]:
        ask(text, tiles)
    before = _prefill._cache_size(), _decode._cache_size()
    for text in (3, 9, 12):
        ask(text, 2)
    for text in (55, 62):
        ask(text, 1)
    assert (_prefill._cache_size(), _decode._cache_size()) == before


def test_buckets():
    sizes = [bucket(n) for n in range(1, 9000)]
    assert all(s >= n for n, s in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert len(set(sizes)) <= 18 and max(s / n for n, s in enumerate(sizes, 1) if n >= 32) < 1.5
    assert [bucket(n, 1) for n in range(1, 10)] == [1, 2, 3, 4, 6, 6, 8, 8, 12]


def test_long_prompts_are_padded_by_an_eighth_at_most_on_a_cpu(monkeypatch):
    sizes = {n: padded_length(n) for n in range(1, 9000)}
    assert all(padded_length(size) == size >= n for n, size in sizes.items())
    assert all(size == bucket(n) for n, size in sizes.items() if n <= 1024)
    assert max(size / n for n, size in sizes.items() if n > 1024) < 1.13 and padded_length(1141) == 1152
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    assert all(padded_length(n) == bucket(n) for n in sizes)


# ---------------------------------------------------------------- logits processors


def test_processors_against_the_reference(golden, golden_arrays):
    """The recorded chain, each processor on the recorded output of the one before it."""
    logits, history = golden_arrays["GS_logits"], golden_arrays["GS_history"]
    seen = np.zeros(logits.shape, bool)
    for row, ids in enumerate(history):
        seen[row, ids] = True
    after = lambda name: golden_arrays[f"GS_after_{name}"]
    assert np.allclose(repetition_penalty(logits, seen, 1.3), after("rep1.3"), atol=1e-6)
    for name, got in (
        ("topk10", top_k(after("temp0.7"), 10)),
        ("topp0.9", top_p(after("topk10"), 0.9)),
        ("minp0.1", min_p(after("topp0.9"), 0.1)),
    ):
        got = np.asarray(got)
        kept = [sorted(np.flatnonzero(np.isfinite(row)).tolist()) for row in got]
        assert kept == golden["logits_processors"][name], name
        assert np.allclose(got, after(name), atol=1e-6)


@pytest.mark.thorough
def test_processors_against_transformers_on_random_scores():
    torch = pytest.importorskip("torch", reason="the reference: pip install 'smolvlm-jax[test]'")
    process = pytest.importorskip(
        "transformers", reason="the reference: pip install 'smolvlm-jax[test]'"
    ).generation.logits_process
    rng = np.random.default_rng(0)
    for _ in range(40):
        scores = (rng.standard_normal((3, 50)) * rng.uniform(0.5, 5)).astype(np.float32)
        scores[rng.random(scores.shape) < 0.1] = -np.inf
        k, p, m = int(rng.integers(1, 60)), float(rng.uniform(0.05, 0.99)), float(rng.uniform(0.01, 0.5))
        for ours, theirs in (
            (top_k(scores, k), process.TopKLogitsWarper(k)),
            (top_p(scores, p), process.TopPLogitsWarper(p)),
            (min_p(scores, m), process.MinPLogitsWarper(m)),
        ):
            want = theirs(None, torch.from_numpy(scores)).numpy()
            assert np.array_equal(np.isfinite(ours), np.isfinite(want))
            assert np.array_equal(np.asarray(ours), want)


@pytest.mark.parametrize("v", [1, 5, 128, 129, 1000])
def test_top_p_among_equals(v):
    """Long rows of few distinct scores, as bfloat16 gives them: the cut goes through equals, of which the later ones stay."""
    rng = np.random.default_rng(v)
    for p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0):
        scores = np.round(rng.standard_normal((8, v)) * rng.uniform(0.5, 4), 1).astype(np.float32)
        scores[:4, : v // 2] = -np.inf
        order = np.argsort(scores, axis=-1, kind="stable")
        exact = np.exp(np.take_along_axis(scores, order, -1).astype(np.float64))
        below = np.cumsum(exact / exact.sum(-1, keepdims=True), axis=-1)
        clear = (np.abs(below - (1 - p)).min(-1) > 1e-6) | (p == 1)  # not decided by a rounding
        removed = np.zeros(scores.shape, bool)
        np.put_along_axis(removed, order, below <= 1 - p, -1)
        np.put_along_axis(removed, order[:, -1:], False, -1)
        got = np.isfinite(top_p(jnp.asarray(scores), p))
        assert (got == (~removed & np.isfinite(scores)))[clear].all() and got.any(-1).all()
        assert clear.any()


@pytest.mark.thorough
def test_drawn_frequencies_follow_the_probabilities():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.asarray(np.log(np.repeat(probabilities[None], 4000, 0)))
    config = GenerationConfig(do_sample=True, top_k=0)
    rows = np.arange(4000, dtype=np.uint32)
    options = dict(seen=None, keys=lambda: row_keys(np.zeros_like(rows), rows), drawn=np.full(4000, 3))
    drawn = choose(logits, config, **options)
    assert np.abs(np.bincount(drawn, minlength=4) / 4000 - probabilities).max() < 0.03
    cut = choose(logits, config.replace(top_p=0.75), **options)
    assert set(np.unique(cut)) == {0, 1}


SETTINGS = [
    {"temperature": 1.8, "top_k": 0, "top_p": 0.9},
    {"temperature": 0.7},
    {"temperature": 3.3, "top_k": 0, "top_p": 1 - 1e-12},
    {"top_k": 0, "top_p": 1e-300},
    {"temperature": 1.1, "min_p": 0.07, "repetition_penalty": 1.3},
    {"temperature": 1e-15, "repetition_penalty": 1e15},
    {"temperature": 1e15, "repetition_penalty": 1e-15, "top_p": 0.5},
    {"top_k": 2**31 - 1, "min_p": 1e-300},
]


@pytest.mark.parametrize("given", fast_first(1, SETTINGS))
def test_settings_of_each_row_draw_as_one_setting_for_all(given):
    """To the last bit, which decides where a cut goes through scores that are nearly equal."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((400, 130)) * rng.uniform(0.5, 8, (400, 1)), jnp.float32)
    seen, drawn = jnp.asarray(rng.random(logits.shape) < 0.3), jnp.asarray(np.arange(400) % 7)
    number = np.arange(400, dtype=np.uint32)
    draw = lambda settings, logits: choose(logits, settings, seen=seen, keys=lambda: row_keys(number, number), drawn=drawn)
    settings = Sampling(do_sample=True, **given)
    one = jax.jit(functools.partial(draw, settings))(logits)
    assert np.array_equal(one, jax.jit(draw)(RowSampling.of([settings] * 400), logits))
    assert (np.asarray(one) >= 0).all() and (np.asarray(one) < 130).all()


@pytest.mark.thorough
def test_the_limit_is_what_the_prompt_leaves(tiny_a):
    """A row of a batch has as many new tokens as it has alone, and the last position of the model is used."""
    ids = np.random.default_rng(1).integers(10, 100, (2, 509))
    mask = np.arange(509) >= np.array([[0], [6]])
    options = dict(max_new_tokens=10**30, eos_token_id=None, pad_token_id=2)
    both = generate(tiny_a.model, tiny_a.params, ids, mask, **options)[:, 509:]
    assert both.shape == (2, 9) and (both[0, 3:] == 2).all()
    for row, new in enumerate((3, 9)):
        own = ids[row : row + 1, mask[row]]
        alone = generate(tiny_a.model, tiny_a.params, own, np.ones_like(own), **options)[0, own.shape[1] :]
        assert alone.tolist() == both[row, :new].tolist() and len(alone) == new
        steps = stream(tiny_a.model, tiny_a.params, own, np.ones_like(own), **options)
        assert [int(step[0]) for step in steps] == alone.tolist()
    full = np.full((1, 512), 40)
    with pytest.raises(InputError, match="prompt too long: 512 tokens"):
        generate(tiny_a.model, tiny_a.params, full, np.ones_like(full))


def test_repetition_penalty_counts_the_prompt_but_not_the_padding(tiny_a):
    """Left padding must not make the pad token a token seen before."""
    options = dict(repetition_penalty=1.7, pad_token_id=2)
    row = tiny_a.batch_ids[1:][:, tiny_a.batch_mask[1] == 1]
    alone = new_tokens(tiny_a, input_ids=row, pixel_values=tiny_a.batch_pixels[1:, 1:], **options)
    both = new_tokens(
        tiny_a, input_ids=tiny_a.batch_ids, attention_mask=tiny_a.batch_mask, pixel_values=tiny_a.batch_pixels, **options
    )
    assert both[1] == alone[0]
    assert both[0] != new_tokens(tiny_a)[0]


def test_generation_config_files(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7], "pad_token_id": 2, "junk": 1}))
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_id == (5, 7) and config.pad_token_id == 2 and config.max_new_tokens == 20
    config.save_pretrained(tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again") == config
    (tmp_path / "empty").mkdir()
    assert GenerationConfig.from_pretrained(tmp_path / "empty") == GenerationConfig()
    with pytest.raises(OSError, match="nowhere"):
        GenerationConfig.from_pretrained(tmp_path / "nowhere")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"tempreature": 1.0}, "tempreature"),
        ({"input_ids": np.array([[1, 999]])}, "input_ids"),
        ({"input_ids": np.array([1, 2])}, "shape"),
        ({"attention_mask": np.ones((1, 3))}, "attention_mask"),
        ({"attention_mask": np.zeros((1, 37))}, "empty"),
        ({"pixel_values": np.zeros((1, 32, 32, 3), np.uint8)}, "image tokens"),
        ({"pixel_values": np.zeros((3, 32, 32, 3), np.uint8)}, "image tokens"),
        ({"input_ids": np.array([[1, 5]])}, "image tokens"),
    ],
)
def test_errors_say_what_is_wrong(tiny_a, options, word):
    with pytest.raises(InputError, match=word):
        new_tokens(tiny_a, **options)


def test_image_tokens_without_pictures_run_as_in_the_reference(tiny_a):
    assert np.isfinite(tiny_a.apply(input_ids=tiny_a.ids).logits).all()
