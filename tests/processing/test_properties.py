"""Properties over thousands of random cases: counts agree everywhere, files round-trip, padding changes nothing."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from smolvlm_jax.processing import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor
from smolvlm_jax.processing.geometry import plan_tiles
from smolvlm_jax.processing.numwords import number_to_words

SLOW = {"deadline": None, "suppress_health_check": list(HealthCheck)}
sides = st.one_of(st.integers(1, 40), st.integers(1, 6000))
edges = st.sampled_from([(2048, 512), (1536, 384), (1024, 512), (512, 512), (300, 512), (1456, 364), (5120, 512), (100, 39)])
options = st.fixed_dictionaries(
    {},
    optional={
        "do_image_splitting": st.booleans(),
        "do_resize": st.booleans(),
        "do_upscale": st.booleans(),
        "max_tiles": st.integers(1, 40),
        "edges": edges,
    },
)


def unpacked(options):
    options = dict(options)
    if "edges" in options:
        longest, tile = options.pop("edges")
        options.update(size={"longest_edge": longest}, max_image_size={"longest_edge": tile})
    return options


@pytest.fixture(scope="module")
def own(own_checkpoint):
    return SmolVLMProcessor.from_pretrained(own_checkpoint)


@pytest.fixture(scope="module")
def stock(own):
    """Stock sizes; image tokens per tile are few to keep the prompts short."""
    images = SmolVLMImageProcessor(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    return SmolVLMProcessor(images, own.tokenizer, image_seq_len=3)


@given(width=sides, height=sides, options=options)
@settings(max_examples=2000, **SLOW)
def test_count_equals_the_expansion(stock, width, height, options):
    """count_tokens is the number of image tokens in the prompt, for any size and override, without a pixel."""
    options = unpacked(options)
    if not options.get("do_resize", True) and "max_tiles" not in options and max(width, height) > 3000:
        options["max_tiles"] = 30  # hundreds of tiles otherwise
    plan = stock.image_processor.plan(height, width, **options)
    block = stock.media_tokens.picture(plan.rows, plan.cols)
    ids = stock.tokenizer(block)["input_ids"]
    assert ids.count(stock.image_token_id) == stock.count_tokens(width, height, **options) == plan.num_tiles * 3
    if "max_tiles" in options:
        assert plan.num_tiles <= options["max_tiles"]
    assert all(side % plan.tile == 0 for side in plan.sizes[-1])
    assert (plan.rows == 0) == (plan.cols == 0) and plan.rows * plan.cols != 1


small_sides = st.one_of(st.integers(1, 9), st.integers(1, 90))
batches = st.lists(st.lists(st.tuples(small_sides, small_sides), max_size=3), min_size=1, max_size=4)


@given(batch=batches, options=options, left=st.booleans())
@settings(max_examples=400, **SLOW)
def test_tokens_tiles_features(own, batch, options, left):
    """tokens == tiles × seq_len == count_tokens == what the encoder gets, in real batches of any mix."""
    options = {name: value for name, value in unpacked(options).items() if name not in ("size", "max_image_size")}
    rng = np.random.default_rng(len(batch))
    images = [[Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sample] for sample in batch]
    texts = ["".join(f"{i}<image>" for i in range(len(sample))) + "?" for sample in batch]
    arguments = {"images": images, "text": texts, "padding": True, "return_tensors": "np", **options}
    arguments["padding_side"] = "left" if left else "right"
    out = own(**arguments)
    tokens = (out["input_ids"] == own.image_token_id).sum(1)
    counted = [sum(own.count_tokens(w, h, **options) for w, h in sample) for sample in batch]
    assert tokens.tolist() == counted
    if not any(batch):
        assert "pixel_values" not in out
        return
    real = out["pixel_attention_mask"].any((-1, -2))
    # no uint8 value normalises to zero, so a picture is all zero exactly if it is padding
    assert np.array_equal(out["pixel_values"].any((-1, -2, -3)), real)
    assert (real.sum(1) * own.image_seq_len).tolist() == counted
    flat = own(**arguments, pixel_format="uint8")
    assert flat["num_tiles"] == len(flat["pixel_values"]) == real.sum() and flat["num_tiles"].dtype == np.int32
    assert np.array_equal(flat["input_ids"], out["input_ids"])
    # the same tiles in the same order: the k-th block of image tokens is the k-th real tile
    table = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
    assert np.array_equal(table[flat["pixel_values"]].transpose(0, 3, 1, 2), out["pixel_values"][real])


@given(batch=batches, options=st.fixed_dictionaries({"do_image_splitting": st.booleans()}))
@settings(max_examples=150, **SLOW)
def test_padding_never_changes_content(own, batch, options):
    """A row of a batch without its padding is equal to the row alone: tokens and pixels, padded left or right."""
    images = [[Image.new("RGB", size, (7, 8, 9)) for size in sample] for sample in batch]
    texts = ["x" * row + "<image>" * len(sample) for row, sample in enumerate(batch)]
    texts = [text or "y" for text in texts]
    outs = {
        side: own(images=images, text=texts, padding=True, padding_side=side, return_tensors="np", **options)
        for side in ("left", "right")
    }
    for row, sample in enumerate(images):
        alone = own(images=[sample] if sample else None, text=texts[row], return_tensors="np", **options)
        for side, out in outs.items():
            mask = out["attention_mask"][row].astype(bool)
            assert np.array_equal(out["input_ids"][row][mask], alone["input_ids"][0])
            assert set(out["input_ids"][row][~mask].tolist()) <= {own.tokenizer.pad_token_id}
            assert (np.diff(mask.astype(int)) >= 0).all() if side == "left" else (np.diff(mask.astype(int)) <= 0).all()
            if sample:
                real = alone["pixel_values"][0]
                assert np.array_equal(out["pixel_values"][row, : len(real)], real)
                assert not out["pixel_values"][row, len(real) :].any()


@given(
    conversation=st.lists(st.lists(st.tuples(small_sides, small_sides), max_size=2), min_size=1, max_size=3), options=options
)
@settings(max_examples=150, **SLOW)
def test_prompt_length_without_pixels(own, conversation, options):
    """count_prompt_tokens is the length of the real prompt."""
    options = {name: value for name, value in unpacked(options).items() if name not in ("size", "max_image_size")}
    messages = [
        {
            "role": ("user", "assistant")[number % 2],
            "content": [{"type": "image", "image": Image.new("RGB", size)} for size in sizes]
            + [{"type": "text", "text": "a?"}],
        }
        for number, sizes in enumerate(conversation)
    ]
    ids = own.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, **options)
    assert own.count_prompt_tokens(messages, add_generation_prompt=True, **options) == [len(ids[0])]


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20)
image_settings = st.fixed_dictionaries(
    {},
    optional={
        "size": st.one_of(
            st.builds(lambda n: {"longest_edge": n}, st.integers(1, 5000)),
            st.builds(lambda h, w: {"height": h, "width": w}, st.integers(1, 900), st.integers(1, 900)),
        ),
        "max_image_size": st.builds(lambda n: {"longest_edge": n}, st.integers(1, 600)),
        "resample": st.integers(0, 5),
        "do_resize": st.booleans(),
        "do_image_splitting": st.booleans(),
        "do_pad": st.booleans(),
        "do_rescale": st.booleans(),
        "rescale_factor": st.floats(1e-6, 10),
        "image_mean": st.lists(st.floats(-2, 2), min_size=3, max_size=3),
        "max_tiles": st.one_of(st.none(), st.integers(1, 50)),
        "do_upscale": st.booleans(),
        "exif_transpose": st.booleans(),
        "processor_class": names,
    },
)


@given(
    images=image_settings,
    frames=st.integers(1, 99),
    fps=st.floats(0.1, 30),
    size=st.booleans(),
    template=names,
    seq=st.integers(1, 200),
)
@settings(max_examples=150, **SLOW)
def test_parse_of_save_is_identity(own, tmp_path_factory, images, frames, fps, size, template, seq):
    sampling = {"max_frames": frames, "fps": fps, "video_size": {"longest_edge": 77}}
    videos = SmolVLMVideoProcessor(
        video_sampling=sampling, use_video_size=size, **{k: images[k] for k in ("size",) if k in images}
    )
    processor = SmolVLMProcessor(SmolVLMImageProcessor.from_dict(images), own.tokenizer, videos, seq, template or None)
    directory = tmp_path_factory.mktemp("saved")
    processor.save_pretrained(directory)
    again = SmolVLMProcessor.from_pretrained(directory)
    assert again.to_dict() == processor.to_dict()
    assert again.image_processor == processor.image_processor and again.video_processor == processor.video_processor
    assert (again.chat_template or None) == processor.chat_template and again.image_seq_len == seq
    assert again.tokenizer.backend.to_str() == own.tokenizer.backend.to_str()
    assert again.tokenizer.special_tokens_map == own.tokenizer.special_tokens_map
    again.save_pretrained(directory / "again")
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert files == {path.name: path.read_bytes() for path in (directory / "again").iterdir()}


@given(width=sides, height=sides)
@settings(max_examples=300, **SLOW)
def test_no_upscale_never_costs(width, height):
    """Without upscaling there are never more tiles, and an icon is one."""
    sizes = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    stock, kept = (plan_tiles(height, width, do_upscale=on, **sizes) for on in (True, False))
    assert kept.num_tiles <= stock.num_tiles
    if max(width, height) <= 512:
        assert kept.num_tiles == 1 and stock.num_tiles > 1
    if max(width, height) > 2048:
        assert kept == stock


def test_number_words():
    num2words = pytest.importorskip("num2words", reason="the reference: pip install 'smolvlm-jax[test]'").num2words
    for number in (*range(10_001), 99_999, 100_000, 100_100, 1_000_000, 1_000_001, 12_345_678_901):
        assert number_to_words(number) == num2words(number)
    for outside in (-1, 10**15):
        with pytest.raises(ValueError):
            number_to_words(outside)
