"""Adapters: at first the base, merged the same as beside, and home again in Hugging Face format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smolvlm_jax import load, published_config
from smolvlm_jax.errors import CheckpointError, ConfigError
from smolvlm_jax.model import SmolVLMForConditionalGeneration
from smolvlm_jax.parameters import abstract_params, flatten_params, summed_dimensions, unflatten_params
from smolvlm_jax.train.config import LoraConfig, TrainConfig
from smolvlm_jax.train.export import export
from smolvlm_jax.train.forward import token_losses
from smolvlm_jax.train.lora import adapter_axes, adapter_shapes, init_adapters, matched, product
from smolvlm_jax.train.partition import Partition, combine, join, part_of
from smolvlm_jax.train.plain import from_dict

EVERYTHING = LoraConfig(rank=4, alpha=8.0, targets=".*")


def drawn(model, config=EVERYTHING, seed=3):
    """Adapters after some training: neither factor zero."""
    flat = flatten_params(adapter_shapes(model, config))
    keys = jax.random.split(jax.random.key(seed), len(flat))
    return unflatten_params(
        {path: 0.1 * jax.random.normal(key, leaf.shape) for key, (path, leaf) in zip(keys, flat.items(), strict=True)}
    )


def merge(params: dict) -> dict:
    """What export has to equal: a tree as `combine` returns it, every adapter added into its kernel in float32 and removed."""
    flat = flatten_params(params)
    out = {}
    for path, leaf in flat.items():
        if path.rsplit("/", 1)[-1].startswith("lora_"):
            continue
        a = flat.get(path.removesuffix("kernel") + "lora_a") if path.endswith("/kernel") else None
        if a is not None:
            b = flat[path.removesuffix("kernel") + "lora_b"]
            delta = product(a.astype(jnp.float32), b.astype(jnp.float32), 1.0, leaf.shape)
            leaf = (leaf.astype(jnp.float32) + delta).astype(leaf.dtype)
        out[path] = leaf
    return unflatten_params(out)


def logits(tiny, params):
    return tiny.model.apply({"params": params}, input_ids=tiny.ids, pixel_values=tiny.pixels).logits


def test_at_first_the_model_is_the_base(tiny):
    adapters = init_adapters(tiny.model, EVERYTHING)
    assert np.array_equal(logits(tiny, combine(tiny.params, adapters, EVERYTHING.scale)), logits(tiny, tiny.params))
    assert all(bool(leaf.any()) == path.endswith("lora_a") for path, leaf in flatten_params(adapters).items())


@pytest.mark.thorough
def test_merged_equals_beside(tiny):
    """Adapters on every projection, the head included."""
    tree = combine(tiny.params, drawn(tiny.model), EVERYTHING.scale)
    beside, base = logits(tiny, tree), logits(tiny, tiny.params)
    together = logits(tiny, merge(tree))
    assert np.abs(beside - base).max() > 0.1
    assert np.abs(together - beside).max() <= 2e-5 * max(1.0, float(np.abs(beside).max()))
    assert set(flatten_params(merge(tree))) == set(flatten_params(tiny.params))


@pytest.mark.thorough
def test_the_loss_sees_an_adapter_on_the_head(tiny):
    tree = combine(tiny.params, drawn(tiny.model), EVERYTHING.scale)
    batch = {"input_ids": tiny.ids, "labels": tiny.ids, "pixel_values": tiny.pixels}
    ours, count, _ = token_losses(tiny.model, tree, batch)
    want = tiny.model.apply({"params": tree}, **batch).loss
    assert float(ours / count) == pytest.approx(float(want), rel=1e-5)


def test_every_projection_can_have_one():
    """Every kernel of the model is a projection's, but the patch embedding's."""
    for name in ("SmolVLM-256M-Instruct", "granite-docling-258M"):
        model = SmolVLMForConditionalGeneration(published_config(name))
        kernels = {p for p in flatten_params(abstract_params(model)) if p.endswith("/kernel")}
        assert set(matched(model, EVERYTHING)) == {p for p in kernels if "patch_embedding" not in p}
        assert {p for p in kernels if "patch_embedding" not in p} == set(summed_dimensions(model))


def test_targets_choose_by_whole_paths(tiny_a):
    chosen = lambda targets: {p.removeprefix("model/") for p in matched(tiny_a.model, LoraConfig(targets=targets))}
    assert chosen(r"text_model/layers_0/self_attn/(q|v)_proj") == {
        "text_model/layers_0/self_attn/q_proj/kernel",
        "text_model/layers_0/self_attn/v_proj/kernel",
    }
    assert chosen("lm_head") == {"lm_head/kernel"}
    assert all(path.startswith("text_model") for path in chosen(LoraConfig().targets))
    with pytest.raises(ConfigError, match="matches no projection"):
        chosen("self_attn/q_proj")
    with pytest.raises(ConfigError, match="not a regular expression"):
        chosen("(")


def test_targets_may_be_names(tiny_a):
    """As peft has them: in every part of the model that has a projection of the name."""
    one = matched(tiny_a.model, LoraConfig(targets="q_proj"))
    assert one == matched(tiny_a.model, LoraConfig(targets=".*/q_proj")) and any("vision_model" in path for path in one)
    several = LoraConfig(targets=("q_proj", "text_model/.*/v_proj"))
    assert set(matched(tiny_a.model, several)) == {*one, *matched(tiny_a.model, LoraConfig(targets="text_model/.*/v_proj"))}
    assert from_dict({"steps": 1, "lora": {"targets": ["q_proj", "v_proj"]}}).lora.targets == ("q_proj", "v_proj")
    assert from_dict({"steps": 1, "lora": {"targets": "q_proj"}}).lora.targets == "q_proj"
    with pytest.raises(ConfigError, match=r"'q_porj' matches no projection; did you mean q_proj"):
        matched(tiny_a.model, LoraConfig(targets=("v_proj", "q_porj")))


def test_adapters_lie_as_their_kernels_do(tiny_a):
    axes = flatten_params(adapter_axes(tiny_a.model, EVERYTHING))
    shapes = flatten_params(adapter_shapes(tiny_a.model, EVERYTHING))
    assert {p: len(a) for p, a in axes.items()} == {p: len(s.shape) for p, s in shapes.items()}
    here = "model/text_model/layers_0/self_attn/"
    assert axes[f"{here}q_proj/lora_a"] == ("embed", None) and axes[f"{here}q_proj/lora_b"] == (None, "heads", None)
    assert axes[f"{here}o_proj/lora_a"] == ("heads", None, None) and axes[f"{here}o_proj/lora_b"] == (None, "embed")


def test_export_merges_into_a_hugging_face_directory(tiny_a, tmp_path):
    adapters = drawn(tiny_a.model)
    out = export(tiny_a.directory, adapters, tmp_path / "model", scale=EVERYTHING.scale)
    model, params = load(out)
    want = merge(combine(tiny_a.params, adapters, EVERYTHING.scale))
    for path, leaf in flatten_params(params).items():
        assert np.abs(leaf - flatten_params(want)[path]).max() <= 1e-6, path
    assert model.config.text_config == tiny_a.model.config.text_config
    transformers = pytest.importorskip("transformers", reason="the reference is transformers (test extra)")
    torch = pytest.importorskip("torch", reason="the reference runs on torch (test extra)")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        got = theirs(input_ids=torch.tensor(tiny_a.ids), pixel_values=torch.tensor(tiny_a.pixels)).logits.numpy()
    beside = logits(tiny_a, combine(tiny_a.params, adapters, EVERYTHING.scale))
    assert np.abs(got - beside).max() <= 2e-5 * max(1.0, float(np.abs(got).max()))


def test_export_refuses_what_the_base_does_not_have(tiny_a, tmp_path):
    stranger = {"model": {"text_model": {"layers_9": {"mlp": {"up_proj": {"kernel": jnp.ones((2, 2))}}}}}}
    with pytest.raises(CheckpointError, match="layers_9"):
        export(tiny_a.directory, stranger, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_parts_of_the_model(tiny_a):
    parts = {part_of(path) for path in flatten_params(tiny_a.params)}
    assert parts == {"vision", "connector", "text"} and part_of("model/vision_model/x/lora_a") == "lora"
    full = TrainConfig(steps=1, learning_rate=1e-4, learning_rates=(("vision", 0.0), ("text", 2e-5)))
    assert (full.peak("vision"), full.peak("connector"), full.peak("text")) == (0, 1e-4, 2e-5)
    lora = TrainConfig(steps=1, lora=LoraConfig(), learning_rates=(("connector", 5e-5),))
    assert (lora.peak("vision"), lora.peak("connector"), lora.peak("lora")) == (0, 5e-5, 1e-4)
    mine, rest = Partition.of(tiny_a.model, lora).split(tiny_a.params)
    assert {part_of(p) for p in flatten_params(mine)} == {"connector"}
    assert set(flatten_params(join(mine, rest))) == set(flatten_params(tiny_a.params))


def test_a_run_of_adapters_is_no_model(tiny_a, tmp_path):
    """Its checkpoints hold adapters alone; who reads them as a model is told where the model is."""
    from smolvlm_jax.train.checkpoints import Checkpoints
    from smolvlm_jax.train.state import create_state

    config = TrainConfig(steps=1, lora=EVERYTHING)
    tiny_a.model.config.save_pretrained(tmp_path)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, create_state(drawn(tiny_a.model), Partition.of(tiny_a.model, config)), [{}])
    with pytest.raises(CheckpointError, match="the merged model is in the run's folder model"):
        load(tmp_path)
