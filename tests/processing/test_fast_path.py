"""uint8 tiles, threads, hashes, and the options that the reference does not have."""

import threading

import numpy as np
import pytest
from PIL import Image

from smolvlm_jax.errors import InputError
from smolvlm_jax.processing import BatchFeature, SmolVLMImageProcessor, SmolVLMProcessor, images

from .conftest import hash_img, tri_img, tri_video

SMALL = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}
TABLE = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)


def test_same_pixels(small):
    nested = [[hash_img(30, 40), Image.fromarray(hash_img(16, 200))], [], [hash_img(90, 15)]]
    reference = small(nested, return_row_col_info=True)
    flat = small(nested, pixel_format="uint8", return_row_col_info=True)
    assert flat["pixel_values"].dtype == np.uint8 and flat["pixel_values"].shape == (13 + 5 + 5, 16, 16, 3)
    assert flat["pixel_values"].flags.c_contiguous and "pixel_attention_mask" not in flat
    assert type(flat["num_tiles"]) is np.int32 and flat["num_tiles"] == 23
    real = reference["pixel_attention_mask"].any((-1, -2))
    assert np.array_equal(TABLE[flat["pixel_values"]].transpose(0, 3, 1, 2), reference["pixel_values"][real])
    assert (flat["rows"], flat["cols"]) == (reference["rows"], reference["cols"])


def test_videos(processor):
    videos = [tri_video(3, 36, 64), tri_video(5, 36, 64)]
    reference = processor(text="<video>a<video>", videos=videos, return_tensors="np")
    flat = processor(text="<video>a<video>", videos=videos, return_tensors="np", pixel_format="uint8")
    assert np.array_equal(flat["input_ids"], reference["input_ids"]) and flat["num_tiles"] == 8
    frames = np.concatenate([reference["pixel_values"][0, :3], reference["pixel_values"][1]])
    assert np.array_equal(TABLE[flat["pixel_values"]].transpose(0, 3, 1, 2), frames)
    assert (flat["input_ids"] == processor.image_token_id).sum() == 8 * processor.image_seq_len
    assert "video_metadata" not in flat
    assert len(processor(text="<video>", videos=videos[0], return_metadata=True)["video_metadata"]) == 1


@pytest.mark.parametrize(
    "option",
    [{"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}, {"image_mean": (0.4, 0.5, 0.5)},
     {"image_std": 1.0}],
)  # fmt: skip
def test_the_device_knows_stock_numbers_only(small, small_video, option):
    for processor, value in ((small, tri_img(20, 30)), (small_video, tri_video(2, 36, 64))):
        with pytest.raises(InputError, match="pixel_format='float32'"):
            processor(value, pixel_format="uint8", **option)
    stock = {"do_rescale": True, "rescale_factor": 0.00392156862745098, "image_mean": [0.5] * 3, "image_std": 0.5}
    assert small(tri_img(20, 30), pixel_format="uint8", **stock)["num_tiles"] == 13


def test_floats_do_not_travel_as_uint8(small):
    with pytest.raises(InputError, match="multiply it by 255"):
        small(tri_img(20, 30) / 255, pixel_format="uint8")
    whole = small(tri_img(20, 30).astype(np.float32), pixel_format="uint8")
    assert np.array_equal(whole["pixel_values"], small(tri_img(20, 30), pixel_format="uint8")["pixel_values"])
    with pytest.raises(InputError, match="RGB"):
        small(Image.fromarray(tri_img(20, 30)).convert("L"), pixel_format="uint8", do_convert_rgb=False)


def test_threads_change_nothing(small):
    pictures = [[Image.fromarray(hash_img(10 + 7 * n, 90 - 5 * n)) for n in range(6)], [hash_img(30, 30)]]
    one = small(pictures, num_threads=1)["pixel_values"]
    for count in (2, 5):
        assert np.array_equal(small(pictures, num_threads=count)["pixel_values"], one)
        flat = small(pictures, num_threads=count, pixel_format="uint8")["pixel_values"]
        assert np.array_equal(flat, small(pictures, num_threads=1, pixel_format="uint8")["pixel_values"])


def test_pictures_are_worked_on_at_once(monkeypatch):
    """Two pictures, two threads: each waits until the other has started."""
    both = threading.Barrier(2, timeout=20)
    true_cut = images.cut_tiles

    def cut_tiles(*arguments):
        both.wait()
        return true_cut(*arguments)

    monkeypatch.setattr(images, "cut_tiles", cut_tiles)
    out = SmolVLMImageProcessor(**SMALL, num_threads=2)([tri_img(20, 30), tri_img(30, 20)], pixel_format="uint8")
    assert out["num_tiles"] == 26


def test_a_picture_that_recurs_is_worked_on_once(small, monkeypatch, tmp_path):
    path = tmp_path / "p.png"
    picture = Image.fromarray(hash_img(20, 30))
    picture.save(path)
    wanted = small(picture)["pixel_values"][0]
    true_cut, calls = images.cut_tiles, []
    monkeypatch.setattr(images, "cut_tiles", lambda *arguments: calls.append(1) or true_cut(*arguments))
    out = small([[picture, str(path)], [str(path)], [picture]])["pixel_values"]
    assert len(calls) == 2
    assert all(np.array_equal(out[row, start : start + 13], wanted) for row, start in ((0, 0), (0, 13), (1, 0), (2, 0)))


def test_hashes(small, processor):
    a, b = Image.fromarray(hash_img(20, 30)), Image.fromarray(hash_img(21, 30))
    out = small([[a, b], [a.copy()]], return_image_hashes=True, pixel_format="uint8")
    (first, second), (third,) = out["image_hashes"]
    assert first == third != second and len(first) == 32 and int(first, 16) >= 0
    assert small(a, return_image_hashes=True)["image_hashes"] == [[first]]
    assert small(a, return_image_hashes=True, max_tiles=5)["image_hashes"] != [[first]]
    assert processor(text="<image>", images=a, return_image_hashes=True)["image_hashes"] == [[first]]
    assert "image_hashes" not in small(a)


def test_max_tiles_and_no_upscale(small):
    picture = Image.fromarray(hash_img(30, 40))
    for limit, tiles in ((1, 1), (2, 1), (4, 1), (5, 5), (9, 5), (12, 10), (13, 13), (99, 13)):
        assert small(picture, max_tiles=limit, pixel_format="uint8")["num_tiles"] == tiles
    # fewer tiles are those of a smaller size, exactly
    fewer = small(picture, max_tiles=5)["pixel_values"]
    assert np.array_equal(fewer, small(picture, size={"longest_edge": 32})["pixel_values"])
    kept = small(picture, do_upscale=False)["pixel_values"]
    assert np.array_equal(kept, small(picture, do_resize=False)["pixel_values"])
    large = Image.fromarray(hash_img(90, 120))
    assert np.array_equal(small(large, do_upscale=False)["pixel_values"], small(large)["pixel_values"])
    for bad in (0, -1, True):
        with pytest.raises(InputError, match="max_tiles"):
            small(picture, max_tiles=bad)


def test_sixteen_bits(small):
    grey = tri_img(30, 40)[..., 0]
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(small(deep, full_16bit=True)["pixel_values"], small(Image.fromarray(grey))["pixel_values"])
    # all but what is truly black saturates
    assert small(deep)["pixel_values"].mean() > 0.9


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 20_000), (1, 5000), (2, 1)])
def test_extreme_pictures(size):
    """One pixel, and 20,000 × 3, at the stock sizes."""
    stock = SmolVLMImageProcessor(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    out = stock(Image.new("RGB", size, (9, 90, 200)), pixel_format="uint8")
    assert out["num_tiles"] == (17 if max(size) <= 2 and size[0] == size[1] else 5 if max(size) > 2 else 9)
    assert (out["pixel_values"] == np.array([9, 90, 200], np.uint8)).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 5}}, {"size": {"height": 5}}, {"size": {"longest_edge": 0}}, {"size": "big"},
        {"size": {"longest_edge": "64"}}, {"max_image_size": 0}, {"max_image_size": {"height": 5}}, {"resample": 9},
        {"resample": "lanczos"}, {"input_data_format": "sideways"}, {"image_mean": (0.5, 0.5)},
    ],
)  # fmt: skip
def test_arguments_without_sense(small, settings):
    with pytest.raises(InputError):
        small(tri_img(20, 30), **settings)


def test_call_time_none_is_an_error_where_a_value_is_needed(small):
    for name in ("size", "resample", "image_mean", "image_std", "rescale_factor"):
        with pytest.raises(InputError, match=name):
            small(tri_img(20, 30), **{name: None})


def test_arguments_of_the_reference_that_ask_for_nothing(small):
    neutral = {"data_format": "channels_first", "do_center_crop": False, "device": "cpu", "crop_size": None}
    assert np.array_equal(small(tri_img(20, 30), **neutral)["pixel_values"], small(tri_img(20, 30))["pixel_values"])
    for asking in ({"data_format": "sideways"}, {"do_center_crop": True}, {"crop_size": 5}, {"device": "cuda"}):
        with pytest.raises(InputError, match=next(iter(asking))):
            small(tri_img(20, 30), **asking)
    with pytest.raises(InputError, match="do_image_spliting"):
        SmolVLMImageProcessor(do_image_spliting=False)
    assert "rows" in SmolVLMImageProcessor(**SMALL, return_row_col_info=True)(tri_img(20, 30))


@pytest.mark.parametrize(
    "bad", [[], [[]], [[], []], None, 7, [[[tri_img(9, 9)]]], [tri_img(9, 9), [tri_img(9, 9)]], [None], object()]
)
def test_nestings_without_sense(small, bad):
    with pytest.raises(InputError):
        small(bad)


def test_nestings(small):
    picture = hash_img(20, 30)
    one = small(picture)["pixel_values"]
    stack = np.stack([picture, picture])
    two = np.concatenate([one, one], 1)
    assert np.array_equal(small(stack)["pixel_values"], two)
    assert np.array_equal(small([picture, picture])["pixel_values"], two)
    assert np.array_equal(small((picture, picture))["pixel_values"], two)
    assert np.array_equal(small([stack, stack])["pixel_values"], np.concatenate([two, two]))
    assert np.array_equal(small(((picture,), [picture]))["pixel_values"], np.concatenate([one, one]))


def test_do_not_pad(small):
    ragged = small([[tri_img(30, 40)], [tri_img(16, 200)]], do_pad=False, return_tensors="np")
    assert ragged["pixel_values"].dtype == object and [len(v) for v in ragged["pixel_values"]] == [13, 5]
    even = small([[tri_img(30, 40)], [tri_img(30, 40)]], do_pad=False)
    assert even["pixel_values"].shape == (2, 13, 3, 16, 16) and "pixel_attention_mask" not in even


def test_tensors_of_others(small):
    torch = pytest.importorskip("torch", reason="the reference: pip install 'smolvlm-jax[test]'")
    picture = hash_img(20, 30)
    for tensor in (torch.from_numpy(picture), torch.from_numpy(picture.transpose(2, 0, 1).copy())):
        assert np.array_equal(small(tensor)["pixel_values"], small(picture)["pixel_values"])


def test_premultiplied_alpha(small):
    picture = Image.fromarray(np.dstack([hash_img(20, 30), tri_img(20, 30)[..., :1]]))
    assert small(picture.convert("RGBa"))["pixel_values"].shape == (1, 13, 3, 16, 16)


def test_a_tokenizer_of_transformers(processor, checkpoint):
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    own = SmolVLMProcessor(processor.image_processor, theirs, processor.video_processor, 4)
    picture = Image.fromarray(hash_img(20, 30))
    conversation = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Hi 12"}]}]
    found, wanted = (p.apply_chat_template(conversation, tokenize=True) for p in (own, processor))
    assert found == wanted
    with pytest.raises(InputError, match="tokenizer"):
        SmolVLMProcessor(tokenizer=object())


def test_batch_feature():
    batch = BatchFeature(input_ids=np.zeros((1, 2), np.int64))
    batch.extra = 5
    assert batch["extra"] == 5 and dict(**batch).keys() == {"input_ids", "extra"} and "int64[1, 2]" in repr(batch)
    with pytest.raises(AttributeError, match="nothing"):
        batch.nothing  # noqa: B018


def test_unused_variables_of_a_template(processor):
    with pytest.raises(InputError, match="paddding"):
        processor.apply_chat_template([{"role": "user", "content": "x"}], tokenize=True, paddding=True)
    with pytest.raises(InputError, match="return_assistant_tokens_mask"):
        processor.apply_chat_template([{"role": "user", "content": "x"}], return_assistant_tokens_mask=True)


def test_pictures_through_processor_kwargs(processor):
    """For templates that place pictures from elsewhere; the truth value of an array is never taken."""
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]}]
    for pictures in ([hash_img(20, 30)], hash_img(20, 30), np.stack([hash_img(20, 30)])):
        out = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, processor_kwargs={"images": pictures}
        )
        assert out["pixel_values"].shape == (1, 13, 3, 16, 16)
