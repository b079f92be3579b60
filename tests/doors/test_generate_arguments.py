"""Arguments of transformers' generate: used, neutral, or refused by name; and what they do, beside the reference."""

import inspect
import logging
import warnings

import jax
import numpy as np
import pytest

from smolvlm_jax import GenerateOutput, GenerationConfig, generate, stream
from smolvlm_jax.doors import LoadedModel
from smolvlm_jax.errors import ArgumentError, InputError
from smolvlm_jax.generation_habits import OF_A_CALL, OTHERS
from smolvlm_jax.habits import ANY

IDS = np.array([[1, 5, 9, 11, 7, 30]])


def ours(tiny, **options):
    return generate(tiny.model, tiny.params, **{"input_ids": IDS, "max_new_tokens": 6, **options})


def fields():
    return set(GenerationConfig.__dataclass_fields__)


def test_every_argument_of_the_reference_is_used_neutral_or_refused():
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    of_the_call = inspect.signature(transformers.generation.GenerationMixin.generate).parameters
    of_the_config = vars(transformers.GenerationConfig())
    defaults = transformers.GenerationConfig()._get_default_generation_params()
    names = {*of_the_call, *of_the_config} - {"self", "kwargs", "generation_config"}
    table = {**OTHERS, **OF_A_CALL}
    assert not names - {*table, *fields()}, "names that nothing knows"
    for name in names - fields():
        # what the reference has by default, and what asks for nothing
        for value in (None, defaults.get(name), *table[name].values):
            assert GenerationConfig().replace(**{name: value}) == GenerationConfig(), name
        if table[name].values is not ANY:
            with pytest.raises(InputError, match=f"does not support {name}="):
                GenerationConfig().replace(**{name: object()})
    for name in fields():
        GenerationConfig().replace(**{name: None})
    with pytest.raises(InputError, match="did you mean 'max_new_tokens'"):
        GenerationConfig().replace(max_new_token=3)


def test_none_is_off_and_numpys_numbers_are_numbers():
    off = GenerationConfig(do_sample=True).replace(
        temperature=None, top_k=None, top_p=None, min_p=None, repetition_penalty=None
    )
    assert (off.temperature, off.top_k, off.top_p, off.min_p, off.repetition_penalty) == (1, 0, 1, 0, 1)
    numbers = dict(max_new_tokens=np.int64(7), temperature=np.float32(0.5), top_k=np.int32(3), do_sample=np.bool_(True))
    made = GenerationConfig(
        eos_token_id=np.array([4, 5]), pad_token_id=jax.numpy.int32(2), bad_words_ids=[[np.int64(3)]], **numbers
    )
    assert made == GenerationConfig(
        max_new_tokens=7, temperature=0.5, top_k=3, do_sample=True, eos_token_id=(4, 5), pad_token_id=2, bad_words_ids=[[3]]
    )
    assert all(type(getattr(made, name)) in (int, float, bool) for name in numbers) and hash(made)
    for wrong in ({"bad_words_ids": [3]}, {"bad_words_ids": [[]]}, {"num_return_sequences": 0}, {"max_length": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            GenerationConfig(**wrong)


def test_a_config_of_transformers_is_taken(caplog):
    theirs = pytest.importorskip("transformers").GenerationConfig(max_new_tokens=3, num_beams=4, eos_token_id=9)
    with caplog.at_level(logging.WARNING):
        made = GenerationConfig.of(theirs)
    assert made.max_new_tokens == 3 and made.stop_tokens == (9,) and "num_beams=4" in caplog.text
    assert GenerationConfig.of({"max_new_tokens": 3}) == GenerationConfig(max_new_tokens=3)
    with pytest.raises(InputError, match="generation_config"):
        GenerationConfig.of(7)


def test_lengths_count_as_in_the_reference():
    config = GenerationConfig(max_length=30, min_length=12)
    assert config.max_new_tokens is None and config.for_prompt(10).max_new_tokens == 20
    assert config.for_prompt(10).min_new_tokens == 2
    assert GenerationConfig(max_length=30, max_new_tokens=4).for_prompt(10).max_new_tokens == 4
    assert GenerationConfig(max_new_tokens=4).replace(max_length=30).for_prompt(10).max_new_tokens == 20
    assert GenerationConfig().max_new_tokens == 20
    with pytest.raises(InputError, match="max_length=10"):
        GenerationConfig(max_length=10).for_prompt(10)


@pytest.mark.thorough
def test_restrictions_and_scores_are_the_references(tiny_a):
    torch = pytest.importorskip("torch", reason="the reference: pip install 'smolvlm-jax[test]'")
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tiny_a.directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    free = ours(tiny_a, eos_token_id=None)[0, 6:].tolist()
    stop = free[1]
    cases = [
        dict(max_length=11, eos_token_id=None),
        dict(min_new_tokens=4, eos_token_id=[stop]),
        dict(min_length=9, eos_token_id=[stop], max_new_tokens=6),
        # a token; two of which the first has to be written; two that the prompt begins; a stop token, which is let through
        dict(bad_words_ids=[[free[0]], [free[2], free[3]], [30, free[1]], [stop]], eos_token_id=[stop], max_new_tokens=5),
        dict(repetition_penalty=1.5, eos_token_id=None, max_new_tokens=4),
    ]
    for case in cases:
        limit = {} if {"max_length", "max_new_tokens"} & set(case) else {"max_new_tokens": 6}
        case = {**limit, **case, "pad_token_id": 2, "do_sample": False}
        asked = {**case, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        with torch.no_grad():
            theirs = model.generate(torch.tensor(IDS), attention_mask=torch.ones(IDS.shape, dtype=torch.long), **asked)
        got = generate(tiny_a.model, tiny_a.params, IDS, **asked)
        assert isinstance(got, GenerateOutput) and np.array_equal(got["sequences"], theirs.sequences.numpy()), case
        assert np.array_equal(got.sequences, generate(tiny_a.model, tiny_a.params, IDS, **case)), case
        assert len(got.scores) == len(theirs.scores) == len(got.logits) == len(theirs.logits)
        for a, b in zip((*got.scores, *got.logits), (*theirs.scores, *theirs.logits), strict=True):
            b = b.numpy()
            assert np.array_equal(np.isinf(a), np.isinf(b)) and np.abs(a[np.isfinite(b)] - b[np.isfinite(b)]).max() < 2e-5, case
    embeds = np.asarray(model.get_input_embeddings()(torch.tensor(IDS)).detach())
    with torch.no_grad():
        theirs = model.generate(inputs_embeds=torch.tensor(embeds), max_new_tokens=4, do_sample=False, eos_token_id=None)
    got = generate(tiny_a.model, tiny_a.params, inputs_embeds=embeds, max_new_tokens=4, eos_token_id=None)
    assert np.array_equal(got, theirs.numpy()) and got.shape == (1, 4)
    both = generate(tiny_a.model, tiny_a.params, IDS, inputs_embeds=embeds, max_new_tokens=4, eos_token_id=None)
    assert np.array_equal(both, np.concatenate([IDS, got], axis=1))


@pytest.mark.thorough
def test_several_answers_to_a_prompt_see_its_pictures(tiny_a):
    prompt = dict(input_ids=tiny_a.batch_ids, attention_mask=tiny_a.batch_mask, pixel_values=tiny_a.batch_pixels)
    options = dict(do_sample=True, top_k=5, max_new_tokens=5, seed=[3, 4], eos_token_id=None)
    got = ours(tiny_a, **prompt, **options, num_return_sequences=3)
    assert got.shape[0] == 6 and np.array_equal(got[::3], ours(tiny_a, **prompt, **options))
    assert len({tuple(row) for row in got[:3].tolist()}) > 1
    again = {key: np.repeat(value, 3, axis=0) for key, value in prompt.items()}
    greedy = dict(do_sample=True, top_k=1, max_new_tokens=5, eos_token_id=None)
    assert np.array_equal(ours(tiny_a, **prompt, **greedy, num_return_sequences=3), ours(tiny_a, **again, **greedy))


def test_what_contradicts_itself_is_refused(tiny_a):
    embeds = np.zeros((1, 6, tiny_a.model.config.text_config.hidden_size), np.float32)
    for options, words in (
        ({"num_return_sequences": 2}, "do_sample"),
        ({"input_ids": None}, "input_ids or inputs_embeds"),
        ({"inputs_embeds": embeds[:, :3]}, "inputs_embeds"),
        ({"inputs_embeds": embeds[..., :3]}, "inputs_embeds must have shape"),
        ({"max_length": 6, "max_new_tokens": None}, "max_length=6"),
        ({"inputs": IDS}, "it is called input_ids"),
        ({"streamer": object()}, "stream"),
        ({"num_beams": 4}, "num_beams=4; there is greedy search, and sampling: do_sample=True, top_p="),
    ):
        with pytest.raises(InputError, match=words):
            ours(tiny_a, **options)
    with pytest.raises(InputError, match="return_dict_in_generate"):
        stream(tiny_a.model, tiny_a.params, IDS, return_dict_in_generate=True)


def warned(function, *args, **kwargs):
    """The warnings of a call, each with the file that it names as its place."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        value = function(*args, **kwargs)
    return value, [(str(one.message), one.filename) for one in found]


def test_settings_that_change_nothing_are_warned_of(tiny_a):
    """Where the caller gives them, and not where the checkpoint has them; the tokens are the same."""
    plain, none = warned(ours, tiny_a)
    assert not none
    idle = dict(temperature=0.2, top_p=0.1, top_k=3, min_p=0.3)
    loaded = LoadedModel(tiny_a.model, tiny_a.params)
    of_a_config = lambda: generate(*loaded, IDS, generation_config=GenerationConfig(max_new_tokens=6, **idle))
    for call in (
        lambda: ours(tiny_a, **idle),
        lambda: loaded.generate(IDS, max_new_tokens=6, do_sample=False, **idle),
        lambda: list(stream(*loaded, IDS, max_new_tokens=6, **idle)),
        of_a_config,
    ):
        _, said = warned(call)
        want = {(f"{name}={value} has no effect without do_sample=True", __file__) for name, value in idle.items()}
        assert set(said) == want and len(said) == len(want)
    assert np.array_equal(warned(of_a_config)[0], plain)
    assert not warned(ours, tiny_a, **idle, do_sample=True)[1]
    assert not warned(ours, tiny_a, temperature=1.0, top_p=1.0, top_k=50, min_p=None)[1]
    theirs = LoadedModel(tiny_a.model.clone(), tiny_a.params)
    object.__setattr__(theirs.model, "generation_config", GenerationConfig(**idle))
    assert not warned(theirs.generate, IDS, max_new_tokens=6)[1]
    assert not warned(theirs.generate, IDS, generation_config=theirs.generation_config.replace(max_new_tokens=6))[1]
    for name in ("output_scores", "output_logits"):
        got, said = warned(ours, tiny_a, **{name: True})
        assert said == [(f"{name}=True has no effect without return_dict_in_generate=True", __file__)]
        assert np.array_equal(got, plain)


@pytest.mark.parametrize("left", [1, 4])
def test_a_limit_beyond_the_positions_is_warned_of(tiny_a, left):
    positions = tiny_a.model.config.text_config.max_position_embeddings
    ids = np.full((2, positions - left), 5)
    mask = np.ones_like(ids)
    mask[1, : positions // 2] = 0  # the longest prompt has the least room
    options = dict(input_ids=ids, attention_mask=mask, eos_token_id=None)
    words = f"the prompt leaves {left} of the model's {positions:,} positions, where answers end"
    for limit in ({"max_new_tokens": left + 1}, {"max_length": positions + 1, "max_new_tokens": None}):
        name, value = next(iter(limit.items()))
        _, said = warned(ours, tiny_a, **options, **limit)
        assert said == [(f"{name}={value}: {words}", __file__)]
    for limit in ({"max_new_tokens": left}, {"max_length": positions, "max_new_tokens": None}):
        assert not warned(ours, tiny_a, **options, **limit)[1]


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.eval_shape])
@pytest.mark.parametrize("function", [generate, stream])
def test_a_call_within_a_transformation_says_that_it_takes_arrays(tiny_a, transform, function):
    call = lambda ids: function(tiny_a.model, tiny_a.params, ids)
    run = jax.eval_shape if transform is jax.eval_shape else lambda inner, ids: transform(inner)(ids)
    with pytest.raises(
        InputError, match=f"{function.__name__} is compiled itself, and takes arrays: call it outside of jax.jit"
    ):
        run(call, IDS[None])
    with pytest.raises(InputError, match="takes arrays"):  # the parameters alone
        jax.jit(lambda params: function(tiny_a.model, params, IDS))(tiny_a.params)


def test_a_misspelt_name_is_answered_with_the_nearest(tiny_a):
    """Of all names that the call has, wherever they are declared: any letter may be missing."""
    given = ["input_ids", "inputs_embeds", "attention_mask", "pixel_values", "pixel_attention_mask", "num_tiles"]
    apply = lambda **wrong: tiny_a.model.apply({"params": tiny_a.params}, IDS, **wrong)
    for call, names in (
        (apply, given),
        (lambda **wrong: ours(tiny_a, **wrong), [*given, "generation_config", "kv_cache_dtype"]),
    ):
        for name in names:
            for wrong in (name[:-1], name[:-2] + name[-1], name[1:]):
                with pytest.raises(ArgumentError, match=f"has no argument '{wrong}'; did you mean '{name}'"):
                    call(**{wrong: 1})
