"""`save` and `save_hf`: the small files beside the weights."""

import inspect
import warnings

import pytest

from smolvlm_jax import LoadedModel, SmolVLMProcessor, checkpoint, load, resolve, save, save_hf
from smolvlm_jax.errors import SmolVLMError
from smolvlm_jax.io import companion_files


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


def test_save_pretrained_takes_what_save_hf_takes(tmp_path, monkeypatch):
    """The same keywords and defaults, the same files; companions are looked for once."""
    model, params = load("tiny")
    looked = []
    monkeypatch.setattr(checkpoint, "companion_files", lambda *given: looked.append(given) or companion_files(*given))
    saved = {"save_hf": lambda path, **given: save_hf(path, model, params, **given)}
    saved["save_pretrained"] = LoadedModel(model, params).save_pretrained
    options = {"max_shard_size": 100_000, "companions": "tiny", "force": True}
    assert options.keys() == {n for n, one in inspect.signature(save_hf).parameters.items() if one.kind is one.KEYWORD_ONLY}
    for given in (options, {"companions": "tiny"}):
        found = []
        for name, save_as in saved.items():
            looked.clear()
            save_as(tmp_path / name, **given | {"force": True})
            files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
            found.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
            assert len(looked) == 1
        assert found[0] == found[1]
    with pytest.raises(SmolVLMError, match="did you mean 'max_shard_size'"):
        saved["save_pretrained"](tmp_path / "f", max_shard=3)
