"""Every `from_pretrained` takes what `load` takes, and passes keywords on or refuses them by name."""

import inspect
import shutil
from pathlib import Path

import pytest

import smolvlm_jax
from smolvlm_jax import (
    AutoModelForImageTextToText,
    GenerationConfig,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMTokenizer,
    SmolVLMVideoProcessor,
    SmolVLMVisionConfig,
    load,
    resolve,
)
from smolvlm_jax.errors import CheckpointError, ConfigError, InputError, SmolVLMError
from smolvlm_jax.locate import LOADING

SMALL = [
    SmolVLMProcessor,
    SmolVLMImageProcessor,
    SmolVLMVideoProcessor,
    SmolVLMTokenizer,
    SmolVLMConfig,
    SmolVLMVisionConfig,
    GenerationConfig,
]
DOORS = [*SMALL, AutoModelForImageTextToText]


def shown(made):
    """What was read, for comparisons."""
    if isinstance(made, SmolVLMTokenizer):
        return made.config, made.get_vocab()
    return made.model if hasattr(made, "params") else getattr(made, "to_dict", lambda: made)()


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """A directory with the checkpoint in a sub-directory."""
    folder = tmp_path_factory.mktemp("nested")
    shutil.copytree(resolve("tiny"), folder / "inside")
    return folder


@pytest.mark.parametrize("door", DOORS)
def test_names_directories_subfolders_and_the_hub(door, nested, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="needs the hub: pip install 'smolvlm-jax[hub]'")
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(nested)

    monkeypatch.setattr(hub, "snapshot_download", download)
    want = shown(door.from_pretrained("tiny"))
    assert shown(door.from_pretrained(Path(resolve("tiny")))) == want
    assert shown(door.from_pretrained(str(nested), subfolder="inside")) == want
    place = {"revision": "v2", "subfolder": "inside", "token": "secret", "cache_dir": "/c", "local_files_only": True}
    assert shown(door.from_pretrained("owner/name", **place, trust_remote_code=True)) == want
    name, options = asked[0]
    patterns = options.pop("allow_patterns")
    assert name == "owner/name" and options == {name: place[name] for name in place if name != "subfolder"}
    assert all(pattern.startswith("inside/") for pattern in patterns)
    assert any("safetensors" in pattern for pattern in patterns) == (door is AutoModelForImageTextToText)


@pytest.mark.parametrize("door", DOORS)
def test_what_is_missing_is_an_os_error_of_ours(door, tmp_path):
    for name, options in (("nowhere", {}), (tmp_path / "absent", {}), ("tiny", {"subfolder": "absent"})):
        with pytest.raises(OSError, match=r"absent|nowhere") as raised:
            door.from_pretrained(name, **options)
        assert isinstance(raised.value, (CheckpointError, ConfigError)) and raised.value.exit_code == 2
    with pytest.raises(SmolVLMError, match="subfolder"):
        door.from_pretrained("tiny", subfolder="../..")


@pytest.mark.parametrize("door", [SmolVLMProcessor, SmolVLMTokenizer, SmolVLMConfig, AutoModelForImageTextToText])
def test_an_empty_directory_is_an_os_error(door, tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)):
        door.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        load("nowhere")


@pytest.mark.parametrize("door", DOORS)
def test_keywords_that_nobody_reads_are_refused_by_name(door):
    for wrong in ("pading_side", "num_framse", "colour"):
        with pytest.raises(InputError, match=f"no argument '{wrong}'"):
            door.from_pretrained("tiny", **{wrong: "left"})
    with pytest.raises(InputError, match="did you mean 'revision'"):
        door.from_pretrained("tiny", revison="main")
    with pytest.raises(InputError, match="proxies"):
        door.from_pretrained("tiny", proxies={"https": "there"})
    for name, neutral in LOADING.items():
        for value in (None, *neutral.values):
            door.from_pretrained("tiny", **{name: value}) if door is not AutoModelForImageTextToText else None


def test_keywords_go_to_the_parts_that_know_them():
    image, tokenizer = SmolVLMImageProcessor(size={"longest_edge": 96}), SmolVLMTokenizer.from_pretrained("tiny")
    made = SmolVLMProcessor.from_pretrained("tiny", padding_side="left", image_processor=image, num_frames=5, image_seq_len=3)
    assert made.tokenizer.padding_side == "left" and made.image_processor is image
    assert made.video_processor.num_frames == 5 and made.image_seq_len == 3
    both = SmolVLMProcessor.from_pretrained("tiny", tokenizer=tokenizer, do_normalize=False, model_max_length=7)
    assert both.tokenizer is tokenizer
    assert not both.image_processor.do_normalize and not both.video_processor.do_normalize
    assert SmolVLMTokenizer.from_pretrained("tiny", model_max_length=7).model_max_length == 7
    assert SmolVLMConfig.from_pretrained("tiny", use_cache=False).use_cache is False
    assert GenerationConfig.from_pretrained("tiny", max_new_tokens=3, num_beams=1).max_new_tokens == 3
    whole = SmolVLMConfig.from_pretrained("tiny")
    assert SmolVLMVisionConfig.from_pretrained("tiny") == whole.vision_config
    weights = SmolVLMProcessor.from_pretrained(Path(resolve("tiny")) / "model.safetensors")
    assert weights.to_dict() == SmolVLMProcessor.from_pretrained("tiny").to_dict()


def test_every_from_pretrained_is_in_this_list():
    offered = {getattr(smolvlm_jax, name) for name in smolvlm_jax.__all__}
    found = {kind for kind in offered if inspect.isclass(kind) and hasattr(kind, "from_pretrained")}
    flax = {kind for kind in found if hasattr(kind, "apply")}
    assert found - flax == {*DOORS, smolvlm_jax.SmolVLMTextConfig}
