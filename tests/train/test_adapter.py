"""The adapters of a run in PEFT's layout: PEFT loads them, and computes what the run computed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lora import EVERYTHING, drawn, logits

from smolvlm_jax import load
from smolvlm_jax.errors import InputError
from smolvlm_jax.parameters import flatten_params, unflatten_params
from smolvlm_jax.train.adapter import adapter_tensors, export_adapter
from smolvlm_jax.train.export import export
from smolvlm_jax.train.partition import combine, join


def trained_whole(tiny, *holders: str, seed: int = 7) -> dict:
    """Some of the model's parameters, changed."""
    chosen = {path: leaf for path, leaf in flatten_params(tiny.params).items() if path.startswith(holders)}
    keys = jax.random.split(jax.random.key(seed), len(chosen))
    noise = {
        path: leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, (path, leaf) in zip(keys, chosen.items(), strict=True)
    }
    return unflatten_params(noise)


def by_peft(tiny, directory) -> np.ndarray:
    peft = pytest.importorskip("peft", reason="PEFT loads the adapters: pip install 'smolvlm-jax[test]'")
    import torch
    import transformers

    base = transformers.AutoModelForImageTextToText.from_pretrained(tiny.directory, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, directory).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(tiny.ids), pixel_values=torch.tensor(tiny.pixels)).logits.numpy()


@pytest.mark.thorough
def test_peft_loads_the_adapters_of_a_run(tiny_a, tmp_path):
    """On every projection of the model."""
    adapters = drawn(tiny_a.model)
    export_adapter(tiny_a.directory, adapters, tmp_path / "adapter", EVERYTHING)
    wanted = np.asarray(logits(tiny_a, combine(tiny_a.params, adapters, EVERYTHING.scale)))
    found = by_peft(tiny_a, tmp_path / "adapter")
    assert np.abs(found - wanted).max() <= 2e-5 * max(1.0, float(np.abs(wanted).max()))
    assert np.abs(found - np.asarray(logits(tiny_a, tiny_a.params))).max() > 0.1
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_a.directory.absolute())


def test_an_exported_adapter_merges_to_the_exported_model(tiny_a, tmp_path):
    adapters = drawn(tiny_a.model)
    export_adapter(tiny_a.directory, adapters, tmp_path / "adapter", EVERYTHING)
    export(tiny_a.directory, adapters, tmp_path / "model", scale=EVERYTHING.scale)
    ours, merged = (flatten_params(load(tmp_path / name)[1]) for name in ("adapter", "model"))
    assert ours.keys() == merged.keys()
    for path, leaf in merged.items():
        assert np.abs(ours[path] - leaf).max() <= 1e-6, path


@pytest.mark.thorough
def test_modules_that_were_trained_whole_are_in_the_adapter(tiny, tmp_path):
    """Of every kind: projections, norms, the patch and position embeddings, the table of words."""
    targets = EVERYTHING.__class__(rank=4, alpha=8.0, targets=r"text_model/.*_proj")
    whole = trained_whole(tiny, "model/connector", "model/vision_model", "model/text_model/norm", "model/text_model/embed")
    trained = join(drawn(tiny.model, targets), whole)
    export_adapter(tiny.directory, trained, tmp_path / "adapter", targets)
    wanted = np.asarray(logits(tiny, combine(tiny.params, trained, targets.scale)))
    assert np.abs(by_peft(tiny, tmp_path / "adapter") - wanted).max() <= 2e-5 * max(1.0, float(np.abs(wanted).max()))
    params = load(tmp_path / "adapter")[1]
    assert np.abs(np.asarray(logits(tiny, params)) - wanted).max() <= 2e-5 * max(1.0, float(np.abs(wanted).max()))


def test_an_adapter_on_what_was_trained_whole_is_merged_and_has_no_form_in_peft(tiny_a, tmp_path):
    trained = join(drawn(tiny_a.model), trained_whole(tiny_a, "model/connector"))
    with pytest.raises(InputError, match=r"model\.connector\.modality_projection\.proj has an adapter and was trained whole"):
        adapter_tensors(trained)
    export(tiny_a.directory, trained, tmp_path / "model", scale=EVERYTHING.scale)
    found = logits(tiny_a, load(tmp_path / "model")[1])
    wanted = logits(tiny_a, combine(tiny_a.params, trained, EVERYTHING.scale))
    assert jnp.abs(found - wanted).max() <= 2e-5 * max(1.0, float(jnp.abs(wanted).max()))


@pytest.mark.thorough
def test_a_run_leaves_its_adapters_and_another_starts_from_them(tmp_path, capsys):
    import train_helpers as helpers

    from smolvlm_jax.train.recipes import load_recipe
    from smolvlm_jax.train.runner import run

    helpers.write_records(tmp_path, 12)
    base = helpers.small_checkpoint(tmp_path)
    recipe = helpers.recipe(tmp_path, base, steps=3, lora={"rank": 2, "alpha": 4.0})
    first = run(load_recipe(str(recipe), []), progress=False)
    ours, merged = (flatten_params(load(first.directory / name)[1]) for name in ("adapter", "model"))
    of_run = flatten_params(load(first.directory)[1])  # a run that has ended stands for its model
    assert all(np.array_equal(of_run[path], merged[path]) for path in merged)
    start = flatten_params(load(base)[1])
    assert max(float(jnp.abs(merged[path] - leaf).max()) for path, leaf in start.items()) > 1e-5
    for path, leaf in merged.items():
        assert np.abs(ours[path] - leaf).max() <= 1e-6, path
    words = [f"adapter={first.directory / 'adapter'}", f"output={tmp_path / 'second'}", "learning_rate=1e-12"]
    second = run(load_recipe(str(recipe), words), progress=False)
    again = flatten_params(load(second.model)[1])
    for path, leaf in merged.items():
        assert np.abs(again[path] - leaf).max() <= 1e-5, path
    assert not (second.directory / "adapter").exists()
    assert "the adapters are in the exported model alone" in capsys.readouterr().err
