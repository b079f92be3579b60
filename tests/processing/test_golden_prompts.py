"""Golden cases G25–G35: ids and texts, with the real tokenizer, exact."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_tokenizer import TEMPLATE

from smolvlm_jax.errors import InputError, PromptError
from smolvlm_jax.processing import SmolVLMProcessor, SmolVLMTokenizer
from smolvlm_jax.processing.template import DEFAULT_CHAT_TEMPLATE

from .conftest import tri_img, tri_video, unrolled

IMAGE, WIDE = Image.fromarray(tri_img(30, 40)), Image.fromarray(tri_img(16, 200))
NO_SPLIT = {"images_kwargs": {"do_image_splitting": False}}
VIDEO = tri_video(12, 36, 64)
VIDEO_PROMPT = "<|im_start|>User: <video>Q?<end_of_utterance>\nAssistant:"
METADATA = {"total_num_frames": 12, "fps": 4.0, "duration": 3.0}


def assert_golden(expected, processor, **inputs):
    out = processor(return_tensors="np", **inputs)
    assert list(out["input_ids"].shape) == expected["shape"] and out["input_ids"].dtype == np.int64
    for name in ("ids", "attention_mask"):
        rows = out["input_ids" if name == "ids" else name]
        assert rows.tolist() == [unrolled(row) for row in expected[f"{name}_rle"]]
    assert list(out["pixel_values"].shape) == expected["pixel_values"]
    if "text" in expected:
        assert processor.batch_decode(out["input_ids"]) == expected["text"]


@pytest.fixture(scope="module")
def processor64(small, small_video, tokenizer):
    return SmolVLMProcessor(small, tokenizer, small_video, image_seq_len=64, chat_template=TEMPLATE)


def test_single(golden, processor64):
    prompt = "<|im_start|>User:<image>Hi<end_of_utterance>\nAssistant:"
    expected = golden["G25_prompt_single_no_split"]
    assert_golden(expected, processor64, images=[[IMAGE]], text=[prompt], **NO_SPLIT)
    # as a plain argument too, which the reference of 4.56 drops silently
    assert_golden(expected, processor64, images=IMAGE, text=prompt, do_image_splitting=False)
    prompt = "<|im_start|>User:<image>Can you describe this image?<end_of_utterance>\nAssistant:"
    assert_golden(golden["G26_prompt_split_3x4"], processor64, images=[[IMAGE]], text=[prompt])


def test_several_images(golden, processor):
    expected = golden["G27_prompt_multi_image"]
    assert_golden(expected["two"], processor, images=[[IMAGE, WIDE]], text=["A <image> B\n<image> C"])
    assert_golden(expected["two_no_split"], processor, images=[[IMAGE, WIDE]], text=["A <image> B\n<image> C"], **NO_SPLIT)
    assert_golden(expected["adjacent"], processor, images=[[IMAGE, IMAGE]], text=["<image><image>x"], **NO_SPLIT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(golden, processor, side):
    texts = ["<image>a", "some longer text <image> with more words"]
    assert_golden(
        golden["G28_prompt_batch_padding"][side],
        processor, images=[[IMAGE], [WIDE]], text=texts, padding=True, padding_side=side, **NO_SPLIT,
    )  # fmt: skip


def test_markers_beyond_six(golden, processor):
    image = Image.fromarray(tri_img(20, 200))
    assert_golden(
        golden["G29_rows_cols_over_6"],
        processor, images=[[image]], text=["<image>a"], images_kwargs={"size": {"longest_edge": 112}},
    )  # fmt: skip


def test_video_sampled(golden, processor):
    assert_golden(
        golden["G30_prompt_video_sampled"],
        processor, videos=[[VIDEO]], text=[VIDEO_PROMPT], do_sample_frames=True, num_frames=64, fps=1,
        video_metadata=[dict(METADATA)],
    )  # fmt: skip


def test_video_all_frames(golden, processor):
    expected = golden["G31_prompt_video_all_frames"]

    def with_metadata(**entries):
        return {"videos_kwargs": {"video_metadata": [{**METADATA, **entries}]}}

    assert_golden(
        expected["with_metadata"],
        processor, videos=[[VIDEO]], text=[VIDEO_PROMPT], **with_metadata(frames_indices=list(range(12))),
    )  # fmt: skip
    assert_golden(expected["no_metadata"], processor, videos=[[VIDEO[:3]]], text=[VIDEO_PROMPT])
    hours = {"total_num_frames": 2, "fps": 1 / 4000, "duration": 3725.9, "frames_indices": [0, 1]}
    assert_golden(expected["hours"], processor, videos=[[VIDEO[:2]]], text=["<video>Q?"], **with_metadata(**hours))
    assert_golden(expected["two_videos"], processor, videos=[[VIDEO[:2], VIDEO[2:4]]], text=["<video>A<video>B"])
    assert_golden(expected["one_frame"], processor, videos=[[VIDEO[:1]]], text=["<video>Q?"])


def test_errors(golden, processor, small, small_video):
    expected = golden["G32_errors"]
    cases = {
        "count_mismatch": lambda: processor(images=[[IMAGE]], text=["<image><image>a"]),
        "no_image_token": lambda: processor(images=[[IMAGE]], text=["a"]),
        "token_without_image": lambda: processor(text=["<image>a"]),
        "nothing": lambda: processor(),
        "images_and_videos_no_text": lambda: processor(images=IMAGE, videos=[[VIDEO]]),
        "flat_images_over_texts": lambda: processor(images=[IMAGE, IMAGE], text=["<image>a", "<image>b"]),
        "truncation": lambda: processor(images=[[IMAGE]], text=["<image>hello world"], truncation=True, max_length=10),
        "video_count_mismatch": lambda: processor(videos=[[VIDEO]], text=["a"], return_tensors="np"),
        "sampling_without_metadata": lambda: small_video(VIDEO, do_sample_frames=True),
        "tuple_images": lambda: processor(images=(IMAGE, IMAGE), text=["<image><image>"]),
        "bare_hw_array": lambda: small(tri_img(90, 150)[..., 0]),
        "empty_sublist": lambda: processor(images=[[IMAGE], []], text=["<image>a", "b"], padding=True),
    }
    assert set(cases) == set(expected)
    for name, call in cases.items():
        if expected[name] == "no error":
            call()
        else:
            with pytest.raises(ValueError) as caught:  # the class that the reference raises, and ours
                call()
            assert isinstance(caught.value, InputError) and expected[name]["error"] == "ValueError", name


def _message(role, *content):
    return {"role": role, "content": list(content)}


def _text(text):
    return {"type": "text", "text": text}


PICTURE, CLIP = {"type": "image"}, {"type": "video"}
CONVERSATIONS = {
    "image_first": [_message("user", PICTURE, _text("Q?"))],
    "text_first": [_message("user", _text("Q?"), PICTURE)],
    "two_images": [_message("user", PICTURE, PICTURE, _text("Q?"))],
    "multi_turn": [
        _message("user", PICTURE, _text("Q?")),
        _message("assistant", _text("An.")),
        _message("user", _text("More")),
    ],
    "system": [_message("system", _text("Be nice.")), _message("user", _text("hi"))],
    "video_first": [_message("user", CLIP, _text("Q?"))],
    "text_then_video": [_message("user", _text("Q?"), CLIP)],
    "role_case": [_message("toolUSER", _text("x"))],
}


def test_chat_template(golden, processor):
    expected = golden["G33_chat_template"]
    assert expected["_default_video_template"] == DEFAULT_CHAT_TEMPLATE
    assert expected["_checkpoint_template"] == TEMPLATE
    for name, conversation in CONVERSATIONS.items():
        found = [processor.apply_chat_template(conversation, add_generation_prompt=on) for on in (True, False)]
        assert found == expected[name], name
        assert processor.apply_chat_template([conversation] * 2, add_generation_prompt=True) == [expected[name][0]] * 2
    with pytest.raises(PromptError):
        processor.apply_chat_template([_message("user")])
    # The reference renders a string as nothing at all; here it is one text item.
    found = processor.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    assert found == expected["string_content"][0].replace("User: ", "User: hello")


def test_chat_tokenized(golden, processor):
    picture = {"type": "image", "image": IMAGE}
    cases = {
        "text": [_message("user", _text("Q?"))],
        "one": [_message("user", picture, _text("Q?"))],
        "two_turns_two_images": [
            _message("user", picture, _text("a")),
            _message("assistant", _text("b")),
            _message("user", picture, _text("c")),
        ],
    }
    arguments = {"add_generation_prompt": True, "tokenize": True, "return_tensors": "np"}
    for name, conversation in cases.items():
        expected = golden["G34_chat_tokenized"][name]
        out = processor.apply_chat_template(conversation, return_dict=True, **arguments)
        assert out["input_ids"].tolist() == [unrolled(row) for row in expected["ids_rle"]]
        found = list(out["pixel_values"].shape) if "pixel_values" in out else None
        assert found == expected["pixel_values"]
        ids = processor.apply_chat_template(conversation, **arguments)
        assert np.array_equal(ids, out["input_ids"])


def _assert_tokenizer(golden, tokenizer):
    for case in golden["G35_tokenizer"]:
        ids = tokenizer(case["text"])["input_ids"]
        assert ids == case["ids"], case
        assert tokenizer.decode(ids) == case["decoded"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded_skip"]
    for token, id in golden["G35_tokenizer_ids"].items():
        assert tokenizer.convert_tokens_to_ids(token) == id
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 49279, 2)
    assert (tokenizer.vocab_size, len(tokenizer)) == (49152, 49280)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "left")
    assert tokenizer(["hello", "hello world there"], padding=True)["input_ids"] == [[28120, 2, 2], [28120, 905, 665]]


def test_tokenizer(golden, tokenizer):
    _assert_tokenizer(golden, tokenizer)


def test_published_tokenizer_is_the_rebuilt_one(golden, checkpoint):
    published = Path(__file__).parents[3] / "shared" / "data" / "SmolVLM-256M-Instruct"
    if not published.is_dir():
        pytest.skip("the published files of SmolVLM-256M-Instruct are not beside the repository")
    _assert_tokenizer(golden, SmolVLMTokenizer.from_pretrained(published))
    ours, theirs = (json.loads((path / "tokenizer.json").read_text(encoding="utf-8")) for path in (checkpoint, published))
    assert ours == theirs
    processor = SmolVLMProcessor.from_pretrained(published)
    rebuilt = SmolVLMProcessor.from_pretrained(checkpoint)
    assert processor.chat_template == rebuilt.chat_template == TEMPLATE
    assert processor.image_processor.size == rebuilt.image_processor.size == {"longest_edge": 2048}
    assert processor.image_seq_len == 64


def test_split_of_digits(tokenizer, checkpoint):
    """Transformers 5 drops the digit split of tokenizer.json; the file is right, and a switch follows transformers."""
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    switched = SmolVLMTokenizer.from_pretrained(checkpoint, pre_tokenizer="transformers-5")
    rng = random.Random(0)
    letters = [*"abc de  \n\t'.,<>|019é你🙂½²٣①\u00a0", "<image>", "<|im_start|>", "\n\n", "n't"]
    for _ in range(2000):
        text = "".join(rng.choice(letters) for _ in range(rng.randint(1, 25)))
        wanted = theirs(text)["input_ids"]
        assert switched(text)["input_ids"] == wanted
        assert switched.decode(wanted) == theirs.decode(wanted)
        assert switched.decode(wanted, skip_special_tokens=True) == theirs.decode(wanted, skip_special_tokens=True)
        if not any(letter.isnumeric() for letter in text):
            assert tokenizer(text)["input_ids"] == wanted
    assert tokenizer("\n\n1")["input_ids"] == [1116, 33] and switched("\n\n1")["input_ids"] == [198, 198, 33]
    with pytest.raises(InputError, match="pre_tokenizer"):
        SmolVLMTokenizer.from_pretrained(checkpoint, pre_tokenizer="mine")
