"""Log-probabilities of `generate` and `stream`: of the model's own logits, whatever is asked of the draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import fast_first

from smolvlm_jax import GenerateOutput, generate, stream
from smolvlm_jax.errors import InputError
from smolvlm_jax.logprobs import token_logprobs

TOLERANCE = 2e-5
# Of the draw, none of which changes the distribution that is reported.
SETTINGS = [
    {},
    {"do_sample": True, "temperature": 3.0, "top_k": 7, "seed": 5},
    {"repetition_penalty": 1.8, "min_new_tokens": 3, "bad_words_ids": [[5]]},
]


def prompt(tiny):
    return dict(input_ids=tiny.batch_ids, attention_mask=tiny.batch_mask, pixel_values=tiny.batch_pixels)


def ask(tiny, **options):
    return generate(tiny.model, tiny.params, **prompt(tiny), **{"max_new_tokens": 6, "eos_token_id": None, **options})


def test_the_function_is_a_log_softmax_with_the_best_in_order():
    rng = np.random.default_rng(0)
    for scale, dtype in ((1, jnp.float32), (15, jnp.float32), (3, jnp.bfloat16)):
        logits = jnp.asarray(rng.standard_normal((3, 4, 50)) * scale, dtype)
        tokens = rng.integers(0, 50, (3, 4))
        exact = np.asarray(logits, np.float64)
        exact -= exact.max(-1, keepdims=True)
        exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
        found = token_logprobs(logits, tokens, 5)
        assert np.abs(found.chosen - np.take_along_axis(exact, tokens[..., None], -1)[..., 0]).max() < 1e-5
        order = np.argsort(-np.asarray(logits, np.float32), axis=-1, kind="stable")[..., :5]
        assert np.array_equal(found.top_tokens, order)
        assert np.abs(found.top - np.take_along_axis(exact, order, -1)).max() < 1e-5
        assert found.chosen.dtype == found.top.dtype == jnp.float32 and token_logprobs(logits, tokens).top is None


@pytest.mark.parametrize("settings", fast_first(1, SETTINGS))
def test_they_are_of_the_models_logits_and_change_no_token(tiny_a, settings):
    plain = ask(tiny_a, **settings, return_dict_in_generate=True, output_logits=True)
    out = ask(tiny_a, **settings, logprobs=4)
    assert isinstance(out, GenerateOutput) and np.array_equal(out.sequences, plain.sequences)
    new = out.sequences[:, tiny_a.batch_ids.shape[1] :]
    want = np.stack([jax.nn.log_softmax(logits.astype(np.float32)) for logits in plain.logits], axis=1)
    assert plain.logprobs is None and out.logprobs.chosen.shape == new.shape and out.logprobs.top.shape == (*new.shape, 4)
    assert np.abs(out.logprobs.chosen - np.take_along_axis(want, new[..., None], -1)[..., 0]).max() < TOLERANCE
    assert np.abs(out.logprobs.top - -np.sort(-want, axis=-1)[..., :4]).max() < TOLERANCE
    options = {**prompt(tiny_a), **settings, "max_new_tokens": 6, "eos_token_id": None, "logprobs": 4}
    steps = list(stream(tiny_a.model, tiny_a.params, **options))
    assert np.array_equal(np.stack([tokens for tokens, _ in steps], axis=1), new)
    for name in ("chosen", "top", "top_tokens"):
        assert np.array_equal(np.stack([getattr(found, name) for _, found in steps], axis=1), getattr(out.logprobs, name)), name


@pytest.mark.thorough
def test_beside_scores_and_logits_they_are_the_same(tiny_a):
    out = ask(tiny_a, logprobs=4)
    both = ask(tiny_a, logprobs=4, return_dict_in_generate=True, output_scores=True)
    assert len(both.scores) == 6 and np.array_equal(out.sequences, both.sequences)
    for a, b in zip(jax.tree.leaves(out.logprobs), jax.tree.leaves(both.logprobs), strict=True):
        assert np.abs(a - b).max() < TOLERANCE


@pytest.mark.thorough
def test_what_follows_the_end_of_a_row_is_nothing(tiny_a):
    free = ask(tiny_a)[:, tiny_a.batch_ids.shape[1] :]
    stop = next(int(token) for token in free[0] if (np.cumsum(free[1] == token)[:3] == 0).all())
    out = ask(tiny_a, eos_token_id=stop, pad_token_id=2, logprobs=2)
    new = out.sequences[:, tiny_a.batch_ids.shape[1] :]
    ended = np.cumsum(new == stop, axis=1) - (new == stop) > 0
    assert ended.any() and not ended.all()
    assert (out.logprobs.chosen[ended] == 0).all() and (out.logprobs.chosen[~ended] < 0).all()
    assert (out.logprobs.top[ended] == 0).all() and (out.logprobs.top_tokens[ended] == 2).all()


@pytest.mark.thorough
def test_of_the_chosen_token_alone_and_of_more_than_there_are(tiny_a):
    alone, everything = (ask(tiny_a, logprobs=n).logprobs for n in (0, 1024))
    v = tiny_a.model.config.text_config.vocab_size
    assert alone.top is None and everything.top.shape == (2, 6, v)
    assert np.abs(alone.chosen - everything.chosen).max() < TOLERANCE
    assert np.allclose(np.exp(everything.top.astype(np.float64)).sum(-1), 1, atol=1e-5)
    assert np.array_equal(everything.top[..., 0], everything.chosen), "greedy decoding takes the best"


def test_numbers_of_alternatives_that_make_no_sense_are_refused(tiny_a):
    for wrong in (-1, True, 1025, 1.5, "2"):
        with pytest.raises(InputError, match="logprobs"):
            ask(tiny_a, logprobs=wrong)


@pytest.mark.thorough
def test_they_are_the_references(tiny_a):
    """compute_transition_scores of transformers' `logits`; its `scores` are what temperature and filters have left."""
    torch = pytest.importorskip("torch", reason="the reference: pip install 'smolvlm-jax[test]'")
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tiny_a.directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    given = {name: torch.tensor(value) for name, value in prompt(tiny_a).items()}
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 2, "repetition_penalty": 1.4}
    told = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    with torch.no_grad():
        out = model.generate(**given, **options, **told)
        want = model.compute_transition_scores(out.sequences, out.logits, normalize_logits=True).numpy()
        chosen_by = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True).numpy()
        best = torch.log_softmax(torch.stack(out.logits, 1), -1).topk(5).values.numpy()
    got = ask(tiny_a, **options, logprobs=5)
    assert np.array_equal(got.sequences, out.sequences.numpy())
    assert np.abs(got.logprobs.chosen - want).max() < TOLERANCE and np.abs(got.logprobs.top - best).max() < TOLERANCE
    assert np.abs(chosen_by - want).max() > 0.01, "the penalty shows in the reference's scores"
