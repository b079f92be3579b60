"""One step, however it is cut up: packed or not, accumulated, sharded, rematerialised, in chunks of tiles, in bfloat16."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiers import fast_first
from train_helpers import small_checkpoint, write_records

from smolvlm_jax import load, make_mesh
from smolvlm_jax.errors import InputError
from smolvlm_jax.parameters import flatten_params
from smolvlm_jax.sharding import activate
from smolvlm_jax.train.config import DataConfig, LoraConfig, TrainConfig
from smolvlm_jax.train.forward import token_losses
from smolvlm_jax.train.lora import init_adapters
from smolvlm_jax.train.packing import BatchShape, make_batch, plan_rows
from smolvlm_jax.train.partition import Partition, join, part_of
from smolvlm_jax.train.records import open_records
from smolvlm_jax.train.samples import Prepare
from smolvlm_jax.train.state import create_state, state_shardings
from smolvlm_jax.train.step import make_step


def shape(rows: int) -> BatchShape:
    return BatchShape(rows=rows, length=192, tiles=12, tile_size=48)


class Case:
    """A small model, eight samples (with two pictures, one, none), packed into four rows."""

    def __init__(self, folder, layers=1):
        self.directory = small_checkpoint(folder, layers=layers)
        self.model, self.params = load(self.directory)
        records = open_records(str(write_records(folder, 9)))
        prepare = Prepare(self.directory, DataConfig())
        self.samples = [prepare(records[i]) for i in range(8)]
        plan = plan_rows(self.samples, shape(4))
        assert 1 < len(plan) <= 4
        self.rows = [[self.samples[n] for n in row] for row in plan] + [[]] * (4 - len(plan))
        self.packed = make_batch(self.rows, shape(4), 2)
        self.alone = make_batch([[s] for s in self.samples], shape(8), 2)

    def loss(self, batch, params=None, **options):
        model = options.pop("model", self.model)

        def mean(params):
            total, count, hits = token_losses(model, params, {k: jnp.asarray(v) for k, v in batch.items()}, **options)
            return total / count, (count, hits)

        return jax.jit(jax.value_and_grad(mean, has_aux=True))(self.params if params is None else params)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def packed(case):
    return case.loss(case.packed)


def agree(ours, want, tolerance=2e-5):
    """Same loss, same counts, gradients within `tolerance` of their size, tensor by tensor."""
    ((loss, counts), gradients), ((wanted, wanted_counts), wanted_gradients) = ours, want
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    assert list(map(int, counts)) == list(map(int, wanted_counts))
    scale = max(float(np.linalg.norm(g)) for g in jax.tree.leaves(wanted_gradients))
    for path, gradient in flatten_params(gradients).items():
        wanted = flatten_params(wanted_gradients)[path]
        norm = float(np.linalg.norm(wanted))
        # What is next to nothing (the keys' bias has no gradient at all) is measured against the largest.
        assert float(np.linalg.norm(gradient - wanted)) <= tolerance * max(norm, 1e-3 * scale), path


def test_packed_equals_unpacked(case, packed):
    agree(case.loss(case.alone), packed)
    assert int(packed[0][1][0]) == sum((s.labels != -100).sum() for s in case.samples)


def test_packed_equals_the_models_own_loss(case, packed):
    """One conversation a row, through the model's forward with its logits."""
    real = case.alone["tile_mask"]
    inputs = {
        "input_ids": case.alone["input_ids"],
        "attention_mask": (case.alone["segment_ids"] > 0).astype(np.int32),
        "labels": case.alone["labels"],
        "pixel_values": case.alone["pixel_values"][real],
    }
    loss = jax.jit(lambda params: case.model.apply({"params": params}, **inputs).loss)(case.params)
    assert float(packed[0][0]) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.thorough
def test_padding_between_tiles(case, packed):
    """The padding behind a row's tiles changes nothing, whatever it is and however much: rows with many tiles and few."""
    mask = case.packed["tile_mask"]
    assert len(set(mask.sum(1).tolist())) > 1 and not mask.all(1).all()
    room = [(0, 0), (0, 7), (0, 0), (0, 0), (0, 0)]
    pixels = np.where(mask[..., None, None, None], case.packed["pixel_values"], np.uint8(77))
    batch = {**case.packed, "pixel_values": np.pad(pixels, room, constant_values=33), "tile_mask": np.pad(mask, room[:2])}
    agree(case.loss(batch), packed)
    agree(case.loss(batch, tile_chunk=4), packed)


@pytest.mark.parametrize("remat", fast_first(1, ["full", "dots"]))
def test_tiles_in_chunks_and_layers_recomputed(case, packed, remat):
    agree(case.loss(case.packed, tile_chunk=5, loss_chunk=64, model=case.model.clone(remat=remat)), packed)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Three layers each, adapters on all of them, and the loss of unrolled layers."""
    case = Case(tmp_path_factory.mktemp("deep"), layers=3)
    adapters = init_adapters(case.model, LoraConfig(rank=2, targets=".*"))
    case.adapted = join(case.params, jax.tree.map(lambda x: x + 0.01, adapters))
    case.unrolled = case.loss(case.packed, case.adapted)
    return case


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:axis")
@pytest.mark.parametrize(("remat", "mesh"), [("dots", ()), ("full", (2, 2, 2))])
def test_layers_in_a_loop(deep, remat, mesh):
    """Loss and gradients of unrolled layers, adapters included, alone and on a mesh."""
    model = deep.model.clone(scan_layers=True, remat=remat)
    with activate(make_mesh(*mesh)) if mesh else contextlib.nullcontext():
        agree(deep.loss(deep.packed, deep.adapted, model=model, tile_chunk=6), deep.unrolled)


@pytest.mark.thorough
def test_a_loop_is_one_layers_program(deep):
    """Scanned where all layers are alike, unrolled where some have adapters and others not."""
    model = deep.model.clone(scan_layers=True)
    some = init_adapters(deep.model, LoraConfig(rank=2, targets=".*layers_0.*"))
    for params, scanned in ((deep.params, True), (deep.adapted, True), (join(deep.params, some), False)):
        batch = {k: jnp.asarray(v) for k, v in deep.packed.items()}
        program = str(jax.make_jaxpr(lambda p, b=batch: token_losses(model, p, b, loss_chunk=64))(params))
        assert bool(re.search(r"length=3\b", program)) == scanned
    with pytest.raises(InputError, match="keeps no hidden states"):
        model.apply({"params": deep.params}, input_ids=np.ones((1, 4), np.int32), output_hidden_states=True)


@pytest.mark.filterwarnings("ignore:axis")
def test_sharded_equals_single(case, packed):
    with activate(make_mesh(2, 2, 2)):
        agree(case.loss(case.packed, tile_chunk=3), packed)


def state_for(case, config, base_params=None):
    partition, mesh = Partition.of(case.model, config), make_mesh(devices=jax.devices()[:1])
    params = jax.tree.map(jnp.copy, case.params) if base_params is None else base_params
    return create_state(params, partition), make_step(case.model, partition, mesh)


@pytest.mark.thorough
def test_a_batch_in_which_nothing_is_learned_changes_nothing(case):
    state, step = state_for(case, TrainConfig(steps=4, learning_rate=1e-3, warmup_steps=0))
    batch = make_batch(case.rows[:2], shape(2), 2)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = step(state, {**batch, "labels": np.full_like(batch["labels"], -100)})
    assert [float(metrics[name]) for name in ("loss", "gradient_norm", "tokens", "skipped")] == [0, 0, 0, 0]
    assert all(map(np.array_equal, jax.tree.leaves(state.params), jax.tree.leaves(before)))


@pytest.mark.thorough
def test_accumulated_equals_one_batch(case):
    """Two steps of two stacked batches, which hold unlike numbers of labels, as of both at once."""
    config = TrainConfig(steps=4, learning_rate=1e-3, warmup_steps=0)
    halves = [make_batch(case.rows[i : i + 2], shape(2), 2) for i in (0, 2)]
    stacked = {k: np.stack([half[k] for half in halves]) for k in halves[0]}
    whole = {k: np.concatenate([half[k] for half in halves]) for k in halves[0]}
    results = []
    for batch in (stacked, whole):
        state, step = state_for(case, config)
        for _ in range(2):
            state, metrics = step(state, batch)
        results.append((metrics, state.params))
    (ours, params), (want, wanted) = results
    for name in ("loss", "gradient_norm", "token_accuracy", "tokens"):
        assert float(ours[name]) == pytest.approx(float(want[name]), rel=1e-4)
    # Adam divides by the gradient's size, so where that is rounding noise the step is noise as well.
    far = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True)]
    assert np.median(far) <= 1e-5 and max(far) <= 2e-3


@pytest.mark.thorough
def test_parts_have_their_own_rates_and_frozen_ones_stay(case):
    """After one step of Adam from nothing every trained number moves by its rate, whatever its gradient."""
    rates = (("vision", 0.0), ("connector", 1e-4), ("text", 3e-5))
    config = TrainConfig(steps=9, learning_rate=1e-3, learning_rates=rates, warmup_steps=0, schedule="constant")
    state, step = state_for(case, config)
    kept = Partition.of(case.model, config).split(state.params)[1]
    assert {part_of(p) for p in flatten_params(kept)} == {"vision"}
    assert {part_of(p) for p in flatten_params(state.opt_state[1][0].mu)} == {"connector", "text"}
    state, _ = step(state, case.packed)
    before = flatten_params(case.params)
    for path, after in flatten_params(state.params).items():
        moved = np.abs(np.asarray(after) - before[path])
        rate = dict(rates)[part_of(path)]
        assert moved.max() <= rate * 1.01, path
        if path.endswith("kernel") and rate:
            assert np.median(moved) == pytest.approx(rate, rel=0.05), path


@pytest.mark.thorough
def test_adapters_train_and_the_base_stays(case):
    config = TrainConfig(
        steps=9,
        learning_rate=1e-3,
        warmup_steps=0,
        lora=LoraConfig(rank=2, targets=".*"),
        learning_rates=(("connector", 1e-4),),
    )
    whole, frozen = Partition.of(case.model, config).split(case.params)
    trained = join(jax.tree.map(jnp.copy, whole), init_adapters(case.model, config.lora))
    state, step = state_for(case, config, trained)
    losses = []
    for _ in range(5):
        state, metrics = step(state, case.packed, frozen)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0]
    paths = set(flatten_params(state.params))
    assert all("lora_" in p or part_of(p) == "connector" for p in paths)


@pytest.mark.thorough
def test_bfloat16_computes_and_float32_remembers(case, packed):
    model = case.model.clone(dtype=jnp.bfloat16)
    (loss, _), gradients = case.loss(case.packed, model=model)
    assert float(loss) == pytest.approx(float(packed[0][0]), rel=0.02)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradients))
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    a, b = flat(gradients), flat(packed[1])
    assert np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) > 0.99


def test_state_lies_on_the_mesh(case):
    config = TrainConfig(steps=2, lora=LoraConfig(rank=4, targets=".*"))
    shardings = state_shardings(Partition.of(case.model, config), make_mesh(1, 8, 1))
    here = lambda tree: tree["model"]["text_model"]["layers_0"]["mlp"]["up_proj"]
    assert here(shardings.params)["lora_a"].spec == P("fsdp")
    assert here(shardings.opt_state[1][0].mu)["lora_a"].spec == P("fsdp")
