"""The engine against `generate`: an answer depends on its request alone."""

import dataclasses
import json
import random
import shutil
import warnings

import jax
import numpy as np
import pytest
from engine_requests import SMALL, mixed, pictures, user
from tiers import fast_first

from smolvlm_jax import SmolVLMProcessor, generate, load, make_mesh, resolve
from smolvlm_jax.engine import Engine, EngineConfig, Prepared, Request, SamplingParams, prepare
from smolvlm_jax.errors import InputError
from smolvlm_jax.parameters import flat_scales, fused, quantize_params


@pytest.fixture(scope="module")
def tiny():
    model, params = load("tiny")
    return model, params, SmolVLMProcessor.from_pretrained(resolve("tiny"))


@pytest.fixture(scope="module")
def engine(tiny):
    engine = Engine(*tiny, SMALL)
    engine.warm_up()
    return engine


def alone(tiny, request: Request) -> list[int]:
    """What `generate` answers to this request, without what follows its stop token."""
    model, params, _ = tiny
    p, prepared = request.params, request.prepared
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = {name: value for name in names if (value := getattr(p, name)) is not None}
    stops = model.generation_config.eos_token_id
    config = model.generation_config.replace(max_new_tokens=p.max_new_tokens, **sampling)
    if p.ignore_eos:
        config = config.replace(eos_token_id=None)
    pixels = {"pixel_values": prepared.tiles} if len(prepared.tiles) else {}
    ids = prepared.input_ids[None]
    out = generate(model, params, ids, np.ones_like(ids), **pixels, generation_config=config, seed=[p.seed])[
        0, ids.shape[1] :
    ].tolist()
    if p.ignore_eos:
        return out
    end = next((i + 1 for i, token in enumerate(out) if token in stops), len(out))
    return out[:end]


@pytest.mark.thorough
def test_answers_are_those_of_generate_in_any_order_and_company(tiny, engine):
    requests = mixed(tiny[2], 60)
    want = {request.id: alone(tiny, request) for request in requests}
    for order in range(3):
        shuffled = random.Random(order).sample(requests, len(requests) - 20 * order)
        results = list(engine.generate(shuffled))
        assert sorted(r.id for r in results) == sorted(r.id for r in shuffled)
        for result in results:
            request = requests[result.id]
            assert list(result.token_ids) == want[result.id]
            assert result.error is None and result.new_tokens == len(want[result.id])
            assert result.prompt_tokens == len(request.prepared.input_ids) and result.tiles == len(request.prepared.tiles)
            full = result.new_tokens == request.params.max_new_tokens
            assert result.finish_reason == "stop" or (result.finish_reason == "length" and full)


@pytest.mark.thorough
@pytest.mark.parametrize("other", [
    EngineConfig(ring_lengths=(128, 512), slots=(2, 9), chunk=16, run_ahead=2, lookahead=3, feature_places=1),
    *(EngineConfig(ring_lengths=(128,), slots=(n,), prefill_tokens=128) for n in (1, 2, 7, 8, 64)),
])  # fmt: skip
def test_settings_change_speed_alone(tiny, engine, other):
    """Whatever number of rows decode together, however many steps or requests ahead."""
    requests = mixed(tiny[2], 70, seed=1)
    want = {r.id: (r.token_ids, r.text, r.finish_reason) for r in engine.generate(requests)}
    got = {r.id: (r.token_ids, r.text, r.finish_reason) for r in Engine(*tiny, other).generate(requests)}
    assert got == want


@pytest.mark.thorough
def test_layouts_of_accelerators_change_no_answer(tiny, monkeypatch):
    """The engine's own tree of weights in 8 bits, as it is on a TPU: projections of one input joined, scales as vectors."""
    model, params, processor = tiny
    params = quantize_params(model, params)
    requests = mixed(processor, 12, seed=5, limit=20)
    wanted = {r.id: r.token_ids for r in Engine(model, params, processor, SMALL).generate(requests)}
    laid_out = lambda tree: flat_scales(fused(tree, ("cpu",)), "cpu")
    monkeypatch.setattr("smolvlm_jax.engine.engine.laid_out", laid_out)
    monkeypatch.setattr("smolvlm_jax.engine.compiled.laid_out", laid_out)
    engine = Engine(model, params, processor, SMALL)
    assert "qkv_proj" in engine.params["model"]["text_model"]["layers_0"]["self_attn"]
    assert {r.id: r.token_ids for r in engine.generate(requests)} == wanted


@pytest.mark.thorough
def test_bfloat16_drifts_within_bounds(tiny, engine):
    """In bf16 a row's neighbours may tip a near-tie, but answers of the trained model stay what they are in float32, nearly
    all of them."""
    requests = [
        Request(i, prepared=prepare(tiny[2], user(p)), params=SamplingParams(8)) for i, p in enumerate(pictures(60, 11))
    ]
    want = {r.id: r.text for r in engine.generate(requests)}
    half = Engine.from_pretrained("tiny", dtype="bfloat16", ring_lengths=(64,), slots=(16,))
    got = {r.id: r.text for r in half.generate(requests)}
    assert sum(got[i] == want[i] for i in want) >= 0.9 * len(want)
    alone = [next(half.generate([request])).text for request in requests[:20]]
    assert sum(alone[i] == got[i] for i in range(20)) >= 18


@pytest.mark.thorough
def test_a_request_draws_by_its_seed_whatever_stands_beside_it(tiny, engine):
    base = mixed(tiny[2], 12, seed=2)
    kinds = [
        SamplingParams(12, do_sample=True, seed=3, ignore_eos=True),
        SamplingParams(12, do_sample=True, seed=4, temperature=1.5, top_k=7, ignore_eos=True),
        SamplingParams(12, do_sample=True, seed=5, top_p=0.8, ignore_eos=True),
        SamplingParams(12, do_sample=True, seed=2**32 - 1, min_p=0.1, temperature=2.0, ignore_eos=True),
        SamplingParams(12, repetition_penalty=1.7, ignore_eos=True),
        SamplingParams(12, do_sample=True, seed=6, top_k=0, ignore_eos=True),
        SamplingParams(12, ignore_eos=True),
    ]
    requests = [dataclasses.replace(r, params=kinds[i % len(kinds)]) for i, r in enumerate(base)]
    for result in engine.generate(requests):
        assert list(result.token_ids) == alone(tiny, requests[result.id]), requests[result.id].params


DEFAULTS = [
    {},
    {"do_sample": True, "top_k": 3, "temperature": 5.0},
    {"do_sample": True, "top_p": 0.9, "min_p": 0.05, "temperature": 5.0},
    {"repetition_penalty": 1.6},
]


@pytest.mark.thorough
@pytest.mark.parametrize("defaults", fast_first(1, DEFAULTS))
def test_the_checkpoints_defaults_count_in_generate_and_in_the_engine(tiny, tmp_path, defaults):
    """The same sampled request is answered alike, whether a setting comes from the request, the checkpoint, or from neither."""
    shutil.copytree(resolve("tiny"), tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **defaults}))
    engine = Engine.from_pretrained(tmp_path / "model", ring_lengths=(256,), slots=(4,))
    model, params = engine.model, engine.params
    hot = {"do_sample": True, "temperature": 5.0}
    own = [{}, hot, {"do_sample": True}, {"do_sample": True, "top_k": 7}, {"do_sample": False, "repetition_penalty": 1.0}]
    prepared = [prepare(tiny[2], user(p)) for p in pictures(2, 3)]
    answers = {}
    for given in own:
        for seed, prompt in enumerate(prepared):
            settings = SamplingParams(16, seed=seed, ignore_eos=True, **given)
            (result,) = engine.generate([Request(0, prepared=prompt, params=settings)])
            ids = prompt.input_ids[None]
            options = {"max_new_tokens": 16, "eos_token_id": None, **given}
            tokens = generate(model, params, ids, np.ones_like(ids), prompt.tiles, seed=[seed], **options)
            assert list(result.token_ids) == tokens[0, ids.shape[1] :].tolist(), (given, seed)
            answers[str(given), seed] = result.token_ids
    greedy = answers[str(own[-1]), 0]
    assert (answers[str({}), 0] == greedy) == (not defaults), "the checkpoint's defaults change the answer"
    assert answers[str(hot), 0] != greedy


@pytest.mark.thorough
def test_the_checkpoints_restrictions_hold_in_the_engine_too(tiny, tmp_path, caplog):
    """Forbidden words of one token and of several, across the prompt's end too, and the least length, in packed prompts."""
    prepared = [prepare(tiny[2], user(text=f"Which number is larger than {n}?")) for n in range(5)]
    assert len({len(prompt.input_ids) for prompt in prepared}) == 1  # one program of `generate` serves all
    plain = [alone(tiny, Request(0, prepared=prompt, params=SamplingParams(12))) for prompt in prepared]
    ids = [prompt.input_ids.tolist() for prompt in prepared]
    words = [[ids[0][-1], plain[0][0]], [*ids[1][-2:], plain[1][0]], plain[2][:2], [plain[3][1]]]
    asked = {"bad_words_ids": words, "min_length": len(ids[0]) + 9, "max_length": 64}
    shutil.copytree(resolve("tiny"), tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **asked}))
    engine = Engine.from_pretrained(tmp_path / "model", ring_lengths=(128,), slots=(3,), prefill_tokens=128)
    assert "without effect" in caplog.text and "max_length=64" in caplog.text and "min_length" not in caplog.text
    settings = [SamplingParams(12), SamplingParams(12, do_sample=True, temperature=5.0, seed=3)]
    requests = [Request((n, k), prepared=p, params=s) for n, p in enumerate(prepared) for k, s in enumerate(settings)]
    found = {result.id: list(result.token_ids) for result in engine.generate(requests)}
    assert found == {request.id: alone((engine.model, engine.params, tiny[2]), request) for request in requests}
    assert sum(found[n, 0] != plain[n] for n in range(5)) >= 4


def test_nothing_is_compiled_after_warm_up(tiny, engine):
    """500 random requests, of which jax itself says that it compiled nothing."""
    compiled = []
    listen = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    requests = mixed(tiny[2], 500, seed=3, limit=60)
    before = engine.programs.compilations
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert len(list(engine.generate(requests))) == 500
        assert not compiled and engine.programs.compilations == before == len(engine.programs.keys())
        jax.jit(lambda x: x * 3 + 5)(np.ones(7))
        assert compiled, "the listener hears compilations"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_identical_pictures_are_encoded_once(tiny):
    shown = pictures(3, 9)
    distinct = {d for p in shown for d in prepare(tiny[2], user(p)).digests}
    engine = Engine(*tiny, SMALL)
    requests = [Request(i, user(shown[i % 3]), params=SamplingParams(9)) for i in range(30)]
    assert {r.error for r in engine.generate(requests)} == {None}
    assert engine.stats.encoded_tiles == len(distinct) < engine.stats.tiles


def test_stop_strings_end_an_answer_wherever_chunks_end(tiny, engine):
    picture = pictures(1, 4)[0]
    free = SamplingParams(24, ignore_eos=True)
    prepared = prepare(tiny[2], user(picture))
    whole = next(engine.generate([Request(0, prepared=prepared, params=free)]))
    for stop in {whole.text[i : i + n] for n in (1, 2, 3) for i in range(len(whole.text) - n)} - {" "}:
        if not stop.strip():
            continue
        params = dataclasses.replace(free, stop=("no such thing", stop))
        result = next(engine.generate([Request(0, prepared=prepared, params=params)]))
        assert result.text == whole.text[: whole.text.index(stop)].strip() and result.finish_reason == "stop"
        text = lambda ids: tiny[2].decode(list(ids), skip_special_tokens=True).lstrip()
        assert stop in text(result.token_ids) and stop not in text(result.token_ids[:-1])
        assert result.token_ids == whole.token_ids[: result.new_tokens]


def test_endless_repetition_ends(tiny, engine):
    """An untrained model that must go on repeats itself; without the stop it runs to the limit."""
    request = Request(0, user(text="one"), params=SamplingParams(200, ignore_eos=True, repetition_window=16))
    result = next(engine.generate([request]))
    assert result.finish_reason == "repetition" and result.new_tokens < 200
    tail = result.token_ids[-16:]
    assert any(tail[p:] == tail[:-p] for p in range(1, 5))
    off = dataclasses.replace(request, params=dataclasses.replace(request.params, repetition_window=0))
    longer = next(engine.generate([off]))
    assert longer.finish_reason == "length" and longer.token_ids[: result.new_tokens] == result.token_ids


class Raises:
    """Raises something of its own whatever is asked of it."""

    def __getattr__(self, name):
        raise RuntimeError("odd")


def test_what_is_wrong_with_a_request_is_its_result(tiny, engine):
    good = prepare(tiny[2], user(pictures(1, 5)[0]))
    prompt = lambda length, kind=np.int32: Prepared(np.full(length, 40, kind), good.tiles[:0], ())
    few = SamplingParams(4)
    requests = [
        Request("long", prepared=prompt(256), params=SamplingParams(1)),
        Request("no tiles", prepared=dataclasses.replace(good, tiles=good.tiles[:-1], digests=good.digests[:-1]), params=few),
        Request("no such id", prepared=Prepared(np.array([1, 10**6], np.int32), good.tiles[:0], ()), params=few),
        Request("no file", [{"role": "user", "content": [{"type": "image", "path": "no/such.png"}]}]),
        Request("fine", prepared=good, params=SamplingParams(8)),
        Request("fits", prepared=prompt(250), params=SamplingParams(6)),
        Request("whole context", prepared=prompt(100), params=SamplingParams(10**30, ignore_eos=True, repetition_window=0)),
        Request("no whole numbers", prepared=prompt(5, np.float32), params=few),
        Request("no numbers", prepared=Prepared(None, None, None), params=few),
        Request("no arrays", prepared=b"arrays", params=few),
        Request("tiles of floats", prepared=dataclasses.replace(good, tiles=good.tiles / 255), params=few),
        Request("no digests", prepared=dataclasses.replace(good, digests=tuple(map(str, good.digests))), params=few),
        Request("no parameters", prepared=good, params={"max_new_tokens": 4}),
        Request("no messages", messages=7),
        Request("no text", messages=[{"role": "user", "content": [Raises()]}]),
        Request("odd", messages=[Raises()]),
        {"id": "no request"},
    ]
    results = {r.id: r for r in engine.generate(requests)}
    assert len(results) == len(requests)
    for name, words in [
        ("long", "prompt too long: 256 tokens and an answer of at least one need 257 positions, and there are 256"),
        ("no tiles", "image tokens"),
        ("no such id", "input_ids"),
        ("no file", "no/such.png"),
        ("no whole numbers", "input_ids"),
        ("no numbers", "input_ids"),
        ("no arrays", "bytes"),
        ("tiles of floats", "uint8"),
        ("no digests", "digests"),
        ("no parameters", "params is a dict: pass SamplingParams(max_new_tokens=64), say"),
        ("no messages", ""),
        ("no text", "item"),
        ("odd", ""),
        (None, "a request is a dict: pass Request(id, messages=…)"),
    ]:
        result = results[name]
        assert words in result.error and result.text is None and result.finish_reason == "error", result
    assert results["fine"].error is None and results["fits"].error is None
    whole = results["whole context"]
    assert (whole.new_tokens, whole.finish_reason) == (156, "length")
    assert list(whole.token_ids) == alone(tiny, Request(0, prepared=prompt(100), params=SamplingParams(156, ignore_eos=True)))


def test_a_request_with_an_error_comes_back_in_its_turn(tiny, engine):
    """Also where nothing but errors, or nothing beside them, is asked; never is one of them run."""
    good, before = prepare(tiny[2], user(text="one")), engine.stats.errors
    requests = [
        Request(i, error=f"line {i} is broken") if i % 3 else Request(i, prepared=good, params=SamplingParams(4))
        for i in range(200)
    ]
    results = list(engine.generate(requests))
    assert sorted(r.id for r in results) == list(range(200)) and engine.stats.errors == before + 133
    for result in results:
        if result.id % 3:
            assert (result.error, result.text, result.finish_reason) == (f"line {result.id} is broken", None, "error")
            assert (result.prompt_tokens, result.new_tokens, result.tiles, result.token_ids) == (0, 0, 0, ())
        else:
            assert result.error is None
    broken = [r.id for r in results if r.id % 3]
    assert broken == sorted(broken)
    assert [r.id for r in engine.generate(requests[1:3])] == [1, 2]
    for wrong in ({}, {"prepared": good, "error": "why"}, {"messages": user(text="one"), "error": "why"}):
        with pytest.raises(InputError, match="exactly one"):
            Request(1, **wrong)


def test_leaving_early_and_failing_inputs_leave_the_engine_usable(tiny, engine):
    requests = mixed(tiny[2], 30, seed=6)
    want = {r.id: r.token_ids for r in engine.generate(requests)}
    results = engine.generate(iter(requests))
    next(results)
    with pytest.raises(InputError, match="one generate"):
        next(engine.generate(requests))
    results.close()
    assert {r.id: r.token_ids for r in engine.generate(requests)} == want

    with pytest.raises(InputError, match="requests are a NoneType"):
        list(engine.generate(None))

    def failing():
        yield from requests[:5]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(engine.generate(failing()))
    assert {r.id: r.token_ids for r in engine.generate(requests)} == want


def test_requests_are_read_as_they_are_needed(tiny, engine):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield Request(read, user(text="one"), params=SamplingParams(3))

    results = engine.generate(endless())
    for _ in range(50):
        next(results)
    results.close()
    assert read <= 50 + 2 * engine.config.lookahead + sum(engine.config.slots) + 64


def test_few_requests_have_a_decode_program_of_their_own(tiny, engine):
    """Which one runs changes no answer, and it is compiled only where the other one is not there and not needed soon."""
    kinds = lambda engine: [key[0] for key in engine.programs._done if key[0].startswith("decode")]
    requests = mixed(tiny[2], 24, seed=5)
    want = {result.id: list(result.token_ids) for result in engine.generate(requests)}

    def check(engine, *some):
        found = {result.id: list(result.token_ids) for result in engine.generate(some)}
        assert found == {request.id: want[request.id] for request in some}

    sizes = EngineConfig(ring_lengths=(256,), slots=(16,), chunk=3)
    engine = Engine(*tiny, sizes)
    longer = [request for request in requests if request.params.max_new_tokens > 1]
    for request in longer[:3]:
        check(engine, request)
    assert kinds(engine) == ["decode_few"]
    rows, steps = engine.stats.decode_rows, engine.stats.decode_steps
    assert rows == 2 * steps, "two rows of sixteen were decoded"
    check(engine, *requests)
    assert sorted(kinds(engine)) == ["decode", "decode_few"]
    for request in longer[3:6]:
        check(engine, request)
    check(engine, *longer[:2])
    many = Engine(*tiny, sizes)
    check(many, *requests)
    check(many, longer[0])
    assert kinds(many) == ["decode"]


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1)])
def test_on_a_mesh(tiny, engine, shape):
    requests = mixed(tiny[2], 40, seed=7)
    want = {r.id: r.token_ids for r in engine.generate(requests)}
    mesh = make_mesh(*shape)
    model, params = load("tiny", mesh=mesh)
    lanes = shape[0] * shape[1]
    config = dataclasses.replace(SMALL, slots=(2 * lanes, lanes, lanes))
    parallel = Engine(model, params, tiny[2], config, mesh)
    got = {r.id: r.token_ids for r in parallel.generate(requests)}
    assert got == want
    keys = parallel._rings[0].state.cache.layers[0].keys
    assert keys.sharding.shard_shape(keys.shape)[0] == 2


def test_settings_that_change_nothing_are_warned_of_once(tiny, engine):
    """Not with every request, nor those that ask for nothing, nor where the answer is drawn."""
    ask = lambda **given: [Request(n, user(text="2"), params=SamplingParams(3, **given)) for n in range(3)]
    fresh = Engine(engine.model, engine.params, engine.processor, SMALL)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        plain = list(fresh.generate(ask() + ask(top_p=1.0, temperature=1)))
        drawn = list(fresh.generate(ask(do_sample=True, temperature=0.5)))
        assert not found and len(drawn) == 3
        idle = list(fresh.generate(ask(temperature=0.5) + ask(temperature=0.25, top_k=3)))
    assert {result.token_ids for result in idle} == {result.token_ids for result in plain}
    said = sorted(str(one.message) for one in found)
    assert said == [f"{given} has no effect without do_sample=True" for given in ("temperature=0.5", "top_k=3")]


@pytest.mark.parametrize("call", ["generate", "loglikelihood"])
def test_what_is_no_iterable_of_requests_is_refused_at_once(engine, call):
    """And not with an error for each character of a text; the engine stays usable. Items that are no requests have errors."""
    answer = getattr(engine, call)
    for wrong in ("hello", b"hello", user(text="2")[0], Request(0, user(text="2")), 7, None):
        with pytest.raises(InputError, match=rf"requests are a {type(wrong).__name__}: pass .* of Request\(id, messages=…\)"):
            list(answer(wrong))
    for wrong in (["hello"], [user(text="2")], [{"messages": user(text="2")}]):
        (result,) = answer(wrong)
        assert result.error.endswith(f"a request is a {type(wrong[0]).__name__}: pass Request(id, messages=…)")
