"""Adapters over weights in 8 bits (QLoRA): which base is kept how, trained over what it stands for, and exported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smolvlm_jax import load, make_mesh, save
from smolvlm_jax.errors import ConfigError
from smolvlm_jax.parameters import flatten_params, quantize_params
from smolvlm_jax.quantization import SCALE, dequantized, is_quantized
from smolvlm_jax.train.config import LoraConfig, TrainConfig
from smolvlm_jax.train.export import export
from smolvlm_jax.train.lora import product
from smolvlm_jax.train.partition import Partition
from smolvlm_jax.train.runner import divide
from smolvlm_jax.train.state import create_state
from smolvlm_jax.train.step import make_step

LORA = LoraConfig(rank=4, alpha=8.0, targets=".*")


def shapes(tree):
    return {path: (x.shape, x.dtype) for path, x in flatten_params(tree).items()}


def divided(tiny, params, **settings):
    config = TrainConfig(steps=4, learning_rate=1e-2, warmup_steps=0, **settings)
    partition = Partition.of(tiny.model, config, quantized=is_quantized(params))
    mesh = make_mesh(devices=jax.devices()[:1])
    return partition, mesh, *divide(params, tiny.model, partition, mesh)


@pytest.mark.thorough
def test_the_base_is_kept_as_it_is_stored_or_as_the_recipe_says(tiny_a):
    ours = quantize_params(tiny_a.model, tiny_a.params)
    for params, settings, in_8_bits in (
        (ours, {"lora": LORA}, True),
        (tiny_a.params, {"lora": LORA, "frozen_dtype": "int8"}, True),
        (ours, {"lora": LORA, "frozen_dtype": "bfloat16"}, False),
        (tiny_a.params, {"lora": LORA}, False),
        (ours, {"lora": LORA, "learning_rates": (("text", 1e-4),)}, True),
        (ours, {}, False),
    ):
        partition, _, state, base = divided(tiny_a, params, **settings)
        assert partition.in_8_bits == is_quantized(base) == in_8_bits, settings
        assert shapes(base) == shapes(partition.base) and shapes(state) == shapes(partition.params), settings
        assert not any(path.endswith(SCALE) for path in flatten_params(state)), "what is trained is in floats"
    full = dequantized(ours)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(divided(tiny_a, ours)[2]), jax.tree.leaves(full), strict=True))
    with pytest.raises(ConfigError, match="frozen_dtype int8"):
        TrainConfig(steps=1, frozen_dtype="int8")


@pytest.mark.slow
def test_steps_over_8_bits_are_steps_over_what_they_stand_for(tiny_a, tmp_path):
    """Loss and adapters after two steps; merged into the base they are the exported model."""
    ours = quantize_params(tiny_a.model, tiny_a.params)
    ids = jnp.asarray(tiny_a.ids)
    batch = {"input_ids": ids, "labels": jnp.where(ids == 150, -100, ids), "attention_mask": jnp.ones_like(ids)}
    batch["pixel_values"] = jnp.asarray(tiny_a.pixels)
    found = []
    for params in (ours, dequantized(ours)):
        partition, mesh, trained, base = divided(tiny_a, params, lora=LORA)
        state, step = create_state(trained, partition), make_step(tiny_a.model, partition, mesh)
        for _ in range(2):
            state, metrics = step(state, batch, base)
        found.append((float(metrics["loss"]), float(metrics["gradient_norm"]), flatten_params(state.params)))
    (loss, norm, adapters), (loss_plain, norm_plain, plain) = found
    assert loss == pytest.approx(loss_plain, rel=1e-4) and norm == pytest.approx(norm_plain, rel=1e-3)
    far = [np.abs(adapters[path] - plain[path]).max() for path in plain]
    assert np.median(far) < 1e-4 and any((x != 0).any() for path, x in adapters.items() if path.endswith("lora_b"))
    save(tmp_path / "base", tiny_a.model, ours)
    export(tmp_path / "base", state.params, tmp_path / "model", scale=LORA.scale)
    exported, whole = flatten_params(load(tmp_path / "model")[1]), flatten_params(dequantized(ours))
    for path, kernel in whole.items():
        holder = path.removesuffix("kernel")
        if f"{holder}lora_a" in plain:
            kernel = kernel + product(plain[f"{holder}lora_a"], plain[f"{holder}lora_b"], LORA.scale, kernel.shape)
        np.testing.assert_allclose(exported[path], kernel, atol=1e-5, err_msg=path)
