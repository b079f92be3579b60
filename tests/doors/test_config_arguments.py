"""Configs made and read as transformers' are."""

import copy
import dataclasses
import pickle

import jax
import numpy as np
import pytest

from smolvlm_jax import (
    GenerationConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMTextConfig,
    SmolVLMVisionConfig,
    abstract_params,
)
from smolvlm_jax.activations import _FUNCTIONS, activation
from smolvlm_jax.config_base import ACTIVATIONS
from smolvlm_jax.errors import ConfigError, HabitError, InputError
from smolvlm_jax.generation_config import Sampling


def test_keywords_of_the_reference_are_taken():
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    theirs = transformers.SmolVLMConfig()
    for kind, config in (
        (SmolVLMConfig, theirs),
        (SmolVLMVisionConfig, theirs.vision_config),
        (SmolVLMTextConfig, theirs.text_config),
    ):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            made = kind(**{field.name: value})
            assert made == kind.from_dict({field.name: value}), field.name
        assert kind(**config.to_dict()) == kind.from_dict(config.to_dict())
    parts = {"vision_config": theirs.vision_config, "text_config": theirs.text_config}
    assert SmolVLMConfig(**parts) == SmolVLMConfig()


def test_other_keywords_are_carried_or_refused_by_name():
    torch_dtype = type("dtype", (), {"__module__": "torch", "__str__": lambda self: "torch.bfloat16"})()
    made = SmolVLMConfig(vocab_size=7, torch_dtype=torch_dtype, pad_token_id=3, architectures=["X"])
    assert made.dtype == "bfloat16" and made.pad_token_id == 3 and made.to_dict()["vocab_size"] == 7
    assert SmolVLMConfig(torch_dtype="float16").dtype == "float16"
    assert SmolVLMTextConfig(rope_parameters={"rope_theta": 5.0, "rope_type": "default"}).rope_theta == 5
    assert SmolVLMTextConfig(hidden_size=np.int64(64), num_attention_heads=4).hidden_size == 64
    for kind in (SmolVLMConfig, SmolVLMVisionConfig, SmolVLMTextConfig):
        with pytest.raises(ConfigError, match="no argument 'hiden_size'"):
            kind(hiden_size=3)
    assert made.replace(scale_factor=4).to_dict()["vocab_size"] == 7


def test_pairs_are_squares():
    assert SmolVLMVisionConfig(image_size=[64, 64], patch_size=(16, 16)) == SmolVLMVisionConfig(image_size=64, patch_size=16)
    with pytest.raises(ConfigError, match=r"image_size.*square"):
        SmolVLMVisionConfig(image_size=(64, 32))


def test_it_is_written_as_json(tmp_path):
    config = SmolVLMConfig(scale_factor=4)
    config.to_json_file(tmp_path / "c.json")
    assert (tmp_path / "c.json").read_text() == config.to_json_string() == config.to_json_string(use_diff=False)
    assert SmolVLMConfig.from_json_file(tmp_path / "c.json") == config
    assert config.get_text_config() is config.text_config and config.text_config.get_text_config() is config.text_config


def test_activations_are_the_references():
    torch = pytest.importorskip("torch", reason="the reference: pip install 'smolvlm-jax[test]'")
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    assert set(_FUNCTIONS) == set(ACTIVATIONS)
    table = transformers.activations.ACT2FN
    x = np.linspace(-12, 12, 801, dtype=np.float32)
    for name in table:
        if any(True for _ in table[name].parameters()):
            with pytest.raises(ConfigError, match="learns parameters"):
                SmolVLMVisionConfig(hidden_act=name)
            continue
        SmolVLMVisionConfig(hidden_act=name), SmolVLMTextConfig(hidden_act=name)
        want = table[name](torch.tensor(x)).numpy()
        np.testing.assert_allclose(activation(name)(x), want, atol=2e-6, rtol=2e-6, err_msg=name)


@pytest.mark.thorough
def test_class_defaults_initialise():
    params = abstract_params(SmolVLMForConditionalGeneration(SmolVLMConfig()))
    assert sum(array.size for array in jax.tree.leaves(params)) > 6e9


def test_attributes_of_the_reference_are_there_or_refused_by_name():
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    ours, theirs = SmolVLMConfig(), transformers.SmolVLMConfig()
    for name in ("architectures", "is_encoder_decoder", "name_or_path", "output_attentions", "problem_type", "return_dict"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.vision_config.model_type == theirs.vision_config.model_type
    assert ours.text_config.rope_parameters["rope_theta"] == theirs.text_config.rope_parameters["rope_theta"]
    assert SmolVLMConfig(bos_token_id=3, eos_token_id=4).eos_token_id == 4
    assert SmolVLMConfig.for_model("smolvlm", scale_factor=3).scale_factor == 3
    for name, words in (
        ("hidden_size", r"config\.text_config\.hidden_size or config\.vision_config\.hidden_size"),
        ("vocab_size", r"it is config\.text_config\.vocab_size"),
        ("image_token_index", "image_token_id"),
        ("scale_facto", "did you mean 'scale_factor'"),
        ("to_diff_dict", "to_dict"),
    ):
        with pytest.raises(HabitError, match=words):
            getattr(ours, name)
        assert not hasattr(ours, name)
    for config in (ours, ours.text_config, ours.vision_config, GenerationConfig(), Sampling()):
        with pytest.raises(HabitError, match=r"scale cannot be assigned: .*replace\(scale=…\)"):
            config.scale = 3
    with pytest.raises(ConfigError, match=r"pass output_attentions=True to model\.apply"):
        SmolVLMConfig(output_attentions=True)
    assert pickle.loads(pickle.dumps(ours)) == copy.deepcopy(ours) == ours and hash(ours) == hash(SmolVLMConfig())


def test_a_generation_config_takes_what_asks_for_nothing():
    made = GenerationConfig(max_new_tokens=3, num_beams=1, use_cache=True, streamer=None)
    assert made == GenerationConfig(max_new_tokens=3) == GenerationConfig.from_dict({"max_new_tokens": 3})
    assert made.num_beams is None
    for wrong, words in (({"num_beams": 2}, "num_beams=2"), ({"max_new_token": 3}, "did you mean 'max_new_tokens'")):
        with pytest.raises(InputError, match=words):
            GenerationConfig(**wrong)
    for name in ("update", "validate", "max_new_token"):
        with pytest.raises(HabitError, match=name):
            getattr(made, name)
