"""The encoder's layer by two kernels: the same function as the modules, on a mesh too, taken where it is meant to be.

Here the kernels run in the interpreter; the TPU compiler sees them in tests/engine/test_tpu_programs.py.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from smolvlm_jax import make_mesh
from smolvlm_jax.attention import trial
from smolvlm_jax.config import SmolVLMVisionConfig
from smolvlm_jax.encoder_kernels import layer as kernels
from smolvlm_jax.encoder_kernels.formula import layer_in_8_bits
from smolvlm_jax.encoder_kernels.shape import INT8_CHIPS, blocks_for
from smolvlm_jax.layers import Execution
from smolvlm_jax.plan import CHIPS
from smolvlm_jax.quantization import dequantized
from smolvlm_jax.sharding import activate
from smolvlm_jax.vision import SmolVLMEncoderLayer, SmolVLMVisionTransformer

# width, heads, width of the MLP, patches
SHAPES = {
    "heads of 64": (256, 4, 384, 256),
    "heads of 72, patches and columns that fill no tile": (1152, 16, 400, 289),
    "heads of 128, one of them, several blocks of queries": (128, 1, 1312, 576),
    "heads of 32, three of them in groups of one": (384, 12, 128, 260),
}


def make(width, heads, mlp, patches, tiles=2):
    """A config, random parameters in bfloat16 with no leaf of zeros, patches."""
    config = SmolVLMVisionConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=mlp, num_hidden_layers=1)
    layer = SmolVLMEncoderLayer(config, Execution(jnp.bfloat16), parent=None)
    rng = np.random.default_rng(width)
    x = jnp.asarray(rng.standard_normal((tiles, patches, width)), jnp.bfloat16)
    params = jax.eval_shape(partial(layer.init, mask=None), jax.random.key(0), x)["params"]
    random = lambda leaf: jnp.asarray(rng.standard_normal(leaf.value.shape) * 1.5 * width**-0.5, jnp.bfloat16)
    return layer, x, jax.tree.map(random, params, is_leaf=lambda node: hasattr(node, "value"))


def plain(layer, x, params, dtype=jnp.bfloat16):
    exact = layer.clone(execution=replace(layer.execution, dtype=dtype))
    return jax.jit(lambda x, params: exact.apply({"params": params}, x, mask=None, method="plain").output)(
        x.astype(dtype), params
    )


def distance(y, wanted, x) -> float:
    """Of what the layer adds to x, relative to its norm."""
    y, wanted, x = (np.asarray(a, np.float32) for a in (y, wanted, x))
    return float(np.linalg.norm(y - wanted) / np.linalg.norm(wanted - x))


@pytest.mark.thorough
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("name", SHAPES)
def test_no_further_from_float32_than_the_modules(name, chip):
    layer, x, params = make(*SHAPES[name])
    wanted = plain(layer, x, params, jnp.float32)
    ours = jax.jit(partial(kernels.on_each_device, layer.config, chip, interpret=True))(x, params)
    assert ours.dtype == jnp.bfloat16 and ours.shape == x.shape
    assert distance(ours, wanted, x) <= 1.05 * distance(plain(layer, x, params), wanted, x) < 0.02


def by_formula(layer, x, params):
    shape = kernels._shape(layer.config, x.shape[1])
    return jax.jit(partial(layer_in_8_bits, shape=shape, blocks=blocks_for(shape, "v5e")))(x, params)


@pytest.mark.thorough
@pytest.mark.parametrize("name", SHAPES)
def test_in_8_bits_as_the_formula(name):
    """Products of int8: what the formula computes but for the order of float sums, and near what the weights stand for."""
    layer, x, params = make(*SHAPES[name])
    params = kernels._in_8_bits(params)
    ours = jax.jit(partial(kernels.on_each_device, layer.config, "v5e", interpret=True))(x, params)
    assert ours.dtype == jnp.bfloat16 and ours.shape == x.shape
    assert distance(ours, by_formula(layer, x, params), x) <= 1e-3
    exact = plain(layer, x, dequantized(params), jnp.float32)
    assert 0.005 < distance(ours, exact, x) < 0.03, "further than bfloat16: these are other products"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("shape", "quantized"),
    [
        ((8, 1, 1), False),
        ((2, 2, 2), False),
        ((1, 2, 4), False),
        ((1, 1, 8), False),
        ((2, 2, 2), True),
        ((1, 1, 8), True),
    ],
)
def test_on_a_mesh(shape, quantized):
    """Tiles, heads and columns that divide and ones that do not: what one device computes."""
    if len(jax.devices()) < 8:
        pytest.skip("eight devices are needed")
    layer, x, params = make(256, 4, 384, 256, tiles=8 if shape[0] == 8 else 4)
    run = jax.jit(partial(kernels.on_each_device, layer.config, "v5e", interpret=True))
    wanted = plain(layer, x, params, jnp.float32)
    if quantized:
        params = kernels._in_8_bits(params)
        wanted = plain(layer, x, dequantized(params), jnp.float32)
    alone = run(x, params)
    with activate(make_mesh(*shape)):
        together = run(x, params)
    assert distance(together, wanted, x) <= 1.3 * distance(alone, wanted, x)


def lowered(
    platform,
    *,
    dtype=jnp.bfloat16,
    backwards=False,
    mask=False,
    weights=False,
    patches=256,
    adapters=False,
    quantized=False,
    **execution,
):
    """The program of an encoder of one layer, as text."""
    side = int(patches**0.5)
    config = SmolVLMVisionConfig(
        hidden_size=128, num_attention_heads=2, intermediate_size=256, num_hidden_layers=1, image_size=4 * side, patch_size=4
    )
    model = SmolVLMVisionTransformer(config, Execution(dtype, **execution))
    pixels = jnp.zeros((2, 4 * side, 4 * side, 3), dtype)
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), pixels)["params"])
    if quantized:
        layer = params["encoder"]["layers_0"]
        params["encoder"]["layers_0"] = jax.eval_shape(kernels._in_8_bits, layer)
    if adapters:
        params["encoder"]["layers_0"]["mlp"]["fc1"]["lora_a"] = jax.ShapeDtypeStruct((128, 4), dtype)
        params["encoder"]["layers_0"]["mlp"]["fc1"]["lora_b"] = jax.ShapeDtypeStruct((4, 256), dtype)
    options = {"patch_attention_mask": jnp.ones((2, side, side), bool)} if mask else {}
    run = lambda params, pixels: model.apply({"params": params}, pixels, output_attentions=weights, **options)[0]
    if backwards:
        run = jax.grad(lambda *inputs, forward=run: forward(*inputs).astype(jnp.float32).sum(), argnums=int(quantized))
    return jax.export.export(jax.jit(run), platforms=[platform])(params, pixels).mlir_module()


def test_taken_on_tpu_where_nothing_else_is_wanted():
    used = lambda *platform, **options: lowered(*platform, **options).count("encoder_mlp")
    assert used("tpu")
    assert used("tpu", scan_layers=True) and used("tpu", remat=True)
    assert not used("cpu") and not used("cuda")
    assert not used("tpu", dtype=jnp.float32), "exact"
    assert not used("tpu", mask=True) and not used("tpu", weights=True)
    assert not used("tpu", patches=144), "few patches"
    assert not used("tpu", attention="einsum") and not used("tpu", attention="splash"), "another form is asked for"
    assert not used("tpu", adapters=True)
    assert not used("tpu", backwards=True) and not used("tpu", backwards=True, remat=True)


@pytest.mark.thorough
def test_gradients_are_those_of_the_modules():
    layer, x, params = make(128, 2, 128, 256, tiles=1)
    quantized = kernels._in_8_bits(params)
    ours, wanted = (
        jax.jit(jax.grad(lambda x, run=run: run(x).astype(jnp.float32).sum()))(x)
        for run in (
            lambda x: kernels.layer_kernels(layer, x, quantized)(x, quantized),
            lambda x: layer.apply({"params": dequantized(quantized, x.dtype)}, x, mask=None, method="plain").output,
        )
    )
    np.testing.assert_array_equal(ours, wanted)
    chosen = kernels.layer_kernels(layer, x, params)
    assert chosen is not None
    total = lambda function: lambda x, params: jnp.sum(function(x, params).astype(jnp.float32) ** 2)
    modules = lambda x, params: layer.apply({"params": params}, x, mask=None, method="plain").output
    ours, wanted = (jax.jit(jax.grad(total(function), (0, 1)))(x, params) for function in (chosen, modules))
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)
    forwards = jax.jvp(chosen, (x, params), (x, params))[1], jax.jvp(modules, (x, params), (x, params))[1]
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in forwards), rtol=0.02, atol=0.02)


def test_chips_with_room_for_a_layer():
    """By the mesh that a program's arrays are placed on; the core's memory of v4 is too small, and what has none is no TPU."""
    config = make(1152, 16, 4304, 256, tiles=1)[0].config
    shape = kernels._shape(config, 729)
    for chip in ("v5e", "v5p", "v6e", "7x"):
        assert blocks_for(shape, chip) is not None
        assert blocks_for(replace(shape, head_size=64, width=768, heads=12, mlp=3072, patches=1024), chip) is not None
    assert blocks_for(shape, "other") is None
    assert blocks_for(replace(shape, patches=16384), "v6e") is None, "scores of a block of queries"
    assert blocks_for(replace(shape, width=1000), "v6e") is None and blocks_for(replace(shape, head_size=20), "v6e") is None


@pytest.mark.thorough
@pytest.mark.parametrize("in_8_bits", [False, True])
def test_the_trial(monkeypatch, in_8_bits):
    """It tells kernels that work from kernels that do not."""
    layer = make(128, 2, 128, 256, tiles=1)[0]
    run = kernels.on_each_device
    monkeypatch.setattr(kernels, "on_each_device", partial(run, interpret=True))
    assert trial._fault(kernels._example.__wrapped__(layer, 256, in_8_bits)) is None
    monkeypatch.setattr(
        kernels, "on_each_device", lambda config, chip, x, params: run(config, chip, x, params, interpret=True) * 1.1
    )
    assert "is wrong" in trial._fault(kernels._example.__wrapped__(layer, 256, in_8_bits))


def test_a_kernel_that_fails_is_not_used(monkeypatch):
    monkeypatch.setattr(kernels, "trusted", lambda example: False)
    assert "encoder_mlp" not in lowered("tpu")


def kernel_operands(text: str, name: str = "encoder_mlp") -> str:
    """The types of what a kernel is given."""
    line = next(line for line in text.splitlines() if "tpu_custom_call" in line and name in line)
    return line.rpartition(" : ")[2]


def test_multiplied_as_int8_where_the_chip_does_so_twice_as_fast(monkeypatch):
    twice = {name for name, chip in CHIPS.items() if chip.platform == "tpu" and chip.int8_ops == 2 * chip.flops}
    assert twice >= set(INT8_CHIPS)
    for name in ("encoder_mlp", "encoder_attention"):
        assert "xi8>" in kernel_operands(lowered("tpu", quantized=True), name)
        assert "xi8>" not in kernel_operands(lowered("tpu"), name)
    for backwards, adapters in ((True, False), (False, True)):
        assert "encoder_mlp" not in lowered("tpu", quantized=True, backwards=backwards, adapters=adapters)
    monkeypatch.setattr(kernels, "chip_of", lambda leaf: "7x")
    assert "xi8>" not in kernel_operands(lowered("tpu", quantized=True))


def test_int8_products_that_fail_are_replaced_by_the_other_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "trusted", lambda example: "int8" not in example.__name__)
    assert "xi8>" not in kernel_operands(lowered("tpu", quantized=True))
