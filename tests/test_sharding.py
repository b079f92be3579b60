"""Eight fake devices: sharded equals single, and something really is sharded."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiers import fast_first

from smolvlm_jax import SmolVLMConfig, SmolVLMForConditionalGeneration, generate, init_params, load, logical_axes, make_mesh
from smolvlm_jax import sharding as sharding_module
from smolvlm_jax.errors import InputError
from smolvlm_jax.parameters import abstract_params, flatten_params
from smolvlm_jax.sharding import activate, batch_sharding, constrain, parameter_shardings, partition_spec

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="wants eight devices: XLA_FLAGS as in tests/conftest.py")
MESHES = fast_first(1, [(2, 2, 2), (8, 1, 1), (2, 4, 1)])


def small_model() -> SmolVLMForConditionalGeneration:
    """Every dimension that has a rule divides by 4, except the 3 key/value heads, which nothing divides."""
    config = SmolVLMConfig.from_dict(
        {
            "scale_factor": 2,
            "image_token_id": 62,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 16,
                "patch_size": 4,
            },
            "text_config": {
                "hidden_size": 48,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 6,
                "num_key_value_heads": 3,
                "head_dim": 8,
                "vocab_size": 64,
                "rms_norm_eps": 1e-5,
            },
        }
    )
    return SmolVLMForConditionalGeneration(config)


@pytest.fixture(scope="module")
def case():
    """A model, parameters on one device, and a batch of eight rows with one picture each."""
    model = small_model()
    params = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, init_params(model, 0))
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 60, (8, 12))
    ids[:, 2:6] = 62
    batch = {
        "input_ids": ids,
        "pixel_values": rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8),
        "labels": np.where(ids == 62, -100, ids),
    }
    return model, params, batch


def forward_and_gradient(model):
    def loss(params, batch):
        out = model.apply({"params": params}, **batch)
        return out.loss, out.logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def single(case):
    model, params, batch = case
    return jax.device_get(forward_and_gradient(model)(params, batch))


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.filterwarnings("ignore:axis")
def test_sharded_equals_single(case, single, shape):
    model, params, batch = case
    mesh = make_mesh(*shape)
    params = jax.device_put(params, parameter_shardings(params, logical_axes(model), mesh))
    batch = {k: jax.device_put(v, batch_sharding(mesh, v.shape)) for k, v in batch.items()}
    with activate(mesh):
        (loss, logits), gradients = forward_and_gradient(model)(params, batch)
    (want_loss, want_logits), want_gradients = single
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-5)
    assert np.abs(logits - want_logits).max() <= 2e-5 * max(1, np.abs(want_logits).max())
    for (path, got), want in zip(flatten_params(gradients).items(), flatten_params(want_gradients).values(), strict=True):
        scale = max(np.abs(want).max(), 1e-3)
        assert np.abs(np.asarray(got) - want).max() <= 1e-4 * scale, path


@pytest.mark.thorough
@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.filterwarnings("ignore:axis")
def test_parameters_are_really_split(case, shape):
    """Bytes on a device are the whole, divided by the mesh axes of every dimension that they divide."""
    model, _, _ = case
    mesh = make_mesh(*shape)
    params = init_params(model, 0, mesh=mesh)
    axes = flatten_params(logical_axes(model))
    split = 0
    for path, leaf in flatten_params(params).items():
        ways = 1
        used: set[str] = set()
        for name, size in zip(axes[path], leaf.shape, strict=True):
            for axis in sharding_module.AXIS_RULES.get(name, ()):
                if axis not in used and size % mesh.shape[axis] == 0:
                    ways *= mesh.shape[axis]
                    used.add(axis)
        assert leaf.addressable_shards[0].data.nbytes == leaf.nbytes // ways, path
        held = leaf.addressable_shards[0].data.nbytes
        assert held == leaf.nbytes // ways, path
        split += ways > 1
    assert split == 0 if shape == (8, 1, 1) else split > 25


EXPECTED = {
    # activation: its spec on the mesh (2, 2, 2); rows over data and fsdp, heads and widths over tensor
    "vision": P(("data", "fsdp")),
    "vision heads": P(("data", "fsdp"), "tensor"),
    "connector": P(("data", "fsdp")),
    "text heads": P(("data", "fsdp"), "tensor"),
    "text mlp": P(("data", "fsdp"), None, "tensor"),
    "text": P(("data", "fsdp")),
    "logits": P(("data", "fsdp"), None, "tensor"),
}


def activation_shardings(model, params, batch, mesh):
    """The shardings that the compiler gave the activations, asked for where they are constrained."""
    found: dict[str, Any] = {}
    shapes = {
        "vision": (8, 16, 32),
        "vision heads": (8, 4, 16, 8),
        "connector": (8, 4, 48),
        "text heads": (8, 6, 12, 8),
        "text mlp": (8, 12, 96),
        "text": (8, 12, 48),
        "logits": (8, 12, 64),
    }
    by_shape = {shape: name for name, shape in shapes.items()}
    original = constrain

    def spy(x, *names):
        y = original(x, *names)
        if name := by_shape.get(x.shape):
            jax.debug.inspect_array_sharding(y, callback=functools.partial(found.setdefault, name))
        return y

    from smolvlm_jax import cache, connector, decoder, layers, vision
    from smolvlm_jax import model as model_module

    modules = (cache, connector, decoder, layers, vision, model_module)
    kept = [m.constrain for m in modules]
    try:
        for m in modules:
            m.constrain = spy
        with activate(mesh):
            jax.jit(lambda params, batch: model.apply({"params": params}, **batch)).lower(params, batch).compile()
    finally:
        for m, f in zip(modules, kept, strict=True):
            m.constrain = f
    assert set(found) == set(shapes)
    return found


def same(sharding, mesh, spec, ndim) -> bool:
    return sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), ndim)


@pytest.mark.filterwarnings("ignore:axis")
def test_activations_lie_as_expected_and_the_constraints_are_what_does_it(case, monkeypatch):
    model, params, batch = case
    mesh = make_mesh(2, 2, 2)
    batch = {k: jax.device_put(v) for k, v in batch.items()}  # on one device: nothing to propagate from
    found = activation_shardings(model, params, batch, mesh)
    for name, spec in EXPECTED.items():
        ndim = 4 if "heads" in name else 3
        assert same(found[name], mesh, spec, ndim), f"{name}: {found[name]}"
    # Without the constraints the same check fails, so it tests them and nothing else.
    monkeypatch.setattr(jax.lax, "with_sharding_constraint", lambda x, spec: x)
    without = activation_shardings(model, params, batch, mesh)
    assert not any(same(without[name], mesh, spec, 4 if "heads" in name else 3) for name, spec in EXPECTED.items())


@pytest.mark.filterwarnings("ignore:axis")
def test_generation_on_a_mesh(case):
    model, params, batch = case
    ids = batch["input_ids"]
    options = dict(pixel_values=batch["pixel_values"], max_new_tokens=6, eos_token_id=None)
    want = generate(model, params, ids, np.ones_like(ids), **options)
    mesh = make_mesh(2, 2, 2)
    placed = jax.device_put(params, parameter_shardings(params, logical_axes(model), mesh))
    assert np.array_equal(generate(model, placed, ids, np.ones_like(ids), mesh=mesh, **options), want)


@pytest.mark.filterwarnings("ignore:axis")
def test_load_onto_a_mesh(tiny_a):
    mesh = make_mesh(2, 2, 2)
    _, params = load(tiny_a.directory, mesh=mesh)
    want = flatten_params(tiny_a.params)
    for path, leaf in flatten_params(params).items():
        assert np.array_equal(leaf, want[path])
        assert leaf.sharding.mesh.shape == mesh.shape
    assert params["lm_head"]["kernel"].addressable_shards[0].data.nbytes == params["lm_head"]["kernel"].nbytes // 4


def test_what_does_not_divide_is_replicated_and_said_once():
    mesh = make_mesh(1, 4, 2)
    sharding_module._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="'kv_heads' of size 3"):
        assert partition_spec(("embed", "kv_heads", None), (48, 3, 8), mesh) == P("fsdp")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert partition_spec(("embed", "kv_heads", None), (48, 3, 8), mesh) == P("fsdp")
    assert partition_spec(("batch", None), (6, 5), make_mesh(2, 4, 1), quiet=True) == P("data")
    assert partition_spec(("batch", None), (3, 5), make_mesh(2, 4, 1), quiet=True) == P()


def test_one_mesh_axis_serves_one_dimension():
    mesh = make_mesh(2, 4, 1)
    assert partition_spec(("embed", "shuffled"), (8, 8), mesh) == P("fsdp")


def test_meshes():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    for wrong in ((3, 1, 1), (-1, -1, 1), (0, 8, 1), (-1, 16, 1)):
        with pytest.raises(InputError):
            make_mesh(*wrong)


def test_the_published_sizes_split_where_they_can():
    """9 and 15 heads divide by nothing, widths do: on an fsdp mesh a device holds an eighth, give or take norms and biases."""
    from smolvlm_jax import published_config

    for name in ("SmolVLM-256M-Instruct", "SmolVLM2-500M-Video-Instruct", "SmolVLM2-2.2B-Instruct"):
        model = SmolVLMForConditionalGeneration(published_config(name))
        abstract = abstract_params(model)
        mesh = make_mesh(1, 8, 1)
        shardings = parameter_shardings(abstract, logical_axes(model), mesh)
        total = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract))
        held = sum(
            math.prod(s.shard_shape(x.shape))
            for x, s in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
        )
        assert held < total / 8 * 1.02


def test_constrain_is_the_identity_without_a_mesh():
    x = jnp.ones((4, 4))
    assert constrain(x, "batch", "act_mlp") is x


@pytest.mark.parametrize("sizes", [(0, -1, 1), (-1, 0, 1), (-2, -1, 1), (-1, -1, 1), (3, 1, 1)])
def test_a_mesh_that_cannot_be_is_one_line(sizes):
    with pytest.raises(InputError, match="mesh"):
        make_mesh(*sizes)
