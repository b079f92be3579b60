"""Files of a checkpoint: v4, v5, precedence, what is missing, what is broken."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smolvlm_jax.errors import CheckpointError, InputError
from smolvlm_jax.processing import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMTokenizer, SmolVLMVideoProcessor
from smolvlm_jax.processing.template import DEFAULT_CHAT_TEMPLATE

from .conftest import tri_img, write_own_checkpoint


@pytest.fixture
def directory(tmp_path):
    return write_own_checkpoint(tmp_path / "checkpoint")


def put(directory, name, value):
    path = Path(directory) / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_own_directory(directory):
    processor = SmolVLMProcessor.from_pretrained(directory)
    assert processor.image_processor.size == {"longest_edge": 64} and processor.image_seq_len == 4
    assert processor.image_processor.max_image_size["longest_edge"] == 32
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert processor.tokenizer.eos_token == "<end_of_utterance>" and processor.tokenizer.pad_token_id == 2
    conversation = [{"role": "user", "content": [{"type": "image", "image": Image.fromarray(tri_img(30, 40))}, "Q?"]}]
    out = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="np",
        padding=True, padding_side="left",
    )  # fmt: skip
    assert out["pixel_values"].shape == (1, 5, 3, 32, 32) and out.pixel_values is out["pixel_values"]
    assert (out.input_ids == processor.image_token_id).sum() == 20 == processor.count_tokens(40, 30)
    assert "<row_2_col_2>" in processor.decode(out["input_ids"][0])


def test_precedence(directory):
    """Nested in processor_config.json, then its own file, then the file for pictures."""

    def sizes():
        processor = SmolVLMProcessor.from_pretrained(directory)
        alone = SmolVLMImageProcessor.from_pretrained(directory), SmolVLMVideoProcessor.from_pretrained(directory)
        both = processor.image_processor, processor.video_processor
        assert alone == both
        return [part.size["longest_edge"] for part in both]

    (Path(directory) / "preprocessor_config.json").unlink()
    assert sizes() == [1456, 1456]
    put(directory, "preprocessor_config.json", {"size": {"longest_edge": 100}})
    assert sizes() == [100, 100]
    put(directory, "video_preprocessor_config.json", {"size": {"longest_edge": 200}})
    assert sizes() == [100, 200]
    put(directory, "processor_config.json", {"video_processor": {"size": {"longest_edge": 300}}})
    assert sizes() == [100, 300]
    put(directory, "processor_config.json", {"image_processor": {"size": {"longest_edge": 400}}, "image_seq_len": 9})
    assert sizes() == [400, 200]
    assert SmolVLMProcessor.from_pretrained(directory).image_seq_len == 9
    (Path(directory) / "processor_config.json").unlink()
    assert SmolVLMProcessor.from_pretrained(directory).image_seq_len == 169
    path = Path(directory) / "video_preprocessor_config.json"
    assert SmolVLMVideoProcessor.from_pretrained(path).size == {"longest_edge": 200}


def test_templates(directory):
    def template():
        return SmolVLMProcessor.from_pretrained(directory).chat_template

    assert template() is None
    config = json.loads((Path(directory) / "tokenizer_config.json").read_text())
    put(directory, "tokenizer_config.json", {**config, "chat_template": "tokenizer"})
    assert template() == "tokenizer"
    put(directory, "chat_template.jinja", "jinja é\r\n")
    assert template() == "jinja é\r\n"
    put(directory, "additional_chat_templates/tools.jinja", "tools")
    assert template() == {"default": "jinja é\r\n", "tools": "tools"}
    saved = SmolVLMProcessor.from_pretrained(directory)
    saved.save_pretrained(Path(directory) / "again")
    assert SmolVLMProcessor.from_pretrained(Path(directory) / "again").chat_template == saved.chat_template
    put(directory, "chat_template.json", {"chat_template": "legacy"})
    assert template() == "legacy"
    put(directory, "processor_config.json", {"chat_template": "own"})
    assert template() == "own"
    assert SmolVLMProcessor.from_pretrained(directory, chat_template="mine").chat_template == "mine"
    saved.chat_template = {"../evil": "x"}
    with pytest.raises(InputError, match="evil"):
        saved.save_pretrained(Path(directory) / "again")


def test_published_files(checkpoint):
    """v4 files of the published 256M and 500M: no video file, so the video processor comes from the picture's."""
    processor = SmolVLMProcessor.from_pretrained(checkpoint)
    videos = processor.video_processor
    assert (videos.num_frames, videos.fps, videos.size) == (64, 1, {"longest_edge": 2048})
    assert processor.image_processor.resample == 1 and processor.image_processor.image_mean == (0.5, 0.5, 0.5)
    assert "<video>" in processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}, "Q?"]}])
    assert processor.model_input_names == ["input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"]


def test_save_is_what_transformers_reads(checkpoint, tmp_path):
    """What we save, transformers reads as the same processor, and we read what it saves."""
    transformers = pytest.importorskip("transformers", reason="the reference: pip install 'smolvlm-jax[test]'")
    processor = SmolVLMProcessor.from_pretrained(checkpoint)
    processor.save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "processor_config.json").read_text())
    assert set(nested) == {"image_processor", "video_processor", "image_seq_len", "processor_class"}
    theirs = transformers.SmolVLMImageProcessorPil.from_pretrained(tmp_path)
    image = Image.fromarray(tri_img(48, 64))
    small = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}
    ours = processor.image_processor(image, **small)["pixel_values"]
    assert np.array_equal(theirs(image, return_tensors="np", **small)["pixel_values"], ours)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>User: 2024 <image>naïve<end_of_utterance>"
    assert tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (49279, 2)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    again = SmolVLMProcessor.from_pretrained(tmp_path / "theirs", image_seq_len=64)
    for name in SmolVLMImageProcessor.DEFAULTS:
        assert getattr(again.image_processor, name) == getattr(processor.image_processor, name), name
    assert again.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    assert again.chat_template == processor.chat_template


def test_vocab_and_merges(checkpoint, tmp_path):
    """A GPT-2 style directory without tokenizer.json."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    put(tmp_path, "vocab.json", tokenizer["model"]["vocab"])
    merges = "\n".join(" ".join(pair) for pair in tokenizer["model"]["merges"])
    put(tmp_path, "merges.txt", f"#version: 0.2\n{merges}\n")
    keys = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = {token["id"]: {key: token[key] for key in keys} for token in tokenizer["added_tokens"]}
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    put(tmp_path, "tokenizer_config.json", {**config, "added_tokens_decoder": added})
    ours, real = SmolVLMTokenizer.from_pretrained(tmp_path), SmolVLMTokenizer.from_pretrained(checkpoint)
    for text in ("hello world", "<image>\n\n<row_6_col_6> don't", "naïve 你好<end_of_utterance>"):
        assert ours(text)["input_ids"] == real(text)["input_ids"]
    assert len(ours) == 49280 and ours.eos_token_id == 49279


def test_broken_files(directory, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        SmolVLMProcessor.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere"):
        SmolVLMImageProcessor.from_pretrained(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        SmolVLMProcessor.from_pretrained(empty)
    assert SmolVLMImageProcessor.from_pretrained(empty) == SmolVLMImageProcessor()
    for name in (
        "preprocessor_config.json",
        "processor_config.json",
        "chat_template.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        copy = tmp_path / f"broken-{name}"
        shutil.copytree(directory, copy)
        for content in ("{", "[1]", '{"a": '):
            put(copy, name, content)
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                SmolVLMProcessor.from_pretrained(copy)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        SmolVLMProcessor.from_pretrained(directory).save_pretrained(tmp_path / "file")


def test_overrides(directory):
    processor = SmolVLMProcessor.from_pretrained(
        directory,
        size={"longest_edge": 128},
        do_image_splitting=False,
        num_frames=7,
        image_seq_len=5,
        revision="main",
        use_fast=True,
    )
    assert processor.image_processor.size == processor.video_processor.size == {"longest_edge": 128}
    assert not processor.image_processor.do_image_splitting and processor.video_processor.num_frames == 7
    assert processor.image_seq_len == 5
    with pytest.raises(InputError, match="do_image_spliting"):
        SmolVLMProcessor.from_pretrained(directory, do_image_spliting=False)
    with pytest.raises(InputError, match="nonsense"):
        SmolVLMImageProcessor.from_pretrained(directory, nonsense=1)


def test_junk_is_kept(directory):
    put(
        directory,
        "preprocessor_config.json",
        {"size": {"longest_edge": 64}, "perceiver": {"a": [1]}, "feature_extractor_type": "x"},
    )
    images = SmolVLMImageProcessor.from_pretrained(directory)
    assert images.perceiver == {"a": [1]} and images.to_dict()["perceiver"] == {"a": [1]}


def test_defaults_are_the_references():
    images, videos = SmolVLMImageProcessor(), SmolVLMVideoProcessor()
    for part in (images, videos):
        assert part.size == {"longest_edge": 1456} and part.max_image_size == {"longest_edge": 364} and part.resample == 1
        assert part.do_resize and part.do_rescale and part.do_normalize and part.do_pad and part.do_convert_rgb
        assert part.rescale_factor == 1 / 255 and part.image_mean == part.image_std == (0.5, 0.5, 0.5)
    assert images.do_image_splitting and not videos.do_sample_frames
    images.size["longest_edge"] = 5  # nothing is shared between two of them
    assert SmolVLMImageProcessor().size == {"longest_edge": 1456}
    with pytest.raises(InputError, match="tokenizer"):
        SmolVLMProcessor(images)


def test_a_processor_travels_to_a_worker(directory):
    processor = pickle.loads(pickle.dumps(SmolVLMProcessor.from_pretrained(directory)))
    assert processor(text="<image>", images=Image.fromarray(tri_img(9, 9)), return_tensors="np")["input_ids"].shape[0] == 1
    assert processor.tokenizer.encode("<image>", split_special_tokens=True) != [processor.image_token_id]
    assert processor.apply_chat_template([{"role": "user", "content": "x"}]).startswith(DEFAULT_CHAT_TEMPLATE[:12])
