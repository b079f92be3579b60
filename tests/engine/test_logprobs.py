"""Log-probabilities of the engine's answers, and scores of given continuations."""

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_requests import mixed, pictures, user

from smolvlm_jax import SmolVLMProcessor, generate, load, make_mesh, resolve, save_hf
from smolvlm_jax.engine import Engine, EngineConfig, Prepared, Request, SamplingParams, prepare
from smolvlm_jax.engine.requests import continuation_ids
from smolvlm_jax.errors import InputError

TOLERANCE = 2e-5
# One ring: few programs to compile.
SMALL = EngineConfig(ring_lengths=(256,), slots=(4,), prefill_tokens=256, encoder_tiles=2, chunk=3)


@pytest.fixture(scope="module")
def tiny():
    model, params = load("tiny")
    return model, params, SmolVLMProcessor.from_pretrained(resolve("tiny"))


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine(*tiny, SMALL)


def asking(request: Request, logprobs: int | None, **params) -> Request:
    return dataclasses.replace(request, params=dataclasses.replace(request.params, logprobs=logprobs, **params))


def worst(a, b) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max(initial=0))


# ---- of answers


def together(prompts: list[Prepared]) -> dict[str, np.ndarray]:
    """Prompts of unlike length and their tiles as one batch of `generate`."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    pad = lambda values, fill: np.stack([np.pad(x, (longest - len(x), 0), constant_values=fill) for x in values])
    mask = pad([np.ones_like(prompt.input_ids) for prompt in prompts], 0)
    tiles = np.concatenate([prompt.tiles for prompt in prompts if len(prompt.tiles)])
    return {"input_ids": pad([prompt.input_ids for prompt in prompts], 2), "attention_mask": mask, "pixel_values": tiles}


@pytest.mark.thorough
def test_they_are_those_of_generate_and_change_no_answer(tiny, engine):
    """Greedy and drawn, beside requests that ask for none or for more."""
    model, params, processor = tiny
    asked = mixed(processor, 12, seed=21)
    for hot in ({}, {"do_sample": True, "temperature": 2.0}):
        settings = [SamplingParams(8, ignore_eos=True, seed=i, logprobs=(None, 0, 3)[i % 3], **hot) for i in range(12)]
        requests = [dataclasses.replace(request, params=own) for request, own in zip(asked, settings, strict=True)]
        plain = {r.id: r.token_ids for r in engine.generate([asking(request, None) for request in requests])}
        options = {"max_new_tokens": 8, "eos_token_id": None, "logprobs": 3, "seed": list(range(12)), **hot}
        out = generate(model, params, **together([request.prepared for request in requests]), **options).logprobs
        for result in engine.generate(requests):
            n, wanted = result.id, settings[result.id].logprobs
            assert result.token_ids == plain[n] and result.error is None
            if wanted is None:
                assert result.logprobs is None and result.top_logprobs is None
                continue
            assert len(result.logprobs) == 8 and worst(result.logprobs, out.chosen[n]) < TOLERANCE
            if not wanted:
                assert result.top_logprobs is None
                continue
            best = np.asarray(result.top_logprobs)
            assert best.shape == (8, wanted, 2) and worst(best[..., 1], out.top[n, :, :wanted]) < TOLERANCE
            assert (best[:, 0, 1] >= result.logprobs).all()


def test_a_stop_string_cuts_them_too(tiny, engine):
    params = SamplingParams(24, ignore_eos=True, logprobs=2)
    free = Request(0, prepared=prepare(tiny[2], user(pictures(1, 4)[0])), params=params)
    (whole,) = engine.generate([free])
    (cut,) = engine.generate([dataclasses.replace(free, params=dataclasses.replace(params, stop=(whole.text[1:3],)))])
    assert 0 < cut.new_tokens < whole.new_tokens and cut.finish_reason == "stop"
    assert len(cut.logprobs) == len(cut.top_logprobs) == cut.new_tokens
    # The second request stands in other columns of the ring, where sums may be rounded otherwise.
    assert worst(cut.logprobs, whole.logprobs[: cut.new_tokens]) < TOLERANCE


@pytest.mark.thorough
def test_programs_without_them_compute_nothing_of_them(tiny, engine):
    """Greedy decoding takes no logarithm, and who asks for none gets programs without."""
    has_log = lambda *key: "stablehlo.log " in engine.programs.lower(*key).as_text()
    assert not has_log("decode", 256, True) and has_log("decode", 256, True, 0)
    for key in (("decode", 256, True), ("decode", 256, False), ("prefill", 64)):
        found = engine.programs.returns(*key)
        assert (found.logprobs if key[0] == "prefill" else found[2]) is None
    keys = [engine.programs.alternatives(asked) for asked in ([None], [], [None, 0], [1, 0], [9, None], [1024])]
    assert keys == [(), (), (0,), (8,), (16,), (min(1024, tiny[0].config.text_config.vocab_size),)]


# ---- of given continuations


def scored(processor, count: int, seed: int = 0) -> list[Request]:
    """Prompts of all kinds with continuations from one token to many."""
    rng = random.Random(seed)
    words = ["number", "larger", "which", " 42", "\n7", "first.", "\u00e9", "12 and 7", "."]
    text = lambda: " ".join(rng.choices(words, k=rng.choice([1, 1, 2, 5])))
    requests = mixed(processor, count, seed=seed)
    return [dataclasses.replace(request, params=SamplingParams(), continuation=text()) for request in requests]


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, **inputs):
    return model.apply({"params": params}, **inputs).logits


def by_forward(tiny, request: Request) -> tuple[list[float], bool]:
    """By our own forward pass over prompt and continuation, alone in a row with padding behind."""
    model, params, processor = tiny
    ids = request.continuation
    ids = continuation_ids(processor, ids) if isinstance(ids, str) else list(ids)
    prompt, tiles = request.prepared.input_ids, request.prepared.tiles
    row = np.zeros((1, 576), np.int32)
    row[0, : len(prompt) + len(ids)] = [*prompt, *ids]
    padded = np.zeros((16, *model.config.vision_config.tile_shape), np.uint8)
    padded[: len(tiles)] = tiles if len(tiles) else 0
    logits = forward(model, params, input_ids=row, pixel_values=padded, num_tiles=np.int32(len(tiles)))
    scores = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)))[len(prompt) - 1 :][: len(ids)]
    return scores[np.arange(len(ids)), ids].tolist(), bool((scores.argmax(-1) == ids).all())


@pytest.mark.thorough
def test_scores_are_those_of_a_forward_pass_in_the_order_of_the_requests(tiny, engine):
    requests = scored(tiny[2], 10)
    scores = list(engine.loglikelihood(requests))
    assert [score.id for score in scores] == list(range(10))
    for request, score in zip(requests, scores, strict=True):
        want, greedy = by_forward(tiny, request)
        assert score.error is None and worst(score.logprobs, want) < TOLERANCE and score.is_greedy == greedy
        assert abs(score.loglikelihood - sum(score.logprobs)) < 1e-9
        assert score.prompt_tokens == len(request.prepared.input_ids) and score.tiles == len(request.prepared.tiles)
        assert tiny[2].decode(list(score.token_ids)).lstrip() == request.continuation.lstrip()


@pytest.mark.thorough
def test_an_answer_is_scored_as_it_was_written(tiny, engine):
    """By its tokens, and by its text, which leaves out the token that ended it."""
    shown = [prepare(tiny[2], user(picture)) for picture in pictures(6, 31)]
    asked = [Request(i, prepared=prompt, params=SamplingParams(12, logprobs=0)) for i, prompt in enumerate(shown)]
    written = sorted(engine.generate(asked), key=lambda result: result.id)
    for part in ("token_ids", "text"):
        again = [
            Request(r.id, prepared=prompt, continuation=getattr(r, part)) for r, prompt in zip(written, shown, strict=True)
        ]
        for result, score in zip(written, engine.loglikelihood(again), strict=True):
            n = len(score.token_ids)
            assert score.is_greedy and score.token_ids == result.token_ids[:n] and n >= result.new_tokens - 1
            assert worst(score.logprobs, result.logprobs[:n]) < TOLERANCE


@pytest.mark.thorough
def test_a_score_depends_on_its_request_alone(tiny, engine):
    """Within the bound of logits: which rows stand beside it decides in which order a product is summed."""
    requests = scored(tiny[2], 24, seed=5)
    want = {score.id: score.logprobs for score in engine.loglikelihood(requests)}
    shuffled = random.Random(0).sample(requests, len(requests))
    got = list(engine.loglikelihood(shuffled))
    assert [score.id for score in got] == [request.id for request in shuffled]
    alone = [next(engine.loglikelihood([request])) for request in requests[:5]]
    assert all(worst(score.logprobs, want[score.id]) < TOLERANCE for score in (*got, *alone))


@pytest.mark.thorough
def test_rows_are_full_and_logits_few(tiny):
    """Requests fill packed rows, and of a long continuation the logits exist a block at a time."""
    engine = Engine(*tiny, EngineConfig(ring_lengths=(512,), slots=(1,), prefill_tokens=512))
    prompt = lambda n: Prepared.of(np.full(n, 40, np.int32))
    requests = [Request(i, prepared=prompt(20 + i % 13), continuation=[41, 42, 43][: 1 + i % 3]) for i in range(100)]
    assert not any(score.error for score in engine.loglikelihood(requests))
    assert engine.stats.summary()["prefill_padding_share"] < 0.15
    text, v = engine.programs.lower("score", 512).as_text(), tiny[0].config.text_config.vocab_size
    assert f"<1x128x{v}x" in text and f"<1x512x{v}x" not in text
    long = Request(0, prepared=prompt(13), continuation=[40 + n % 9 for n in range(500)])
    (score,) = engine.loglikelihood([long])
    assert worst(score.logprobs, by_forward(tiny, long)[0]) < TOLERANCE and score.prompt_tokens == 13


def test_what_is_wrong_with_a_request_is_its_score(tiny, engine):
    fine, image = prepare(tiny[2], user(text="one")), tiny[0].config.image_token_id
    shown = prepare(tiny[2], user(pictures(1, 5)[0]))
    without = dataclasses.replace(shown, tiles=shown.tiles[:0], digests=())
    long = Prepared.of(np.full(250, 40, np.int32))
    cases = [
        (Request("fine", prepared=fine, continuation="6"), None),
        (Request("none", prepared=fine), "no continuation"),
        (Request("empty", prepared=fine, continuation=""), "not empty"),
        (Request("no tokens", prepared=fine, continuation=()), "not empty"),
        (Request("too large", prepared=fine, continuation=[10**6]), "token ids"),
        (Request("no ids", prepared=fine, continuation=[0.5]), "token ids"),
        (Request("no text", prepared=fine, continuation=7), ""),
        (Request("image", prepared=fine, continuation=[image]), "image token"),
        (Request("sampled", prepared=fine, continuation="6", params=SamplingParams(do_sample=True)), "sampling"),
        (Request("no tiles", prepared=without, continuation="6"), "image tokens"),
        (Request("long", prepared=long, continuation=[40] * 8), "a continuation of 8 need 257 positions, and there are 256"),
        (Request("fits", prepared=long, continuation=[40] * 7), None),
        (Request("given", error="line 7 is broken"), "line 7 is broken"),
        ({"id": "no request"}, ""),
    ]
    requests = [request for request, _ in cases]
    for (request, words), score in zip(cases, engine.loglikelihood(requests), strict=True):
        assert score.id == getattr(request, "id", None)
        if words is None:
            assert score.error is None and score.loglikelihood < 0
        else:
            assert words in score.error and score.loglikelihood is None and score.is_greedy is None, score
    (refused,) = engine.generate(requests[:1])
    assert "loglikelihood()" in refused.error
    scores = engine.loglikelihood(scored(tiny[2], 8))
    next(scores)
    with pytest.raises(InputError, match="one generate"):
        next(engine.generate([Request(0, prepared=fine)]))
    scores.close()
    assert next(engine.loglikelihood(requests[:1])).error is None


def test_a_continuation_is_read_as_the_template_writes_an_answer(tiny):
    processor = tiny[2]
    ids = lambda text: processor.tokenizer.encode(text, add_special_tokens=False)
    question = user(text="12 and 7: which number is larger?")
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    for text in ("6", " 6", "12 and 7. The first.", "\u00e9 x", "\nA", "<end_of_utterance>"):
        whole = prompt + (text if text[0].isspace() else " " + text)
        assert ids(prompt) + continuation_ids(processor, text) == ids(whole), text
    answered = [*question, {"role": "assistant", "content": [{"type": "text", "text": "6"}]}]
    whole = ids(prompt) + continuation_ids(processor, "6")
    assert ids(processor.apply_chat_template(answered))[: len(whole)] == whole


@pytest.mark.thorough
def test_scores_are_the_references(tiny, engine, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference: pip install 'smolvlm-jax[test]'")
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    save_hf(tmp_path / "m", tiny[0], tiny[1])
    reference = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "m", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    requests = scored(tiny[2], 20, seed=9)
    for request, score in zip(requests, engine.loglikelihood(requests), strict=True):
        ids = torch.tensor([[*request.prepared.input_ids.tolist(), *score.token_ids]])
        tiles = request.prepared.tiles.astype(np.float32).transpose(0, 3, 1, 2)[None] / 255 * 2 - 1
        pixels = {"pixel_values": torch.tensor(tiles)} if len(request.prepared.tiles) else {}
        with torch.no_grad():
            logits = reference(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits
        logits, own = logits[0, score.prompt_tokens - 1 : -1], torch.tensor(score.token_ids)
        want = torch.log_softmax(logits.float(), -1)[torch.arange(len(own)), own].numpy()
        assert worst(score.logprobs, want) < TOLERANCE
        assert score.is_greedy == bool((logits.argmax(-1) == own).all())


@pytest.mark.slow
def test_on_a_mesh(tiny, engine):
    requests = scored(tiny[2], 20, seed=7)
    answers = [asking(request, 3) for request in mixed(tiny[2], 20, seed=7)]
    want = {score.id: score.logprobs for score in engine.loglikelihood(requests)}
    told = {result.id: (result.token_ids, result.logprobs) for result in engine.generate(answers)}
    mesh = make_mesh(2, 2, 2)
    model, params = load("tiny", mesh=mesh)
    parallel = Engine(model, params, tiny[2], dataclasses.replace(SMALL, slots=(8,)), mesh)
    scores = list(parallel.loglikelihood(requests))
    assert [score.id for score in scores] == [request.id for request in requests]
    assert all(score.error is None and worst(score.logprobs, want[score.id]) < TOLERANCE for score in scores)
    for result in parallel.generate(answers):
        tokens, logprobs = told[result.id]
        assert result.token_ids == tokens and worst(result.logprobs, logprobs) < TOLERANCE
