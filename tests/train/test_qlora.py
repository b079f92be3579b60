"""Adapters over weights in 8 bits (QLoRA): which base is kept how."""

import jax
import pytest

from smolvlm_jax import make_mesh
from smolvlm_jax.errors import ConfigError
from smolvlm_jax.parameters import flatten_params, quantize_params
from smolvlm_jax.quantization import SCALE, dequantized, is_quantized
from smolvlm_jax.train.config import LoraConfig, TrainConfig
from smolvlm_jax.train.partition import Partition
from smolvlm_jax.train.runner import divide

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
