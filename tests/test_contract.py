"""The parameter tree is the public contract: paths, shapes and logical axes of the published sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from smolvlm_jax import SmolVLMForConditionalGeneration, abstract_params, init_params, logical_axes, published_config
from smolvlm_jax.convert.rules import RULES, match_parameters, rearrange, restore, torch_name, torch_shape
from smolvlm_jax.errors import CheckpointError
from smolvlm_jax.parameters import flat_scales, flatten_params, for_lookups, fused, quantize_params, unflatten_params
from smolvlm_jax.sharding import AXIS_RULES, make_mesh, parameter_shardings

# Every parameter of one layer and of the frame: shape in symbols, logical axes.
FRAME = {
    "lm_head/kernel": ("D V", ("embed", "vocab")),
    "model/connector/modality_projection/proj/kernel": ("F D", ("shuffled", None)),
    "model/text_model/embed_tokens/embedding": ("V D", ("vocab", "embed")),
    "model/text_model/norm/scale": ("D", (None,)),
    "model/vision_model/embeddings/patch_embedding/kernel": ("p p c d", (None, None, None, "embed")),
    "model/vision_model/embeddings/patch_embedding/bias": ("d", (None,)),
    "model/vision_model/embeddings/position_embedding/embedding": ("P d", (None, "embed")),
    "model/vision_model/post_layernorm/scale": ("d", (None,)),
    "model/vision_model/post_layernorm/bias": ("d", (None,)),
}
TEXT_LAYER = {
    "input_layernorm/scale": ("D", (None,)),
    "post_attention_layernorm/scale": ("D", (None,)),
    "self_attn/q_proj/kernel": ("D N H", ("embed", "heads", None)),
    "self_attn/k_proj/kernel": ("D K H", ("embed", "kv_heads", None)),
    "self_attn/v_proj/kernel": ("D K H", ("embed", "kv_heads", None)),
    "self_attn/o_proj/kernel": ("N H D", ("heads", None, "embed")),
    "mlp/gate_proj/kernel": ("D M", ("embed", "mlp")),
    "mlp/up_proj/kernel": ("D M", ("embed", "mlp")),
    "mlp/down_proj/kernel": ("M D", ("mlp", "embed")),
}
VISION_LAYER = {
    **{f"layer_norm{i}/{name}": ("d", (None,)) for i in (1, 2) for name in ("scale", "bias")},
    **{f"self_attn/{x}_proj/kernel": ("d n h", ("embed", "heads", None)) for x in "qkv"},
    **{f"self_attn/{x}_proj/bias": ("n h", ("heads", None)) for x in "qkv"},
    "self_attn/out_proj/kernel": ("n h d", ("heads", None, "embed")),
    "self_attn/out_proj/bias": ("d", ("embed",)),
    "mlp/fc1/kernel": ("d m", ("embed", "mlp")),
    "mlp/fc1/bias": ("m", ("mlp",)),
    "mlp/fc2/kernel": ("m d", ("mlp", "embed")),
    "mlp/fc2/bias": ("d", ("embed",)),
}
# vision: d m layers n h p P; text: D M layers N K H V; F = scale² · d; parameters in all, tensors in all
SIZES = {
    "SmolVLM-256M-Instruct": (768, 3072, 12, 12, 64, 16, 1024, 576, 1536, 30, 9, 3, 64, 49280, 12288, 256_484_928, 471),
    "SmolVLM2-500M-Video-Instruct": (768, 3072, 12, 12, 64, 16, 1024, 960, 2560, 32, 15, 5, 64, 49280, 12288, 507_482_304, 489),
    "SmolVLM2-2.2B-Instruct": (1152, 4304, 27, 16, 72, 14, 729, 2048, 8192, 24, 32, 32, 64, 49280, 10368, None, 657),
}


@pytest.mark.parametrize("name", SIZES)
def test_paths_shapes_and_axes(name):
    d, m, depth, n, h, p, patches, D, M, Depth, N, K, H, V, F, total, tensors = SIZES[name]
    symbols = dict(d=d, m=m, n=n, h=h, p=p, P=patches, c=3, D=D, M=M, N=N, K=K, H=H, V=V, F=F)
    expected = dict(FRAME)
    expected |= {f"model/text_model/layers_{l}/{k}": v for l in range(Depth) for k, v in TEXT_LAYER.items()}
    expected |= {f"model/vision_model/encoder/layers_{l}/{k}": v for l in range(depth) for k, v in VISION_LAYER.items()}

    model = SmolVLMForConditionalGeneration(published_config(name))
    shapes = flatten_params(abstract_params(model))
    axes = flatten_params(logical_axes(model))
    assert set(shapes) == set(axes) == set(expected)
    for path, (symbolic, names) in expected.items():
        assert shapes[path].shape == tuple(symbols[s] for s in symbolic.split()), path
        assert tuple(axes[path]) == names, path
        assert all(a is None or a in AXIS_RULES for a in names), f"{path}: an axis without a rule is a typing error"
    assert len(shapes) == tensors
    if total:
        assert sum(math.prod(s.shape) for s in shapes.values()) == total


def _tensors(file) -> dict[str, tuple[int, ...]]:
    rows = (line.split("\t") for line in file.read_text().splitlines() if line)
    return {name: tuple(int(n) for n in shape.split("x")) for name, _, shape in rows}


@pytest.mark.parametrize("name", ["SmolVLM-256M-Instruct", "SmolVLM2-500M-Video-Instruct", "granite-docling-258M"])
def test_every_published_tensor_has_its_parameter(name, published):
    model = SmolVLMForConditionalGeneration(published_config(name))
    shapes = {k: v.shape for k, v in flatten_params(abstract_params(model)).items()}
    tensors = _tensors(published / name / "TENSORS.tsv")
    matches = match_parameters(shapes, tensors, name)
    assert len(matches) == len(shapes) == len(tensors)


def test_rules_are_a_bijection():
    """Each side of the table occurs once, and every rearrangement is undone by its inverse."""
    assert len({torch_name(path.format(l=7))[0] for path in RULES}) == len(RULES)
    model = SmolVLMForConditionalGeneration(published_config("SmolVLM2-256M-Video-Instruct"))
    rng = np.random.default_rng(0)
    for path, leaf in flatten_params(abstract_params(model)).items():
        if "layers_" in path and "layers_0" not in path:
            continue
        name, pattern = torch_name(path)
        small = tuple(min(s, 6) for s in leaf.shape)
        x = rng.random(torch_shape(pattern, small))
        assert np.array_equal(restore(rearrange(x, pattern, small), pattern), x), name


def test_offenders_are_listed_together():
    model = SmolVLMForConditionalGeneration(published_config("SmolVLM-256M-Instruct"))
    shapes = {k: v.shape for k, v in flatten_params(abstract_params(model)).items()}
    tensors = {torch_name(k)[0]: torch_shape(torch_name(k)[1], s) for k, s in shapes.items()}
    tensors["model.text_model.rotary_emb.inv_freq"] = (32,)
    del tensors["model.text_model.norm.weight"]
    tensors["lm_head.weight"] = (7, 576)
    with pytest.raises(CheckpointError) as caught:
        match_parameters(shapes, tensors, "somewhere")
    message = str(caught.value)
    assert "3 tensors" in message and "somewhere" in message
    assert "surplus" in message and "inv_freq" in message
    assert "missing" in message and "text_model.norm.weight" in message
    assert "misshapen" in message and "(7, 576)" in message and "(49280, 576)" in message


@pytest.mark.thorough
def test_init_needs_nothing_but_a_config(tiny_a):
    model = SmolVLMForConditionalGeneration(tiny_a.model.config)
    params = init_params(model, seed=3)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(model))
    again = init_params(model, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))
    out = model.apply({"params": params}, input_ids=tiny_a.ids, pixel_values=tiny_a.pixels)
    assert np.isfinite(out.logits).all()
    # init through flax with a text-only example still makes the encoder
    variables = model.init(jax.random.key(0), input_ids=np.array([[1, 2]]))
    assert list(variables) == ["params"]
    assert set(flatten_params(nn.unbox(variables["params"]))) == set(flatten_params(params))
    kernels = [k for k in flatten_params(params) if "vision_model" in k]
    assert len(kernels) == 3 + 2 * 16 + 2  # embeddings, two layers, final norm


def test_flatten_and_unflatten_are_inverse(tiny_a):
    flat = flatten_params(tiny_a.params)
    assert jax.tree.structure(unflatten_params(flat)) == jax.tree.structure(tiny_a.params)


def test_a_table_laid_out_for_lookups_is_the_same_table():
    """Rows one after the other, as an array and in the program that is compiled for it; nothing else changes."""
    table = jax.device_put(jnp.arange(12.0).reshape(4, 3), Format(Layout((1, 0)), SingleDeviceSharding(jax.devices()[0])))
    tree = {"model": {"embed_tokens": {"embedding": table}, "norm": {"scale": jnp.ones(3)}}}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    assert for_lookups(tree)["model"]["embed_tokens"]["embedding"] is table, "of a TPU's tables alone"
    ours, described = for_lookups(tree, "cpu"), for_lookups(abstract, "cpu")
    found = ours["model"]["embed_tokens"]["embedding"]
    assert found.format.layout.major_to_minor == (0, 1) and ours["model"]["norm"] is not None
    assert described["model"]["embed_tokens"]["embedding"].format.layout.major_to_minor == (0, 1)
    program = jax.jit(lambda tree: tree["model"]["embed_tokens"]["embedding"][2]).lower(described).compile()
    assert program(ours).tolist() == [6.0, 7.0, 8.0] and bool((found == table).all())


@pytest.mark.parametrize("quantized", [False, True])
def test_fused_projections_compute_what_they_did_apart(tiny_a, quantized):
    """q, k and v are one kernel, gate and up another, of a TPU's trees alone; logits and the cache are the same."""
    apart = quantize_params(tiny_a.model, tiny_a.params) if quantized else tiny_a.params
    assert jax.tree.structure(fused(apart)) == jax.tree.structure(apart), "a CPU's tree stays as it is"
    ours = fused(apart, ("cpu",))
    layer = ours["model"]["text_model"]["layers_0"]
    assert layer["self_attn"].keys() == {"qkv_proj", "o_proj"} and layer["mlp"].keys() == {"gate_up_proj", "down_proj"}
    assert sum(x.size for x in jax.tree.leaves(ours)) == sum(x.size for x in jax.tree.leaves(apart))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), apart)
    assert jax.tree.map(lambda x: x.shape, fused(abstract, ("cpu",))) == jax.tree.map(lambda x: x.shape, ours)
    found, wanted = (
        tiny_a.model.apply({"params": params}, input_ids=tiny_a.ids, pixel_values=tiny_a.pixels, use_cache=True)
        for params in (ours, apart)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_scales_as_vectors_compute_what_they_did_as_rows(tiny_a):
    """Of the decoder and its head alone; the encoder's kernels take theirs as they are."""
    rows = quantize_params(tiny_a.model, tiny_a.params)
    assert jax.tree.map(jnp.shape, flat_scales(rows)) == jax.tree.map(jnp.shape, rows), "of a TPU's trees alone"
    ours = flat_scales(rows, "cpu")
    before, after = flatten_params(rows), flatten_params(ours)
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed and all(name.endswith("/kernel_scale") and after[name].ndim == 1 for name in changed)
    assert {name.split("/")[1] for name in changed} <= {"text_model", "kernel_scale"}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), rows)
    for tree in (flat_scales(abstract, "cpu"), flat_scales(ours, "cpu")):
        assert jax.tree.map(lambda x: x.shape, tree) == jax.tree.map(jnp.shape, ours)
    found, wanted = (
        tiny_a.model.apply({"params": params}, input_ids=tiny_a.ids, pixel_values=tiny_a.pixels).logits
        for params in (ours, rows)
    )
    assert jnp.array_equal(found, wanted)
    mesh = make_mesh(1, 1, 2, devices=jax.devices()[:2])
    placed = flat_scales(jax.device_put(rows, NamedSharding(mesh, PartitionSpec())), "cpu")
    assert jax.tree.map(jnp.shape, placed) == jax.tree.map(jnp.shape, ours)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))
    divide = lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "tensor" if x.shape[-1] % 2 == 0 else None))
    divided = flat_scales(jax.device_put(rows, jax.tree.map(divide, rows)), "cpu")["model"]["text_model"]["layers_0"]
    assert divided["mlp"]["down_proj"]["kernel_scale"].ndim == 2, "it is divided between two devices"


def test_projections_that_are_more_than_kernels_or_divided_stay_apart(tiny_a):
    adapted = jax.tree.map(lambda x: x, tiny_a.params)
    layer = adapted["model"]["text_model"]["layers_0"]
    layer["self_attn"]["v_proj"]["lora_a"] = layer["mlp"]["up_proj"]["lora_a"] = jnp.zeros((2, 2))
    found = fused(adapted, ("cpu",))["model"]["text_model"]
    assert found["layers_0"]["self_attn"].keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert found["layers_0"]["mlp"].keys() == {"gate_proj", "up_proj", "down_proj"}
    assert "qkv_proj" in found["layers_1"]["self_attn"]
    mixed = jax.tree.map(lambda x: x, tiny_a.params)
    text, in_8_bits = (tree["model"]["text_model"] for tree in (mixed, quantize_params(tiny_a.model, tiny_a.params)))
    text["layers_0"]["self_attn"]["v_proj"] = in_8_bits["layers_0"]["self_attn"]["v_proj"]
    assert "v_proj" in fused(mixed, ("cpu",))["model"]["text_model"]["layers_0"]["self_attn"], "one of three in 8 bits"
    mesh = make_mesh(1, 1, 2, devices=jax.devices()[:2])
    placed = jax.device_put(tiny_a.params, parameter_shardings(tiny_a.params, logical_axes(tiny_a.model), mesh))
    divided = fused(placed, ("cpu",))["model"]["text_model"]["layers_0"]
    assert "gate_proj" in divided["mlp"], "its columns are divided between two devices"
