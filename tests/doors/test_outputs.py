"""Models and what they return, used as transformers' are."""

import jax
import numpy as np
import pytest

import smolvlm_jax
from smolvlm_jax import (
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMConnector,
    SmolVLMForConditionalGeneration,
    SmolVLMModel,
    SmolVLMProcessor,
    SmolVLMTextModel,
    SmolVLMVisionConfig,
    SmolVLMVisionTransformer,
    generate,
    load,
    pipeline,
)
from smolvlm_jax.errors import HabitError, InputError, SmolVLMError
from smolvlm_jax.habits import _INSTEAD

MODULES = {
    SmolVLMForConditionalGeneration: SmolVLMConfig(),
    SmolVLMModel: SmolVLMConfig(),
    SmolVLMConnector: SmolVLMConfig(),
    SmolVLMTextModel: SmolVLMConfig().text_config,
    SmolVLMVisionTransformer: SmolVLMVisionConfig(),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_model_used_as_torchs_says_what_to_type(kind):
    model = kind(MODULES[kind])
    for use in (model, lambda: model(np.ones((1, 2), np.int32)), lambda: model(input_ids=np.ones((1, 2), np.int32))):
        with pytest.raises(HabitError, match=r"model\.apply"):
            use()
    for name in set(_INSTEAD) - {"from_pretrained"}:
        with pytest.raises(HabitError, match=f"{kind.__name__}.{name}: ") as raised:
            getattr(model, name)
        assert isinstance(raised.value, AttributeError) and "\n" not in str(raised.value)
        assert not hasattr(model, name) and getattr(model, name, None) is None
    with pytest.raises(HabitError, match=r"load\(source\)"):
        kind.from_pretrained("tiny")
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = model.nothing_like_it
    assert model.eval() is model and hash(model) == hash(kind(MODULES[kind]))


def test_parts_of_a_model_are_refused_by_name():
    model = SmolVLMForConditionalGeneration(SmolVLMConfig())
    for name in ("model", "lm_head", "text_model", "vision_tower", "get_decoder", "no_such_thing"):
        with pytest.raises(HabitError, match=name) as raised:
            getattr(model, name)
        assert "flax" not in str(raised.value) and "setup" not in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(HabitError, match=r"model\.apply"):
        model.get_image_features(np.zeros((1, 8, 8, 3), np.uint8))
    for name in ("AutoModel", "AutoModelForCausalLM", "TextStreamer", "Trainer", "TrainingArguments", "set_seed", "load_image"):
        for use in (lambda kind: kind(3), lambda kind: kind.from_pretrained("tiny")):
            with pytest.raises(HabitError, match=f"there is no {name}: "):
                use(getattr(smolvlm_jax, name))


def test_messages_name_what_there_is():
    for name, said in (("generate", "generate(model, params"), ("forward", "model.apply"), ("from_pretrained", "load(")):
        assert said in _INSTEAD[name]
    for call in (pipeline, lambda: pipeline("image-text-to-text", model="tiny"), AutoModelForImageTextToText):
        with pytest.raises(HabitError, match="load"):
            call()
    with pytest.raises(HabitError, match=r"generate\(model, params, .*model\.apply"):
        pipeline("image-text-to-text")


def test_idefics3_is_another_name():
    names = [name for name in smolvlm_jax.__all__ if name.startswith("Idefics3")]
    for name in [*names, "SmolVLMImageProcessorFast", "SmolVLMImageProcessorPil"]:
        ours = name.replace("Idefics3", "SmolVLM").removesuffix("Fast").removesuffix("Pil")
        assert getattr(smolvlm_jax, name) is getattr(smolvlm_jax, ours)
    assert Idefics3Config is SmolVLMConfig and Idefics3ForConditionalGeneration is SmolVLMForConditionalGeneration


@pytest.fixture(scope="module")
def loaded():
    return AutoModelForImageTextToText.from_pretrained(
        "tiny", dtype="float32", device_map="auto", attn_implementation="sdpa", low_cpu_mem_usage=True
    )


@pytest.mark.thorough
def test_the_auto_class_gives_a_model_and_its_parameters(loaded):
    model, params = loaded
    assert model == load("tiny", "float32")[0] and isinstance(model, SmolVLMForConditionalGeneration)
    ids = np.array([[1, 5, 9]])
    assert np.array_equal(loaded.generate(ids, max_new_tokens=3), generate(model, params, ids, max_new_tokens=3))
    assert np.array_equal(loaded(ids).logits, model.apply({"params": params}, ids)["logits"])
    assert loaded.eval() is loaded and loaded.config is model.config and loaded.dtype == np.float32
    assert loaded.device in jax.devices() and "float32" in repr(loaded)
    moved = loaded.to(jax.devices()[1])
    assert moved.device == jax.devices()[1] and moved.model == model
    assert jax.tree.map(lambda x: x, loaded).model == model and jax.device_put(loaded).device == loaded.device
    assert jax.eval_shape(lambda m, x: m(x).logits, loaded, ids).shape == (1, 3, model.config.text_config.vocab_size)
    assert jax.eval_shape(loaded.get_image_features, np.zeros((1, 48, 48, 3), np.uint8)).pooler_output.shape == (1, 4, 96)
    assert loaded.can_generate() and not loaded.training and loaded.num_parameters() > 10**5
    with pytest.raises(HabitError, match="arguments of generate"):
        loaded.model = model
    half = loaded.to(jax.numpy.bfloat16)
    assert half.dtype == half.model.dtype == jax.numpy.bfloat16
    with pytest.raises(HabitError, match="gradient"):
        _ = loaded.gradient_checkpointing_enable
    for wrong in ({"device_map": "cuda"}, {"load_in_4bit": True}, {"dtype": "float33"}, {"attn_implementation": "fast"}):
        with pytest.raises(SmolVLMError, match=next(iter(wrong)) if "attn" not in next(iter(wrong)) else "fast"):
            AutoModelForImageTextToText.from_pretrained("tiny", **wrong)


@pytest.mark.thorough
def test_kernels_of_torch_are_answered_with_a_warning(caplog):
    for form, attention, warns in (("sdpa", "auto", 0), ("eager", "einsum", 0), ("flash_attention_2", "auto", 1)):
        caplog.clear()
        model, _ = AutoModelForImageTextToText.from_pretrained("tiny", attn_implementation=form)
        assert model.attention == attention and sum("attention=" in line for line in caplog.messages) == warns


@pytest.mark.thorough
def test_outputs_are_read_by_attribute_name_and_place(tiny_a):
    labels = tiny_a.ids.copy()
    out = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels, labels=labels, use_cache=True)
    assert out["logits"] is out.logits is out[1] and out[0] is out.loss is out["loss"]
    assert out.to_tuple()[:2] == out[:2] and len(out) == len(out.to_tuple()) == 4
    assert list(out) == ["loss", "logits", "past_key_values", "image_hidden_states"] and "attentions" not in out
    assert dict(out.items()).keys() == set(out.keys()) and out.get("attentions") is None
    with pytest.raises(KeyError, match="attentions"):
        _ = out["attentions"]
    assert tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels)[0].shape == out.logits.shape
    as_tuple = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels, return_dict=False)
    assert type(as_tuple) is tuple and np.array_equal(as_tuple[0], out.logits)
    # the names of transformers 5.24
    assert out.cache is out["cache"] is out.past_key_values
    assert out.image_outputs.pooler_output is out["image_outputs"]["pooler_output"] is out.image_hidden_states
    token = np.array([[3]])
    after = tiny_a.apply(input_ids=token, cache=out.cache)
    assert np.array_equal(after.logits, tiny_a.apply(input_ids=token, past_key_values=out.past_key_values).logits)
    with pytest.raises(InputError, match="another name"):
        tiny_a.apply(input_ids=token, cache=out.cache, past_key_values=out.cache)
    features = tiny_a.model.apply(tiny_a.variables, tiny_a.pixels, method="get_image_features")
    assert features.pooler_output is features["image_hidden_states"] is features[0]


def test_what_is_no_array_of_the_right_dimensions_is_refused_in_one_line(tiny_a):
    ids = tiny_a.ids
    for wrong, words in (
        ({"input_ids": ids[0]}, r"input_ids has shape .* needs \(batch, length\)"),
        ({"input_ids": ids.tolist()}, "input_ids is a builtins.list; pass an array"),
        ({"input_ids": ids.astype(np.float32)}, "it needs integers"),
        ({"input_ids": ids, "labels": ids[:, 1:]}, "labels have shape"),
        ({"input_ids": ids, "attention_mask": np.ones_like(ids).tolist()}, "attention_mask is a builtins.list"),
        ({"inputs_embeds": np.ones((1, 3), np.float32)}, r"needs \(batch, length, width\)"),
        ({"input_ids": ids, "pixel_values": tiny_a.pixels.tolist()}, "pixel_values is a builtins.list"),
    ):
        with pytest.raises(InputError, match=words) as raised:
            tiny_a.apply(**wrong)
        assert "\n" not in str(raised.value)
    with pytest.raises(HabitError, match="takes input_ids by place"):
        tiny_a.model.apply(tiny_a.variables, ids, np.ones_like(ids))


def test_keywords_of_the_model_are_used_neutral_or_refused(tiny_a):
    plain = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels).logits
    neutral = dict.fromkeys(("mm_encoder_outputs", "token_type_ids", "num_items_in_batch", "use_cache", "return_dict"))
    same = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels, mm_token_type_ids=tiny_a.ids, **neutral)
    assert np.array_equal(same.logits, plain)
    for name in ("offset_mapping", "colour"):
        with pytest.raises(InputError, match=name):
            tiny_a.apply(input_ids=tiny_a.ids, **{name: 1})


def test_the_encoder_says_its_layout_and_takes_the_references(tiny_a):
    first = tiny_a.pixels[0]  # (2, 3, H, W), the reference's layout
    encoder = lambda pixels, **options: tiny_a.model.apply(
        tiny_a.variables, pixels, **options, method=lambda model, *args, **kwargs: model.model.vision_model(*args, **kwargs)
    )
    want = encoder(first.transpose(0, 2, 3, 1))
    got = encoder(first, data_format="channels_first")
    assert np.array_equal(want[0], got["last_hidden_state"])
    with pytest.raises(InputError, match=r"pass data_format='channels_first'"):
        encoder(first)
    for wrong in (first[0], first[:, :2]):
        with pytest.raises(InputError, match="the encoder takes"):
            encoder(wrong)
    with pytest.raises(InputError, match="data_format"):
        encoder(first, data_format="sideways")


@pytest.mark.thorough
def test_channels_last_pictures_give_the_same_logits():
    model, params = load("tiny")
    processor = SmolVLMProcessor.from_pretrained("tiny")
    picture = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    out = [
        processor(images=[picture], text="<image>", return_tensors="np", data_format=form)
        for form in ("channels_first", "channels_last")
    ]
    assert np.array_equal(out[0]["pixel_values"], np.moveaxis(out[1]["pixel_values"], -1, 2))
    logits = [model.apply({"params": params}, **batch).logits for batch in out]
    assert np.array_equal(*logits)
