"""Loss, gradients and AdamW against transformers and torch on the tiny reference checkpoints, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference runs on torch (test extra)")
transformers = pytest.importorskip("transformers", reason="the reference is transformers (test extra)")

from smolvlm_jax import make_mesh
from smolvlm_jax.convert.rules import rearrange, torch_name
from smolvlm_jax.parameters import flatten_params
from smolvlm_jax.train.config import TrainConfig
from smolvlm_jax.train.forward import token_losses
from smolvlm_jax.train.partition import Partition
from smolvlm_jax.train.state import create_state
from smolvlm_jax.train.step import make_step

IMAGE = 150
# Zero in exact arithmetic: adding one vector to all keys changes no softmax.
NO_GRADIENT = "self_attn/k_proj/bias"


def reference(tiny):
    # In its own code, not in fused kernels, torch's rounding is that of the plain formulas.
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tiny.directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.train()


def labels_of(tiny, masked: bool):
    return np.where(tiny.ids == IMAGE, -100, tiny.ids) if masked else tiny.ids


def theirs_as_ours(named: dict, params) -> dict[str, np.ndarray]:
    """torch tensors by our paths and in our layout."""
    out = {}
    for path, leaf in flatten_params(params).items():
        name, pattern = torch_name(path)
        out[path] = np.asarray(rearrange(named[name].detach().numpy(), pattern, leaf.shape))
    return out


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["full", "masked"])
def test_loss_and_gradients(tiny, masked):
    torch.set_num_threads(1)
    labels = labels_of(tiny, masked)
    model = reference(tiny)
    out = model(
        input_ids=torch.tensor(tiny.ids), pixel_values=torch.tensor(tiny.pixels), labels=torch.tensor(labels), use_cache=False
    )
    out.loss.backward()
    want = theirs_as_ours({name: p.grad for name, p in model.named_parameters()}, tiny.params)

    def loss(params):
        batch = {"input_ids": tiny.ids, "labels": labels, "pixel_values": tiny.pixels}
        total, count, _ = token_losses(tiny.model, params, {k: jnp.asarray(v) for k, v in batch.items()}, loss_chunk=16)
        return total / count

    value, gradients = jax.jit(jax.value_and_grad(loss))(tiny.params)
    assert float(value) == pytest.approx(out.loss.item(), rel=1e-6)
    found, bias = {}, 0.0
    for path, gradient in flatten_params(gradients).items():
        theirs = want[path]
        if path.endswith(NO_GRADIENT):
            assert np.abs(theirs).max() <= 1e-7, path
            bias = max(bias, float(np.abs(gradient).max()))
        else:
            found[path] = float(np.linalg.norm(gradient - theirs) / np.linalg.norm(theirs))
    worst = max(found, key=found.get)
    print(f"{len(found)} gradients within {found[worst]:.1e} of torch's ({worst}); keys' bias {bias:.1e}")
    assert found[worst] <= 1e-5, worst
    assert bias <= 1e-7


@pytest.mark.thorough
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["full", "masked"])
def test_ten_steps_of_adamw(tiny, masked):
    torch.set_num_threads(1)
    labels = labels_of(tiny, masked)
    model = reference(tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-8, weight_decay=0.0)
    inputs = dict(input_ids=torch.tensor(tiny.ids), pixel_values=torch.tensor(tiny.pixels), labels=torch.tensor(labels))
    want = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        want.append(loss.item())
    theirs = theirs_as_ours(dict(model.named_parameters()), tiny.params)

    config = TrainConfig(steps=10, learning_rate=1e-3, schedule="constant", warmup_steps=0, clip_norm=1e30)
    partition, mesh = Partition.of(tiny.model, config), make_mesh(devices=jax.devices()[:1])
    state = create_state(jax.tree.map(jnp.copy, tiny.params), partition)
    step = make_step(tiny.model, partition, mesh)
    batch = {"input_ids": tiny.ids, "labels": labels, "pixel_values": tiny.pixels}
    losses = []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses == pytest.approx(want, rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]
    found = {
        path: float(np.abs(value - theirs[path]).max())
        for path, value in flatten_params(state.params).items()
        if not path.endswith(NO_GRADIENT)
    }
    worst = max(found, key=found.get)
    apart = max(abs(a / b - 1) for a, b in zip(losses, want, strict=True))
    print(f"ten losses within {apart:.1e}, {len(found)} parameters within {found[worst]:.1e} of torch's ({worst})")
    assert found[worst] <= 1e-4, worst
