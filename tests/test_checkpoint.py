"""`save` and `save_hf`: the small files beside the weights."""

import warnings

import pytest

from smolvlm_jax import LoadedModel, SmolVLMProcessor, load, resolve, save, save_hf
from smolvlm_jax.errors import SmolVLMError


def test_a_checkpoint_is_saved_with_what_makes_prompts(tmp_path):
    """Companions by name or of a processor; without them one warning says what is missing and what to pass."""
    model, params = load("tiny")
    for kind in (save, save_hf):
        with pytest.warns(UserWarning, match=r"no tokenizer \(tokenizer.json\) and no processor .* companions=SOURCE") as told:
            kind(tmp_path / kind.__name__, model, params)
        assert len(told) == 1 and told[0].filename == __file__
    for name, companions in {"a": "tiny", "b": resolve("tiny"), "c": SmolVLMProcessor.from_pretrained("tiny")}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_hf(tmp_path / name, model, params, companions=companions)
        assert SmolVLMProcessor.from_pretrained(tmp_path / name).tokenizer.vocab_size
    for wrong in ("tinny", 3, LoadedModel(model, params)):
        with pytest.raises(SmolVLMError, match=r"no model 'tinny'|companions is"):
            save_hf(tmp_path / "d", model, params, companions=wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoadedModel(model, params).save_pretrained(tmp_path / "e")
    assert not (tmp_path / "d").exists()
