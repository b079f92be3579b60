"""One thing under two names: both mean the same, or the call is refused with both names."""

import jax
import numpy as np
import pytest

from smolvlm_jax import AutoModelForImageTextToText, GenerationConfig, SmolVLMConfig, SmolVLMProcessor, load
from smolvlm_jax.checkpoint import _require_cpu
from smolvlm_jax.config import SmolVLMTextConfig
from smolvlm_jax.errors import ArgumentError, ConfigError, InputError, SmolVLMError
from smolvlm_jax.evals.settings import request_settings
from smolvlm_jax.habits import require_agreement
from smolvlm_jax.train.config import TrainConfig
from smolvlm_jax.train.recipes import load_recipe

MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = {"tokenize": True, "return_dict": True}
DTYPES = lambda **given: SmolVLMConfig(**given).dtype
OPEN = lambda **given: AutoModelForImageTextToText.from_pretrained("tiny", **given)
ASK = lambda **given: GenerationConfig().replace(**given)
TEXT = lambda **given: SmolVLMTextConfig(**given).rope_theta
HARNESS = lambda **given: request_settings(given)
TRAIN = lambda **given: TrainConfig(steps=9, **given)


@pytest.fixture(scope="module")
def processor():
    return SmolVLMProcessor.from_pretrained("tiny")


@pytest.mark.parametrize(
    ("door", "given"),
    [
        (OPEN, {"attention": "splash", "attn_implementation": "eager"}),
        (OPEN, {"attention": "einsum", "attn_implementation": "flash_attention_2"}),
        (OPEN, {"dtype": "float32", "torch_dtype": "bfloat16"}),
        (OPEN, {"dtype": "float32", "torch_dtype": "auto"}),
        (DTYPES, {"dtype": "float32", "torch_dtype": "bfloat16"}),
        (TEXT, {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5.0}}),
        (ASK, {"max_new_tokens": 4, "max_length": 30}),
        (HARNESS, {"max_gen_toks": 4, "max_new_tokens": 5}),
        (HARNESS, {"until": ["a"], "stop": ["b"]}),
        (TRAIN, {"warmup_steps": 3, "warmup_fraction": 0.5}),
    ],
)
def test_two_names_that_differ_are_refused_by_both_in_any_order(door, given):
    for order in (given, dict(reversed(given.items()))):
        with pytest.raises(SmolVLMError) as caught:
            door(**order)
        assert all(name in str(caught.value) for name in given) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("door", "given", "alone"),
    [
        (DTYPES, {"dtype": "bf16", "torch_dtype": jax.numpy.bfloat16}, {"dtype": "bfloat16"}),
        (TEXT, {"rope_theta": 5, "rope_parameters": {"rope_theta": 5.0}}, {"rope_theta": 5.0}),
        (ASK, {"max_new_tokens": None, "max_length": 30}, {"max_length": 30}),
        (ASK, {"max_new_tokens": 3, "max_length": None}, {"max_new_tokens": 3}),
        (HARNESS, {"max_gen_toks": 4, "max_tokens": 4}, {"max_new_tokens": 4}),
        (TRAIN, {"warmup_steps": TrainConfig.warmup_steps, "warmup_fraction": 0.5}, {"warmup_fraction": 0.5}),
    ],
)
def test_two_names_that_agree_are_one(door, given, alone):
    assert door(**given) == door(**alone)


def test_a_model_is_opened_with_two_names_that_agree():
    both = {"attention": "einsum", "attn_implementation": "eager", "dtype": "float32", "torch_dtype": np.float32}
    model = OPEN(**both).model
    assert (model.attention, model.dtype) == ("einsum", np.float32)
    with pytest.raises(ArgumentError, match="did you mean 'attention'"):
        load("tiny", attention="splash", attn_implementation="eager")


def test_the_cpu_is_refused_where_parameters_go_elsewhere():
    class Elsewhere:
        devices = np.array([type("Device", (), {"platform": "tpu"})()])

    assert _require_cpu("cpu", None) is None and _require_cpu("auto", Elsewhere) is None
    with pytest.raises(InputError, match=r'device_map="cpu".*mesh'):
        _require_cpu("cpu", Elsewhere)


def test_keywords_of_a_chat_are_given_once(processor):
    with pytest.raises(InputError, match="special_tokens_in_text='allow' and sanitize_control_tokens=True"):
        processor.apply_chat_template(MESSAGES, special_tokens_in_text="allow", sanitize_control_tokens=True, **CHAT)
    same = {"special_tokens_in_text": "escape", "sanitize_control_tokens": True}
    assert processor.apply_chat_template(MESSAGES, **same, **CHAT) == processor.apply_chat_template(MESSAGES, **CHAT)
    for name, one, other in (("return_tensors", "np", "jax"), ("padding", True, False), ("max_length", 7, 8)):
        with pytest.raises(InputError, match=f"'{name}' is given twice"):
            processor.apply_chat_template(MESSAGES, **{name: one}, processor_kwargs={name: other}, **CHAT)
        given = processor.apply_chat_template(MESSAGES, **{name: None}, processor_kwargs={name: one}, **CHAT)
        assert given.keys() == processor.apply_chat_template(MESSAGES, **{name: one}, **CHAT).keys()
    with pytest.raises(InputError, match="'return_metadata' is given twice"):
        processor(text="a", return_metadata=True, videos_kwargs={"return_metadata": False})


def test_a_word_takes_the_place_of_a_recipes_warm_up():
    recipe = load_recipe("lora-256m")
    assert recipe.warmup_fraction is not None
    for steps in (50, TrainConfig.warmup_steps):
        assert load_recipe("lora-256m", [f"warmup_steps={steps}"]).warmup == steps
    assert load_recipe("tiny-numbers", ["warmup_fraction=0.5", "steps=10"]).warmup == 5
    assert load_recipe("tiny-numbers", ["warmup_fraction=null"]).warmup == load_recipe("tiny-numbers").warmup
    with pytest.raises(ConfigError, match="warmup_fraction"):
        load_recipe("lora-256m", ["warmup_steps=5", "warmup_fraction=0.5"])


def test_what_is_not_given_agrees_with_everything():
    require_agreement("f", {"a": None, "b": 1, "c": np.int64(1)})
    require_agreement("f", {"a": None})
    with pytest.raises(InputError, match="f: b=1 and c=2"):
        require_agreement("f", {"a": None, "b": 1, "c": 2})
