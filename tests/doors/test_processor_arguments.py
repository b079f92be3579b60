"""Keywords of transformers' processors: every one of its signatures is used, neutral, or refused by name."""

import dataclasses
import typing

import numpy as np
import pytest
from PIL import Image

from smolvlm_jax import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMTokenizer, SmolVLMVideoProcessor
from smolvlm_jax.errors import HabitError, InputError
from smolvlm_jax.processing.arguments import ALL, GROUPS
from smolvlm_jax.processing.text_options import TEXT_NEUTRAL, TEXT_OPTIONS

PICTURE = Image.new("RGB", (60, 40), (9, 90, 200))


@pytest.fixture(scope="module")
def processor():
    return SmolVLMProcessor.from_pretrained("tiny")


def keywords(name):
    """The keywords of one of transformers' groups."""
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    return set(typing.get_type_hints(getattr(transformers.processing_utils, name), include_extras=True))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("theirs", "group"), [("TextKwargs", "text_kwargs"), ("ImagesKwargs", "images_kwargs"), ("VideosKwargs", "videos_kwargs")]
)
def test_every_keyword_of_the_reference_has_an_answer(processor, theirs, group):
    names = keywords(theirs)
    unknown = names - GROUPS[group] - {"return_metadata"}
    assert not unknown, f"keywords that nothing knows: {unknown}"
    assert keywords("ProcessingKwargs") <= ALL
    call = {
        "text_kwargs": lambda **options: processor(text="hello", **options),
        "images_kwargs": lambda **options: processor(images=[PICTURE], text="<image>", **options),
        "videos_kwargs": lambda **options: processor(videos=[[PICTURE]], text="<video>", **options),
    }[group]
    plain = call()
    needed = {"size", "resample", "rescale_factor", "image_mean", "image_std", "max_image_size"}
    for name in names - needed:
        assert call(**{name: None}).keys() >= {"input_ids"}, name  # None is off, or the default
        assert call(**{group: {name: None}}).keys() >= {"input_ids"}, name
    tables = {"text_kwargs": TEXT_NEUTRAL, "images_kwargs": SmolVLMImageProcessor.NEUTRAL}
    for name, neutral in {**tables.get(group, SmolVLMVideoProcessor.NEUTRAL)}.items():
        for value in neutral.values:
            assert call(**{name: value}).keys() == plain.keys(), name
        with pytest.raises(InputError, match=name):
            call(**{name: "something else"})


def test_every_argument_of_the_tokenizer_has_an_answer(processor):
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    import inspect

    names = set(inspect.signature(transformers.PreTrainedTokenizerBase.__call__).parameters) - {"self", "text", "kwargs"}
    assert not names - TEXT_OPTIONS - {*TEXT_NEUTRAL}
    ours = processor.tokenizer
    for name in names:
        assert ours("hello", **{name: None})["input_ids"] == ours("hello")["input_ids"], name
    for wrong in ("pading", "return_tensor"):
        with pytest.raises(InputError, match=f"no argument '{wrong}'; did you mean"):
            ours("hello", **{wrong: True})


def test_text_arguments_that_ask_for_nothing(processor):
    neutral = dict(
        return_token_type_ids=False,
        is_split_into_words=False,
        audio=None,
        stride=0,
        verbose=True,
        return_overflowing_tokens=False,
    )
    assert processor(text="hello", **neutral) == processor(text="hello")
    assert processor(text="hello", videos=[], images=None) == processor(text="hello")
    for asking in ({"audio": [1.0]}, {"is_split_into_words": True}, {"text_pair": "x"}, {"sampling_rate": 16000}):
        with pytest.raises(InputError, match=next(iter(asking))):
            processor(text="hello", **asking)


def test_what_describes_tokens(processor):
    text = ["hello <image>", "hi"]
    out = processor(
        images=[[PICTURE], []], text=text, padding=True, return_offsets_mapping=True, return_special_tokens_mask=True,
        return_length=True, return_mm_token_type_ids=True, return_tensors="np",
    )  # fmt: skip
    b, t = out["input_ids"].shape
    assert out["offset_mapping"].shape == (b, t, 2) and out["length"].tolist() == [t, t]
    assert np.array_equal(out["mm_token_type_ids"], (out["input_ids"] == processor.image_token_id).astype(int))
    assert np.array_equal(out["special_tokens_mask"] == 1, out["attention_mask"] == 0)
    start, stop = out["offset_mapping"][1][out["attention_mask"][1] == 1][0]
    assert "hi"[start:stop] == processor.tokenizer.decode([out["input_ids"][1][out["attention_mask"][1] == 1][0]])


def test_the_assistants_tokens_are_marked(processor, caplog):
    template = (
        "{% for m in messages %}{{m.role}}:{% for c in m.content %}{% if c.type == 'image' %}<image>{% endif %}{% endfor %}"
        "{% if m.role == 'assistant' %}{% generation %}{{m.content[0].text}}<end_of_utterance>{% endgeneration %}"
        "{% else %}{{m.content[-1].text}}{% endif %}\n{% endfor %}"
    )
    chat = [
        {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red one"}]},
        {"role": "user", "content": [{"type": "text", "text": "sure?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]
    fixed = dict(tokenize=True, return_dict=True, return_tensors="np", return_assistant_tokens_mask=True)
    out = processor.apply_chat_template(chat, chat_template=template, **fixed)
    said = processor.tokenizer.decode(out["input_ids"][out["assistant_masks"] == 1])
    assert said == "a red one<end_of_utterance>yes<end_of_utterance>" and "offset_mapping" not in out
    del fixed["return_assistant_tokens_mask"]
    plain = processor.apply_chat_template(chat, chat_template=template, **fixed)
    assert np.array_equal(plain["input_ids"], out["input_ids"])
    batch = processor.apply_chat_template(
        [chat, chat[:2]], chat_template=template, padding=True, padding_side="left", return_assistant_tokens_mask=True, **fixed
    )
    assert processor.tokenizer.decode(batch["input_ids"][1][batch["assistant_masks"][1] == 1]) == "a red one<end_of_utterance>"
    none = processor.apply_chat_template(chat, return_assistant_tokens_mask=True, **fixed)
    assert not none["assistant_masks"].any() and "generation" in caplog.text
    with pytest.raises(InputError, match="return_dict"):
        processor.apply_chat_template(chat, return_assistant_tokens_mask=True)


def test_none_means_off_in_constructors_calls_and_files(tmp_path):
    for kind, data in ((SmolVLMImageProcessor, PICTURE), (SmolVLMVideoProcessor, [PICTURE])):
        switches = [name for name, default in kind.DEFAULTS.items() if isinstance(default, bool)]
        small = {"size": {"longest_edge": 64}, "max_image_size": 16}
        for name in switches:
            off, made = kind(**small, **{name: False}), kind(**small, **{name: None})
            assert getattr(made, name) is False
            assert repr(made(data)) == repr(off(data)) == repr(kind(**small)(data, **{name: None}))
            path = tmp_path / "preprocessor_config.json"
            kind(**small).to_json_file(path)
            path.write_text(path.read_text().replace(f'"{name}": true', f'"{name}": null'))
            if kind.DEFAULTS[name] and name not in kind.UNSAVED and name not in kind.OWN:
                assert getattr(kind.from_json_file(path), name) is False


def test_sizes_as_the_documentation_writes_them():
    documented = SmolVLMImageProcessor(do_resize=True, size={"longest_edge": 2 * 512}, max_image_size=512)
    written = SmolVLMImageProcessor(do_resize=True, size={"longest_edge": 2 * 512}, max_image_size={"longest_edge": 512})
    assert documented.plan(480, 640) == written.plan(480, 640)
    # transformers reads a number as a square
    assert SmolVLMImageProcessor(size=2048, max_image_size=512).plan(480, 640).num_tiles == 17


def test_frames_with_alpha_are_laid_over_white():
    frames = np.zeros((2, 8, 8, 4), np.uint8)
    frames[:, :4, :, 3] = 255
    video = SmolVLMVideoProcessor(size={"longest_edge": 8}, max_image_size={"longest_edge": 8}, do_resize=False)
    want = video(np.where(frames[..., 3:] > 0, 0, 255).astype(np.uint8).repeat(3, -1), pixel_format="uint8")["pixel_values"]
    for given in (frames, frames.transpose(0, 3, 1, 2), [Image.fromarray(frame) for frame in frames]):
        assert np.array_equal(video(given, pixel_format="uint8")["pixel_values"], want)


def test_frames_as_files_are_one_video_everywhere(processor, tmp_path):
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (20, 12), (80 * number, 5, 9)).save(paths[-1])
    for files in (paths, [str(path) for path in paths]):
        pictures = [Image.open(path) for path in paths]
        want = processor(videos=[pictures], text="<video>", return_tensors="np")
        chat = [{"role": "user", "content": [{"type": "video", "video": files}, {"type": "text", "text": "What?"}]}]
        for got in (
            processor(videos=[[files]], text="<video>", return_tensors="np"),
            processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="np"),
            processor.video_processor([[files]]),
        ):
            assert np.array_equal(got["pixel_values"], want["pixel_values"])


@dataclasses.dataclass
class Part:
    type: str
    text: str | None = None
    image: object = None


@dataclasses.dataclass
class Message:
    role: str
    content: list


def test_messages_may_be_objects(processor):
    plain = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What?"}]}]
    made = [Message("user", [Part("image", image=PICTURE), Part("text", text="What?")])]
    fixed = dict(tokenize=True, return_dict=True, return_tensors="np")
    want = processor.apply_chat_template(plain, **fixed)
    assert repr(processor.apply_chat_template(made, **fixed)) == repr(want)
    assert np.array_equal(processor.apply_chat_template([made, made], **fixed)["input_ids"][1], want["input_ids"][0])
    pydantic = pytest.importorskip("pydantic", reason="messages may be pydantic's objects")
    part = pydantic.create_model("P", type=(str, ...), text=(str | None, None), image=(typing.Any, None))
    message = pydantic.create_model("M", role=(str, ...), content=(list[part], ...))
    objects = [message(role="user", content=[part(type="image", image=PICTURE), part(type="text", text="What?")])]
    assert np.array_equal(processor.apply_chat_template(objects, **fixed)["input_ids"], want["input_ids"])


def test_the_tokenizer_adds_pads_and_decodes_as_the_reference(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    ours = SmolVLMTokenizer.from_pretrained("tiny")
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.all_special_tokens == theirs.all_special_tokens and ours.all_special_ids == theirs.all_special_ids
    for change in (
        lambda t: t.add_tokens(["wordy", "hello"]),
        lambda t: t.add_tokens("wordy"),
        lambda t: t.add_special_tokens({"sep_token": "<sep>", "extra_special_tokens": ["<a>", "<b>"]}),
        lambda t: t.add_special_tokens({"extra_special_tokens": ["<c>"]}, replace_extra_special_tokens=False),
        lambda t: (len(t), t.sep_token, t.sep_token_id, t.all_special_tokens, t.all_special_ids),
        lambda t: t.encode("wordy <sep><a> x"),
        lambda t: t.decode(t.encode("wordy <sep><a> x"), skip_special_tokens=True),
        lambda t: t.decode([[72, 73], [74]]),
        lambda t: t.decode([np.array([72, 73]), np.array([74])]),
    ):
        assert change(ours) == change(theirs)
    for read in (
        lambda t: t("hello you", max_length=2)["input_ids"],
        lambda t: t(["hello you", "a"], max_length=2)["input_ids"],
        lambda t: t("hello you", max_length=2, truncation=False)["input_ids"],
        lambda t: dict(t("hello", return_length=True)),
        lambda t: t.batch_decode([72, 73]),
        lambda t: t.batch_decode([[72], [73, 74]]),
        lambda t: t.batch_decode(np.array([72, 73])),
        lambda t: t.convert_tokens_to_string(t.tokenize("hello you")),
        lambda t: (t.vocab["<image>"], t.get_added_vocab(), t.added_tokens_encoder, t.is_fast, t.clean_up_tokenization_spaces),
        lambda t: {id: token.content for id, token in t.added_tokens_decoder.items()},
        lambda t: t.extra_special_tokens,
        lambda t: (setattr(t, "pad_token_id", 5), t.pad_token, t.pad_token_id),
        lambda t: t("hello").convert_to_tensors("np", prepend_batch_axis=True)["input_ids"].tolist(),
        lambda t: setattr(t, "pad_token", "<|im_end|>"),
    ):
        assert read(ours) == read(theirs)
    assert list(ours.get_added_vocab()) == list(theirs.get_added_vocab())
    for name in ("train_new_from_iterator", "name_or_path", "pading_side", "encode_plus"):
        with pytest.raises(HabitError, match=name):
            getattr(ours, name)
    with pytest.raises(HabitError, match=r"tokenizer\.encoding"):
        _ = ours("hello").word_ids
    with pytest.raises(InputError, match="padding_side"):
        SmolVLMTokenizer.from_pretrained("tiny", padding_side="middle")
    encoded = [ours("hello you"), ours("hi")]
    for options in ({}, {"padding": False}, {"max_length": 9, "padding": "max_length"}, {"pad_to_multiple_of": 4}):
        for side in ("left", "right"):
            pairs = [t.pad([dict(e) for e in encoded], padding_side=side, **options) for t in (ours, theirs)]
            assert pairs[0] == dict(pairs[1]), options
    labelled = [{**entry, "labels": [1]} for entry in encoded]
    assert ours.pad(labelled)["labels"] == [[1], [1]]
    for wrong in ({"audio_token": "<x>", "nothing_token": "<x>"}, {"pad_token": 7}):
        with pytest.raises(InputError):
            ours.add_special_tokens(wrong)
    with pytest.raises(InputError, match="input_ids"):
        ours.pad([[1, 2]])
