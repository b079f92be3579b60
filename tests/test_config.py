"""Configs: both spellings, sparse files, junk keys, round trips, hashing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smolvlm_jax import (
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMTextConfig,
    SmolVLMVisionConfig,
    abstract_params,
    published_config,
)
from smolvlm_jax.errors import ConfigError, InputError
from smolvlm_jax.sizes import PUBLISHED

DEFAULTS = {
    SmolVLMConfig: dict(use_cache=True, image_token_id=128257, tie_word_embeddings=False, scale_factor=2, pad_token_id=128002),
    SmolVLMVisionConfig: dict(
        hidden_size=1152,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_channels=3,
        image_size=224,
        patch_size=32,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
        initializer_range=0.02,
    ),
    SmolVLMTextConfig: dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        vocab_size=32000,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    ),
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_are_those_of_the_reference(kind):
    config = kind()
    assert {name: getattr(config, name) for name in DEFAULTS[kind]} == DEFAULTS[kind]


def test_missing_text_config_is_llama_with_its_own_eps():
    assert SmolVLMConfig(text_config=None).text_config.rms_norm_eps == 1e-5
    assert SmolVLMConfig(text_config={}).text_config.rms_norm_eps == 1e-6


def test_published_files_parse_and_round_trip(published):
    files = sorted(published.glob("*/config.json"))
    assert len(files) >= 3
    for file in files:
        config = SmolVLMConfig.from_pretrained(file)
        again = SmolVLMConfig.from_dict(config.to_dict())
        assert again == config and hash(again) == hash(config)
        original = json.loads(file.read_text())
        junk = set(original) - set(again.to_dict()) - {"torch_dtype"}
        assert not junk, f"keys lost: {junk}"
        for part in ("text_config", "vision_config"):
            assert not set(original[part]) - set(again.to_dict()[part])
        want = published_config(file.parent.name)
        assert config.vision_config.replace(initializer_range=0.02) == want.vision_config
        assert (config.scale_factor, config.image_token_id) == (want.scale_factor, want.image_token_id)
        text, other = config.text_config, want.text_config
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "rope_theta"):
            assert getattr(text, name) == getattr(other, name)


def _v4() -> dict:
    return {
        "model_type": "smolvlm",
        "image_token_id": 150,
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "pad_token_id": 128002,
        "vision_config": dict(
            hidden_size=32, num_attention_heads=4, image_size=32, patch_size=4, size={"longest_edge": 9}
        ),
        "text_config": dict(
            hidden_size=48, num_attention_heads=6, head_dim=8, rope_theta=1e5, vocab_size=160, rope_scaling=None
        ),
        "perceiver_config": {"x": [1, 2]},
    }  # fmt: skip


def _v5() -> dict:
    data = _v4()
    data["dtype"] = data.pop("torch_dtype")
    data["_pad_token_id"] = data.pop("pad_token_id")
    text = data["text_config"]
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "rope_type": "default"}
    text.pop("rope_scaling")
    return data


def test_both_spellings_are_one_config_and_share_a_compilation():
    old, new = SmolVLMConfig.from_dict(_v4()), SmolVLMConfig.from_dict(_v5())
    assert old == new and hash(old) == hash(new)
    assert old.text_config.rope_theta == 1e5 and old.dtype == new.dtype == "bfloat16"
    traces = []

    def f(x, config):
        traces.append(config)
        return x * config.scale_factor

    g = jax.jit(f, static_argnums=1)
    g(jnp.ones(3), old), g(jnp.ones(3), new)
    assert len(traces) == 1


def test_the_spelling_transformers_5_writes(tmp_path, published):
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    for name in ("SmolVLM-256M-Instruct", "SmolVLM2-500M-Video-Instruct", "granite-docling-258M"):
        transformers.AutoConfig.from_pretrained(published / name).save_pretrained(tmp_path / name)
        assert SmolVLMConfig.from_pretrained(tmp_path / name) == SmolVLMConfig.from_pretrained(published / name)


def test_what_we_write_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    for name in PUBLISHED:
        config = published_config(name)
        config.save_pretrained(tmp_path / name)
        theirs = transformers.AutoConfig.from_pretrained(tmp_path / name)
        assert theirs.model_type == config.model_type and theirs.scale_factor == config.scale_factor
        assert theirs.text_config.rope_parameters["rope_theta"] == config.text_config.rope_theta
        assert theirs.vision_config.patch_size == config.vision_config.patch_size
        assert theirs.tie_word_embeddings == config.tie_word_embeddings


def test_unknown_keys_are_kept_for_export():
    config = SmolVLMConfig.from_dict(_v4())
    assert config.to_dict()["perceiver_config"] == {"x": [1, 2]}
    assert config.to_dict()["vision_config"]["size"] == {"longest_edge": 9}
    assert config == SmolVLMConfig.from_dict({k: v for k, v in _v4().items() if k != "perceiver_config"})


def test_save_and_read(tmp_path):
    config = SmolVLMConfig.from_dict(_v5())
    config.save_pretrained(tmp_path)
    assert SmolVLMConfig.from_pretrained(tmp_path) == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"scale_factor": 0}, "scale_factor"),
        ({"model_type": "qwen2_vl"}, "model_type"),
        ({"dtype": "int3"}, "dtype"),
        ({"quantization_config": ["fp8"]}, "quantization_config"),
        ({"vision_config": {"num_attention_heads": 5}}, "num_attention_heads"),
        ({"vision_config": {"patch_size": -1}}, "patch_size"),
        ({"text_config": {"num_attention_heads": 6, "num_key_value_heads": 4}}, "num_key_value_heads"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}}, "rope_type"),
        ({"text_config": {"attention_bias": True}}, "attention_bias"),
        ({"text_config": {"hidden_size": "many"}}, "hidden_size"),
        ({"text_config": 3}, "text_config"),
    ],
)
def test_errors_name_the_key(change, word):
    data = _v4()
    for key, value in change.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=word):
        SmolVLMConfig.from_dict(data)


@pytest.mark.thorough
def test_a_grid_that_the_scale_does_not_divide_fails_where_it_is_run():
    """The class defaults, 224 / 32 = 7 patches a side and scale 2, make a model, as in transformers, which encodes nothing."""
    model = SmolVLMForConditionalGeneration(SmolVLMConfig())
    params = abstract_params(model)
    assert params["model"]["connector"]["modality_projection"]["proj"]["kernel"].shape == (4 * 1152, 4096)
    with pytest.raises(InputError, match="scale_factor"):
        jax.eval_shape(
            lambda params, tile: model.apply({"params": params}, tile, method="get_image_features"),
            params,
            jax.ShapeDtypeStruct((1, 224, 224, 3), np.uint8),
        )


def test_unreadable_files_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        SmolVLMConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        SmolVLMConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="holds a list, not an object"):
        SmolVLMConfig.from_pretrained(tmp_path)
