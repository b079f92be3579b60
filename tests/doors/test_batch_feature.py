"""What processors return, as jax sees it."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from smolvlm_jax import BatchFeature, SmolVLMProcessor
from smolvlm_jax.errors import InputError

PICTURE = Image.new("RGB", (60, 40), (9, 90, 200))


@pytest.fixture(scope="module")
def processor():
    return SmolVLMProcessor.from_pretrained("tiny")


@pytest.fixture(scope="module")
def batch(processor):
    return processor(images=[PICTURE], text="<image>What?", return_tensors="np")


def test_a_batch_is_a_tree_of_its_class(batch):
    placed = jax.device_put(batch)
    assert type(placed) is BatchFeature and all(isinstance(array, jax.Array) for array in placed.values())
    shapes = jax.tree.map(np.shape, batch)
    assert type(shapes) is BatchFeature and shapes.keys() == batch.keys()
    total = jax.jit(lambda params, batch: params + batch["pixel_values"].sum() + batch.input_ids.sum())
    assert np.isclose(total(1.0, batch), 1 + batch["pixel_values"].sum() + batch["input_ids"].sum())
    assert type(jax.jit(lambda batch: batch)(batch)) is BatchFeature
    assert type(batch.copy()) is BatchFeature and type(batch.data) is dict
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(batch)[0]}
    assert names == {f"['{name}']" for name in batch}


def test_descriptions_of_a_batch_are_no_leaves(processor):
    frames = [np.full((8, 8, 3), value, np.uint8) for value in (1, 2)]
    batch = processor(videos=[frames], text="<video>", return_metadata=True, return_tensors="np")
    again = jax.device_put(batch)
    assert again["video_metadata"] == batch["video_metadata"] and isinstance(again["pixel_values"], jax.Array)
    assert jax.jit(lambda batch: batch["pixel_values"].ndim)(batch) == 5
    hashes = processor.image_processor([PICTURE], return_image_hashes=True, return_row_col_info=True)
    assert jax.device_put(hashes)["image_hashes"] == hashes["image_hashes"]


@pytest.mark.thorough
@pytest.mark.parametrize("first", ["smolvlm_jax.processing", "jax"])
def test_a_batch_is_a_tree_whatever_is_imported_first(first):
    second = "jax" if first != "jax" else "smolvlm_jax.processing"
    code = f"""import importlib.util, sys, numpy, {first}
importlib.util.find_spec("jax")
from smolvlm_jax.processing import BatchFeature
assert ("jax" in sys.modules) == ({first!r} == "jax")
batch = BatchFeature(a=numpy.ones(2))
import {second}, jax
assert jax.tree.leaves(batch)[0] is batch["a"]
assert not any("AfterImport" in type(finder).__name__ for finder in sys.meta_path)"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def calls(processor, **options):
    """Every function that has return_tensors."""
    frames, messages = [np.zeros((8, 8, 3), np.uint8)], [{"role": "user", "content": "hello"}]
    encoded = processor.tokenizer("hello")
    return [
        lambda: processor(text="hello", **options),
        lambda: processor(images=[PICTURE], text="<image>", **options),
        lambda: processor(videos=[frames], text="<video>", **options),
        lambda: processor.image_processor(PICTURE, **options),
        lambda: processor.image_processor(PICTURE, pixel_format="uint8", return_row_col_info=True, **options),
        lambda: processor.video_processor([frames], **options),
        lambda: processor.tokenizer("hello", **options),
        lambda: processor.tokenizer(["hello", "you there"], padding=True, return_length=True, **options),
        lambda: processor.tokenizer.pad(encoded, **options),
        lambda: processor.tokenizer.pad([encoded, encoded], **options),
        lambda: processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options),
    ]


@pytest.mark.parametrize(("kind", "array"), [("np", np.ndarray), ("jax", jax.Array)])
def test_return_tensors_is_the_same_everywhere(processor, kind, array):
    for call in calls(processor, return_tensors=kind):
        for name, value in call().items():
            assert isinstance(value, (array, np.generic) if kind == "np" else array) or name in ("rows", "cols"), name
            assert value is not None and (kind == "np" or name in ("rows", "cols") or value.dtype != np.int64)
    assert isinstance(processor.tokenizer.encode("hello", return_tensors=kind), array)


@pytest.mark.parametrize("kind", ["pt", "tf", "mlx", "numpy", "", 7])
def test_other_tensors_are_refused_everywhere_alike(processor, kind):
    messages = set()
    for call in calls(processor, return_tensors=kind):
        with pytest.raises(InputError, match="it is 'np', 'jax' or None") as raised:
            call()
        messages.add(str(raised.value))
    assert len(messages) == 1


def test_a_batch_goes_to_a_device_and_another_dtype(batch):
    device = jax.devices()[1]
    for moved in (batch.to(device), batch.to(device, dtype="bfloat16"), batch.to("cpu:1", jax.numpy.bfloat16)):
        assert all(array.devices() == {device} for array in moved.values())
    assert str(moved["pixel_values"].dtype) == "bfloat16" and moved["input_ids"].dtype == np.int32
    half = batch.to(np.float16)["pixel_values"]
    assert half.dtype == np.float16 and isinstance(half, np.ndarray)
    for wrong in ("tpu9", "cuda", "cpu:99"):
        with pytest.raises(InputError, match="there is no device"):
            batch.to(wrong)
