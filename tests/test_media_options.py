"""Every option of the processors and of the limits reaches jobs and training, and no other name does."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from smolvlm_jax.batch import BatchConfig
from smolvlm_jax.batch.ray import SmolVLMPreprocessor
from smolvlm_jax.batch.workers import Preparer, Setup
from smolvlm_jax.checkpoint import resolve
from smolvlm_jax.cli import _parser
from smolvlm_jax.errors import ConfigError, InputError
from smolvlm_jax.media_options import PictureOptions
from smolvlm_jax.processing import MediaLimits, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor
from smolvlm_jax.processing.options import check_options, open_processor
from smolvlm_jax.records.record import Record
from smolvlm_jax.train.config import DataConfig
from smolvlm_jax.train.plain import from_dict
from smolvlm_jax.train.samples import Prepare

TINY = str(resolve("tiny"))
# What the device does, what only a caller with arrays of its own has a use for, and what the job itself decides.
LEFT_OUT = {"do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_pad"}
LEFT_OUT |= {"limits", "num_threads", "return_row_col_info"}


def test_there_is_an_option_for_everything():
    limits = {field.name for field in dataclasses.fields(MediaLimits)}
    wanted = {*SmolVLMImageProcessor.DEFAULTS, *SmolVLMVideoProcessor.DEFAULTS, *limits, "skip_secs"} - LEFT_OUT
    assert {field.name for field in dataclasses.fields(PictureOptions)} == wanted


def test_the_help_shows_the_limits():
    defaults = {field.name: field.default for field in dataclasses.fields(MediaLimits)}
    options = dataclasses.fields(PictureOptions)
    assert {field.name: field.metadata["limit"] for field in options if "limit" in field.metadata} == defaults


def test_options_reach_the_processor():
    options = PictureOptions(max_tiles=2, background="red", num_frames=5, fps=2, max_pixels=99, urls=False, backend="pyav")
    processor = open_processor(TINY, options)
    assert (processor.image_processor.max_tiles, processor.image_processor.background) == (2, "red")
    videos = processor.video_processor
    assert (videos.num_frames, videos.fps, videos.backend) == (5, 2, "pyav")
    for part in (processor.image_processor, videos):
        assert part.limits == MediaLimits(max_pixels=99, urls=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tiles": "3"}, "max_tiles is '3'; it needs a value of type int"),
        ({"do_upscale": 1}, "do_upscale"),
        ({"fps": float("nan")}, "fps"),
        ({"max_pixels": -1}, "max_pixels is -1; it cannot be negative"),
        ({"size": [3]}, "size"),
    ],
)
def test_values_of_the_wrong_type_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        PictureOptions(**options)
    with pytest.raises(ConfigError, match=f"data.image_options: {words}"):
        DataConfig(image_options=tuple(options.items()))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("background", "no colour", "no colour"),
        ("pages", "last", "pages"),
        ("pages", 0, "pages"),
        ("backend", "vlc", "backend"),
        ("resample", 9, "resample"),
        ("max_tiles", 0, "max_tiles"),
    ],
)
def test_values_that_make_no_sense_are_refused_before_a_job(name, value, words):
    with pytest.raises(InputError, match=words):
        check_options(open_processor(TINY, PictureOptions(**{name: value})))


def test_unknown_names_are_refused(capsys):
    with pytest.raises(ConfigError, match="no picture option max_tile; there are max_tiles"):
        from_dict({"image_options": {"max_tile": 3}}, DataConfig)
    with pytest.raises(TypeError, match="max_tile"):
        SmolVLMPreprocessor(TINY, max_tile=3)
    with pytest.raises(SystemExit):
        _parser().parse_args(["batch", "in", "out", "--max-tilez", "3"])
    with pytest.raises(SystemExit):
        _parser().parse_args(["batch", "in", "out", "--size", "large"])
    assert "--max-tilez" in (said := capsys.readouterr().err) and "--size" in said


def test_the_command_line_has_them_all():
    words = {bool: [], int: ["3"], float: ["0.5"], str: ["first"], dict: ['{"longest_edge": 96}']}
    for field in dataclasses.fields(PictureOptions):
        kind = next(kind for kind in words if kind.__name__ in str(field.type).partition("[")[0].split(" | "))
        flag = "--" + field.name.removeprefix("do_").replace("_", "-")
        read = getattr(_parser().parse_args(["batch", "in", "out", flag, *words[kind]]), field.name)
        PictureOptions(**{field.name: read})
        assert read is not None
        if kind is bool:
            assert getattr(_parser().parse_args(["generate", "?", flag.replace("--", "--no-", 1)]), field.name) is False


def test_transparent_ink_is_read_alike_in_batch_ray_and_training(tmp_path):
    ink = np.zeros((40, 60, 4), np.uint8)
    ink[10:30, 20:40, 3] = 255
    Image.fromarray(ink, "RGBA").save(tmp_path / "ink.png")
    messages = [
        {"role": "user", "content": [{"type": "image", "path": str(tmp_path / "ink.png")}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
    ]
    want = SmolVLMProcessor.from_pretrained(TINY).encode_chat(messages[:1], background="white")["pixel_values"]
    assert want.max() == 255
    options = PictureOptions(background="white")
    made = Preparer(Setup(TINY, lambda payload: Record(1, messages[:1]), pictures=options))(None)
    assert np.array_equal(made.prepared.tiles, want)
    ray = SmolVLMPreprocessor(TINY, background="white")._prepare({"messages": messages[:1]})
    assert np.array_equal(ray.prepared.tiles, want)
    learn = Prepare(TINY, DataConfig(image_options=(("background", "white"),)))
    assert np.array_equal(learn(({"messages": messages}, "", "here")).tiles, want)
    assert BatchConfig(input="a", output="b", model="tiny", pictures=options).pictures.given() == {"background": "white"}
