"""What code for transformers looks up on classes and on what they return: the same, or an error that says what to type."""

import inspect
import json
import pickle

import pytest

import smolvlm_jax
from smolvlm_jax import (
    GenerationConfig,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMTokenizer,
    SmolVLMVideoProcessor,
    resolve,
)
from smolvlm_jax.errors import HabitError, InputError, SmolVLMError

NAMES = ("SmolVLMConfig", "SmolVLMVisionConfig", "GenerationConfig", "SmolVLMProcessor", "SmolVLMImageProcessor")
NAMES += ("SmolVLMVideoProcessor", "SmolVLMTokenizer")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the reference is not installed")


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (SmolVLMConfig, "get_config_dict"),
        (SmolVLMImageProcessor, "get_image_processor_dict"),
        (SmolVLMVideoProcessor, "get_video_processor_dict"),
    ],
)
def test_files_are_read_before_anything_is_made(kind, method, transformers):
    found, left = getattr(kind, method)("tiny", revision="main")
    assert left == {} and kind.from_dict(found).to_dict() == kind.from_pretrained("tiny").to_dict()
    if kind is not SmolVLMVideoProcessor:  # whose reference needs torchvision
        theirs, _ = getattr(getattr(transformers, kind.__name__), method)(str(resolve("tiny")))
        assert found == {name: value for name, value in theirs.items() if not name.startswith("_")}
    with pytest.raises(InputError, match="no argument 'colour'"):
        getattr(kind, method)("tiny", colour=1)


def test_a_generation_config_of_a_model_config(transformers):
    ours = GenerationConfig.from_model_config(SmolVLMConfig.from_pretrained("tiny"))
    theirs = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(str(resolve("tiny"))))
    stops = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert (list(ours.stop_tokens), ours.pad_token_id) == (stops, theirs.pad_token_id)
    nested = {"text_config": {"eos_token_id": [2, 3], "pad_token_id": 1}, "pad_token_id": 5}
    assert GenerationConfig.from_model_config(nested).stop_tokens == (2, 3)
    assert GenerationConfig.from_model_config(nested).pad_token_id == 5
    with pytest.raises(InputError, match="needs a SmolVLMConfig"):
        GenerationConfig.from_model_config(3)


def test_sizes_have_attributes(transformers):
    theirs = transformers.image_utils.SizeDict(longest_edge=96)
    for processor in (SmolVLMImageProcessor.from_pretrained("tiny"), SmolVLMVideoProcessor(size={"longest_edge": 96})):
        size = processor.size
        for name in vars(theirs):
            assert getattr(size, name) == size[name] == getattr(theirs, name)
        assert size == {"longest_edge": 96} == pickle.loads(pickle.dumps(size)) and json.dumps(size)
        with pytest.raises(HabitError, match="did you mean 'longest_edge'"):
            _ = size.longst_edge
        with pytest.raises(KeyError):
            size["longst_edge"]
        processor.size = {"height": 3, "width": 4}
        assert processor.size.height == 3 and type(processor.to_dict()["size"]) is dict


def test_rows_of_a_batch_are_named():
    batch = SmolVLMTokenizer.from_pretrained("tiny")(["one", "two"])
    for key in (0, slice(1)):
        with pytest.raises(HabitError, match=r"batch\['input_ids'\].*tokenizer.encoding"):
            batch[key]
    with pytest.raises(KeyError):
        batch["pixel_values"]
    assert batch.get("pixel_values") is None


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_what_a_class_does_not_have_is_an_error_of_ours(name, transformers):
    kind = getattr(smolvlm_jax, name)
    made = kind.from_pretrained("tiny")
    theirs = getattr(transformers, "PreTrainedTokenizerFast" if kind is SmolVLMTokenizer else name)
    public = [entry for entry in dir(theirs) if not entry.startswith("_")]
    of_class = [entry for entry in public if isinstance(inspect.getattr_static(theirs, entry), (classmethod, staticmethod))]
    for holder, looked_up in ((kind, of_class), (made, public)):
        for entry in [*looked_up, "nonsense"]:
            try:
                getattr(holder, entry)
            except SmolVLMError as error:
                assert isinstance(error, AttributeError) and str(error).startswith(f"{name}"), error
    with pytest.raises(HabitError, match=f"{name} has no attribute 'nonsense'"):
        _ = kind.nonsense
    assert not hasattr(made, "nonsense") and not hasattr(kind, "_nonsense")


def test_processors_say_what_takes_the_place_of_steps():
    with pytest.raises(HabitError, match="do_resize"):
        SmolVLMImageProcessor().resize(None)
    with pytest.raises(HabitError, match="to_dict"):
        SmolVLMProcessor.get_processor_dict("tiny")
