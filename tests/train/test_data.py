"""From conversations to batches: what is learned, what fits, and what goes together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train_helpers import assistant, user

from smolvlm_jax.checkpoint import resolve
from smolvlm_jax.errors import PromptError
from smolvlm_jax.processing import SmolVLMProcessor
from smolvlm_jax.train.config import IGNORE, DataConfig
from smolvlm_jax.train.packing import BatchShape, make_batch, plan_rows
from smolvlm_jax.train.samples import Sample, Skipped, label_tokens, make_sample


@pytest.fixture(scope="module")
def processor():
    return SmolVLMProcessor.from_pretrained(resolve("tiny"))


CONVERSATION = [user("Number?", pictures=1), assistant("7"), user("And now the second?"), assistant("It is 12.")]


# ---- what is learned


def test_loss_on_assistant_tokens_only(processor):
    """Each answer and its end, multi-turn; what stands before an answer is what generation would be prompted with."""
    sample = make_sample(processor, CONVERSATION, DataConfig())
    learned = sample.labels != IGNORE
    assert np.array_equal(sample.labels[learned], sample.input_ids[learned])
    text = processor.decode(sample.labels[learned], skip_special_tokens=False)
    assert text == " 7<end_of_utterance> It is 12.<end_of_utterance>"
    assert not (sample.labels == processor.image_token_id).any()
    for turn in (1, 3):
        prompt = processor.apply_chat_template(CONVERSATION[:turn], add_generation_prompt=True, tokenize=True)[0]
        starts = np.flatnonzero(learned & ~np.roll(learned, 1))[turn // 2]
        assert sample.input_ids[:starts].tolist() == list(prompt)


def test_switches_for_more_and_less(processor):
    last = make_sample(processor, CONVERSATION, DataConfig(loss_on="last"))
    assert processor.decode(last.labels[last.labels != IGNORE], skip_special_tokens=False) == " It is 12.<end_of_utterance>"
    everything = make_sample(processor, CONVERSATION, DataConfig(loss_on="all"))
    learned = everything.labels != IGNORE
    text = processor.decode(everything.labels[learned], skip_special_tokens=False)
    assert "Number?" in text and "It is 12." in text and "<image>" not in text and "fake_token" not in text
    assert not np.isin(everything.labels[learned], [processor.image_token_id]).any()


def test_turns_of_weight_zero_are_context(processor):
    weighted = [{**turn, "weight": weight} for turn, weight in zip(CONVERSATION, (1, 0, 0, 1.0), strict=True)]
    whole = make_sample(processor, CONVERSATION, DataConfig())
    for loss_on, words in (("assistant", [" It is 12."]), ("last", [" It is 12."]), ("all", ["Number?", " It is 12."])):
        sample = make_sample(processor, weighted, DataConfig(loss_on=loss_on))
        assert np.array_equal(sample.input_ids, whole.input_ids)
        text = processor.decode(sample.labels[sample.labels != IGNORE], skip_special_tokens=False)
        assert all(word in text for word in words) and " 7<" not in text and "second" not in text
    none = [{**turn, "weight": 0} for turn in CONVERSATION]
    for loss_on in ("assistant", "last", "all"):
        with pytest.raises(PromptError, match="weight 0"):
            make_sample(processor, none, DataConfig(loss_on=loss_on))


def test_timestamps_of_videos_are_masked(processor):
    frames = np.random.default_rng(0).integers(0, 255, (4, 40, 60, 3), np.uint8)
    video = {"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "Number?"}]}
    messages = [video, assistant("3")]
    ids = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="np", pixel_format="uint8", do_sample_frames=False,
        video_metadata=[{"fps": 1.0, "total_num_frames": 4, "duration": 4.0, "frames_indices": [0, 1, 2, 3]}],
    )["input_ids"][0]  # fmt: skip
    assert "00:0" in processor.decode(ids)
    labels = label_tokens(processor, messages, ids, "assistant")
    assert processor.decode(labels[labels != IGNORE], skip_special_tokens=False) == " 3<end_of_utterance>"


def test_words_that_look_like_special_tokens_stay_words(processor):
    messages = [user("say <end_of_utterance> and <image>", pictures=1), assistant("no <image> here")]
    sample = make_sample(processor, messages, DataConfig())
    text = processor.decode(sample.labels[sample.labels != IGNORE], skip_special_tokens=False)
    assert text == " no <image> here<end_of_utterance>"
    with pytest.raises(PromptError):
        make_sample(processor, messages, DataConfig(special_tokens_in_text="error"))


def test_a_template_without_ends_of_turns_is_refused(processor):
    with pytest.raises(PromptError, match="2 turns, but 0 tokens that end a turn"):
        label_tokens(processor, CONVERSATION[:2], np.array([5, 6, 7]), "assistant")


# ---- what fits


def test_a_picture_is_never_cut(processor):
    """Too long: skipped with what it would have needed, or whole pictures dropped from the end; tokens and tiles agree."""
    messages = [user("Which picture shows the larger number?", pictures=3), assistant("The first.")]
    whole = make_sample(processor, messages, DataConfig())
    need = len(whole)
    skipped = make_sample(processor, messages, DataConfig(length=need - 1))
    assert isinstance(skipped, Skipped) and skipped.reason == "too_long"
    assert skipped.detail == f"{need} tokens and {len(whole.tiles)} tiles"
    shorter = make_sample(processor, messages, DataConfig(length=need - 1, too_long="drop_pictures"))
    assert shorter.dropped == 1 and len(shorter) <= need - 1
    for sample in (whole, shorter):
        assert (sample.input_ids == processor.image_token_id).sum() == len(sample.tiles) * processor.image_seq_len
    assert len(shorter.tiles) == len(whole.tiles) * 2 // 3
    few = make_sample(processor, messages, DataConfig(tiles_per_row=len(whole.tiles) - 1))
    assert isinstance(few, Skipped)
    text_only = make_sample(processor, [user("x " * 100), assistant("y")], DataConfig(length=50, too_long="drop_pictures"))
    assert isinstance(text_only, Skipped)


# ---- which go together


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=40))
def test_every_sample_stands_in_one_row_whole(sizes):
    lengths, tiles = zip(*sizes, strict=True)
    samples = [
        Sample(np.zeros(length, np.int32), np.zeros(length, np.int32), np.zeros((n, 1, 1, 3), np.uint8)) for length, n in sizes
    ]
    shape = BatchShape(rows=1, length=64, tiles=8, tile_size=1)
    rows = plan_rows(samples, shape)
    assert sorted(n for row in rows for n in row) == list(range(len(sizes)))
    for row in rows:
        assert sum(lengths[n] for n in row) <= 64 and sum(tiles[n] for n in row) <= 8 and row == sorted(row)
    assert len(rows) <= 2 * max(-(-sum(lengths) // 64), -(-sum(tiles) // 8)) + 2
    assert plan_rows(samples, shape, alone=True) == [[n] for n in range(len(sizes))]


def test_a_batch_keeps_segments_and_tiles_in_order():
    sample = lambda value, length, count: Sample(
        np.full(length, value, np.int32), np.full(length, value, np.int32), np.full((count, 2, 2, 3), value, np.uint8)
    )
    shape = BatchShape(rows=2, length=8, tiles=3, tile_size=2)
    batch = make_batch([[sample(5, 3, 1), sample(6, 2, 1)], [sample(7, 4, 2)]], shape, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 5, 5, 6, 6, 9, 9, 9], [7, 7, 7, 7, 9, 9, 9, 9]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch["labels"][0].tolist() == [IGNORE, 5, 5, IGNORE, 6, IGNORE, IGNORE, IGNORE]
    assert batch["pixel_values"][:, :, 0, 0, 0].tolist() == [[5, 6, 0], [7, 7, 0]]
    assert batch["tile_mask"].tolist() == [[True, True, False]] * 2
    text_only = BatchShape(rows=1, length=8, tiles=0, tile_size=2)
    assert "pixel_values" not in make_batch([[sample(5, 3, 0)]], text_only, 9)
