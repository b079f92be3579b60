"""What the decode kernel takes for granted of a ring, and the engine that decodes with it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu

from smolvlm_jax import SmolVLMForConditionalGeneration, SmolVLMProcessor, init_params, load, resolve
from smolvlm_jax.attention import decode, dispatch
from smolvlm_jax.attention.decode_limits import fits_decode
from smolvlm_jax.cache import CacheFormat, ColumnBuffers
from smolvlm_jax.engine import Engine, EngineConfig, Prepared, Request, SamplingParams

CHIP = tpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait")


def requests(count: int, vocabulary: int, longest: int, limit: int) -> list[Request]:
    """Text of random lengths and limits."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, vocabulary, rng.integers(1, longest)).astype(np.int32) for _ in range(count)]
    params = lambda: SamplingParams(int(rng.integers(1, limit)), ignore_eos=True)
    tiles = np.zeros((0, 48, 48, 3), np.uint8)
    return [Request(i, prepared=Prepared(x, tiles, ()), params=params()) for i, x in enumerate(ids)]


def check_columns(engine) -> int:
    """Every row that goes on sees its last columns, without a gap; returns how many do."""
    rows = 0
    for ring in engine._rings:
        if ring.state is None:
            continue
        visible, index, finished = jax.device_get((ring.state.cache.visible, ring.state.cache.index, ring.state.rows.finished))
        age = (index - 1 - np.arange(ring.length)) % ring.length
        for seen in visible[~finished]:
            np.testing.assert_array_equal(seen, age < seen.sum())
        rows += int((~finished).sum())
    return rows


def test_rows_see_their_last_columns():
    """Whatever is inserted where, and however often the rings come round."""
    model, params = load("tiny")
    config = EngineConfig(ring_lengths=(32, 64), slots=(3, 2), prefill_tokens=64, chunk=3)
    engine = Engine(model, params, SmolVLMProcessor.from_pretrained(resolve("tiny")), config)
    found = [check_columns(engine) for _ in engine.generate(requests(40, 440, 20, 24))]
    assert sum(found) > 40 and int(engine._rings[0].state.cache.index) > 100


@pytest.mark.thorough
@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_engine_that_decodes_by_the_kernel(monkeypatch, quantized):
    """Rows of unlike lengths come and go in rings that come round: every token is as good as float32's best, by a forward over
    the whole answer, as nearly as bfloat16 can tell."""
    tiny, _ = load("tiny")
    text = tiny.config.text_config.replace(head_dim=32, num_hidden_layers=2)
    config = tiny.config.replace(text_config=text)
    exact, model = (SmolVLMForConditionalGeneration(config, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    params = init_params(model, seed=0)
    taken = []

    def by_kernel(q, k, v, cache, mask):
        taken.append(cache)
        pairs, scales, work = cache.buffers.pairs, cache.buffers.scales, cache.work
        out, pairs, scales = decode.decode_attention(q, k, v, pairs, scales, cache.start, work, interpret=CHIP)
        return out, replace(cache.buffers, pairs=pairs, scales=scales)

    form = dispatch.CACHED_FORMS[0]
    fits = lambda q, cache: fits_decode(q, cache.work, cache.buffers.pairs)
    monkeypatch.setattr(dispatch, "CACHED_FORMS", (replace(form, platform="cpu", fits=fits, run=by_kernel, example=None),))
    stored = CacheFormat(jnp.dtype(jnp.int8 if quantized else jnp.bfloat16), 1)
    monkeypatch.setattr(CacheFormat, "choose", lambda *_, **__: stored)
    settings = EngineConfig(ring_lengths=(128,), slots=(3,), prefill_tokens=128, chunk=4)
    engine = Engine(model, params, SmolVLMProcessor.from_pretrained(resolve("tiny")), settings)
    asked = requests(12, 440, 40, 30)
    answers = {}
    for result in engine.generate(asked):
        assert result.error is None
        answers[result.id] = result.token_ids
        check_columns(engine)
    assert taken and isinstance(engine._rings[0].state.cache.layers[0], ColumnBuffers)
    forward = jax.jit(partial(exact.apply, {"params": params}))
    behind, spread = [], []
    for request in asked:
        prompt, answer = request.prepared.input_ids, np.asarray(answers[request.id])
        ids = np.zeros((1, 72), np.int32)
        ids[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        logits = np.asarray(forward(input_ids=ids).logits[0, len(prompt) - 1 :][: len(answer)])
        behind += list(logits.max(1) - logits[np.arange(len(answer)), answer])
        spread += list(logits.std(1))
    assert len(behind) > 100 and max(behind) <= 0.1 * np.mean(spread), (max(behind), np.mean(spread))
