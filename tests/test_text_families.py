"""Text configs of other families of decoders: computed as transformers computes them, or refused by the name of the key."""

import json

import jax
import numpy as np
import pytest
from tiers import fast_first

from smolvlm_jax import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMTextConfig, abstract_params, load, save_hf
from smolvlm_jax.errors import ConfigError
from smolvlm_jax.layers import rotary_tables
from smolvlm_jax.parameters import flatten_params

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GRANITE = {
    "model_type": "granite",
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.015625,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}


def config(**text) -> dict:
    """The mapping of a small config.json, with more keys in its text_config."""
    return {
        "model_type": "idefics3",
        "scale_factor": 2,
        "image_token_id": 90,
        "vision_config": dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
        ),
        "text_config": {
            **dict(hidden_size=36, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2),
            **dict(head_dim=10, vocab_size=96, rms_norm_eps=1e-5, max_position_embeddings=512, pad_token_id=2),
            **text,
        },
    }


BOTH = {**GRANITE, "rope_parameters": LLAMA3}


@pytest.mark.parametrize("text", fast_first(1, [BOTH, GRANITE, {"rope_scaling": LLAMA3, "rope_theta": 5e5}]))
def test_logits_are_those_of_transformers(text, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference: pip install 'smolvlm-jax[test]'")
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    model = SmolVLMForConditionalGeneration(SmolVLMConfig.from_dict(config(**text)))
    rng = np.random.default_rng(0)
    shapes = abstract_params(model)
    draw = lambda path, x: (1 if path.endswith("scale") else 0) + 0.15 * rng.standard_normal(x.shape)
    values = [draw(path, x).astype(np.float32) for path, x in flatten_params(shapes).items()]
    save_hf(tmp_path / "m", model, jax.tree.unflatten(jax.tree.structure(shapes), values))
    model, params = load(tmp_path / "m")
    kind = transformers.AutoModelForImageTextToText
    theirs = kind.from_pretrained(tmp_path / "m", dtype=torch.float32, attn_implementation="eager").eval()
    ids = np.array([[*rng.integers(3, 90, 3), *[90] * 4, *rng.integers(3, 90, 120)]])
    pixels = rng.uniform(-1, 1, (1, 1, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(pixels), output_hidden_states=True)
    forward = jax.jit(model.apply, static_argnames=("output_hidden_states", "cache_length"))
    ours = forward({"params": params}, ids, pixel_values=pixels, output_hidden_states=True)
    for mine, reference in zip(ours.hidden_states, wanted.hidden_states, strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-4)
    np.testing.assert_allclose(ours.logits, wanted.logits, atol=1e-4)
    # with a cache as without
    first = forward({"params": params}, ids[:, :-1], pixel_values=pixels, cache_length=256)
    last = forward({"params": params}, ids[:, -1:], past_key_values=first.past_key_values)
    np.testing.assert_allclose(last.logits[:, -1], ours.logits[:, -1], atol=1e-4)


def test_text_alone_is_graniteforcausallm(tmp_path):
    """The same weights in transformers' own class for the language model, which also divides the logits."""
    torch = pytest.importorskip("torch", reason="the reference: pip install 'smolvlm-jax[test]'")
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    data = config(**GRANITE)
    theirs = transformers.GraniteForCausalLM(transformers.GraniteConfig(**data["text_config"])).eval()
    whole = transformers.AutoModelForImageTextToText.from_config(transformers.Idefics3Config(**data))
    whole.model.text_model.load_state_dict(theirs.model.state_dict())
    whole.lm_head.load_state_dict(theirs.lm_head.state_dict())
    whole.save_pretrained(tmp_path / "m")
    model, params = load(tmp_path / "m")
    assert model.config.text_config.residual_multiplier == 0.22
    ids = np.arange(3, 40)[None]
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).logits.numpy() * GRANITE["logits_scaling"]
    np.testing.assert_allclose(model.apply({"params": params}, ids).logits, wanted, atol=1e-4)


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "factor": 3.0}])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_frequencies_are_those_of_transformers(rope, theta):
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = transformers.LlamaConfig(head_dim=64, rope_theta=theta, rope_scaling=dict(rope))
    frequencies = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu")[0].numpy()
    ours = SmolVLMTextConfig.from_dict({"head_dim": 64, "rope_theta": theta, "rope_scaling": rope})
    cos, _ = rotary_tables(np.array([[1]]), 64, ours.rope_theta, np.float32, ours.rope_scaling)
    np.testing.assert_allclose(cos[0, 0, 0], np.cos(frequencies), atol=1e-6)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ({"model_type": "smollm3"}, "no_rope_layers"),
        ({"model_type": "qwen3"}, "q_norm"),
        ({"model_type": "mamba"}, "text_config.model_type 'mamba'"),
        ({"model_type": 7}, "text_config.model_type 7"),
        ({"no_rope_layers": [1, 0]}, "text_config.no_rope_layers"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "text_config.layer_types"),
        ({"sliding_window": 64}, "text_config.sliding_window=64"),
        ({"attention_bias": True}, "text_config.attention_bias"),
        ({"mlp_bias": True}, "text_config.mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "text_config.partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "prelu"}, "hidden_act"),
        ({"qk_layer_norms": True}, "text_config.qk_layer_norms"),
        ({"attn_logit_softcapping": 50.0}, "text_config.attn_logit_softcapping"),
        ({"residual_multiplier": 0.22}, "text_config.residual_multiplier"),
        ({"num_local_experts": 8}, "text_config.num_local_experts"),
        ({"logit_scale": 0.1}, "text_config.logit_scale"),
        *(({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, kind) for kind in ("dynamic", "yarn", "longrope", "new")),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "beta_fast": 32}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"rope_scaling": [8]}, "rope_scaling"),
    ],
)
def test_what_is_not_computed_is_refused_with_file_and_key(text, word, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config(**text)))
    with pytest.raises(ConfigError) as raised:
        SmolVLMConfig.from_pretrained(tmp_path)
    assert word in str(raised.value) and "config.json" in str(raised.value) and "\n" not in str(raised.value)


def test_neutral_values_and_lists_are_accepted():
    """Values that leave a llama as it is; lists, as the stop tokens of Idefics3-8B, leave a config hashable."""
    plain = SmolVLMConfig.from_dict(config())
    neutral = {
        "no_rope_layers": [1, 1],
        "layer_types": ["full_attention"] * 2,
        "sliding_window": 4096,
        "partial_rotary_factor": 1.0,
        "attention_bias": False,
        "residual_multiplier": 1.0,
        "rope_interleaved": False,
        "some_list": [[1], {"a": [2]}],
    }
    assert SmolVLMConfig.from_dict(config(**neutral)) == plain
    ids = [128001, 128008, 128009]
    stops = SmolVLMConfig.from_dict(config(eos_token_id=ids, rope_scaling=LLAMA3))
    assert hash(stops) == hash(SmolVLMConfig.from_dict(stops.to_dict())) and stops.text_config.eos_token_id == tuple(ids)
    assert stops.to_dict()["text_config"]["eos_token_id"] == ids
    assert stops.to_dict()["text_config"]["rope_scaling"] == LLAMA3
    granite = SmolVLMConfig.from_dict(config(**GRANITE))
    assert granite == SmolVLMConfig.from_dict(granite.to_dict()) and hash(granite) != hash(plain)
    assert {key: granite.to_dict()["text_config"][key] for key in GRANITE} == GRANITE
    assert SmolVLMTextConfig.from_dict({"model_type": "granite"}).attention_multiplier == 1.0  # transformers' default


def test_multipliers_of_one_are_no_part_of_a_program():
    """A llama decoder compiles to the same program as before there were multipliers: no product more."""
    data = config()
    llama = SmolVLMForConditionalGeneration(SmolVLMConfig.from_dict(data))
    neutral = {**dict.fromkeys(GRANITE, 1.0), "model_type": "granite", "attention_multiplier": 10**-0.5}
    granite = SmolVLMForConditionalGeneration(SmolVLMConfig.from_dict(config(**neutral)))
    ids = np.ones((1, 8), np.int32)
    text = lambda model: jax.jit(model.apply).lower({"params": abstract_params(model)}, ids).as_text()
    assert text(llama) == text(granite)
