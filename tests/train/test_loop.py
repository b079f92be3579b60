"""The trainer: what it learns from, resuming, meshes, steps that are not finite."""

import json

import handwritten_numbers as numbers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_files
from train_helpers import as_conversation, batch_of, recipe, write_records

from smolvlm_jax import init_params, load, make_mesh, resolve
from smolvlm_jax.errors import ConfigError
from smolvlm_jax.parameters import flatten_params
from smolvlm_jax.processing import SmolVLMProcessor
from smolvlm_jax.train import run
from smolvlm_jax.train.config import IGNORE, DataConfig, DataSource, TrainConfig
from smolvlm_jax.train.forward import token_losses
from smolvlm_jax.train.loop import fit
from smolvlm_jax.train.partition import Partition
from smolvlm_jax.train.pipeline import TrainingData
from smolvlm_jax.train.prefetch import prefetch
from smolvlm_jax.train.recipes import load_recipe
from smolvlm_jax.train.records import open_records
from smolvlm_jax.train.samples import Skipped, make_sample
from smolvlm_jax.train.state import create_state, learning_rate, shortened_warmup, state_shardings
from smolvlm_jax.train.step import make_step


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """The tiny recipe's model with two layers in all, and its processor."""
    from smolvlm_jax import SmolVLMForConditionalGeneration

    directory = tmp_path_factory.mktemp("tiny")
    config = tiny_files.write(directory)
    config = config.replace(
        vision_config=config.vision_config.replace(num_hidden_layers=1),
        text_config=config.text_config.replace(num_hidden_layers=1),
    )
    return SmolVLMForConditionalGeneration(config), SmolVLMProcessor.from_pretrained(directory)


def make_batches(processor, step: int):
    rng = np.random.default_rng([5, step])
    return (
        batch_of(processor, [numbers.reading(rng, False, 2, True) for _ in range(8)], 128, 6),
        batch_of(processor, [numbers.comparison(rng, False, 2, (True, True)) for _ in range(8)], 128, 6),
    )


def stacked(batches):
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def test_labels_are_the_answer_and_nothing_else(setup):
    _, processor = setup
    rng = np.random.default_rng(0)
    examples = [numbers.reading(rng, False), numbers.comparison(rng, False)]
    batch = batch_of(processor, examples, 128, 10)
    for row, example in enumerate(examples):
        learned = batch["labels"][row]
        text = processor.decode(learned[learned != IGNORE], skip_special_tokens=False)
        assert text == f" {example.answer}<end_of_utterance>"
        ids = batch["input_ids"][row]
        assert np.array_equal(ids[learned != IGNORE], learned[learned != IGNORE])
        whole = processor.decode(ids[batch["segment_ids"][row] == 1], skip_special_tokens=False)
        assert whole.strip().endswith(f"Assistant: {example.answer}<end_of_utterance>")
    tiles = batch["tile_mask"].sum(1)
    slots = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert np.array_equal(slots, tiles * processor.image_seq_len) and not batch["pixel_values"][~batch["tile_mask"]].any()


def test_what_does_not_fit_is_refused_with_its_length(setup):
    _, processor = setup
    messages = as_conversation(numbers.reading(np.random.default_rng(0), False))
    for config in (DataConfig(length=20), DataConfig(length=64, tiles_per_row=1)):
        sample = make_sample(processor, messages, config)
        assert isinstance(sample, Skipped) and sample.detail.split()[1:3] == ["tokens", "and"], sample


@pytest.mark.thorough
def test_text_only_examples(setup):
    model, processor = setup
    example = numbers.Example([{"role": "user", "content": [{"type": "text", "text": "Number?"}]}], "7")
    batch = batch_of(processor, [example], 32, 0)
    assert set(batch) == {"input_ids", "segment_ids", "labels"}
    loss, count, _ = token_losses(model, init_params(model), batch)
    assert int(count) == 3 and np.isfinite(loss)


def test_held_out_digits_occur_in_no_training_picture():
    seen, _, _ = numbers.digits(False)
    kept, values, rows = numbers.digits(True)
    assert len(kept) == numbers.HELD_OUT == 297 and len(seen) == 1797 - 297
    assert not {x.tobytes() for x in kept} & {x.tobytes() for x in seen}
    assert all(len(r) for r in rows) and np.array_equal(np.sort(np.concatenate(rows)), np.arange(297))
    assert set(values.tolist()) == set(range(10))


def test_numbers_of_all_lengths_and_both_verdicts_are_equally_likely():
    rng = np.random.default_rng(0)
    lengths = np.bincount([len(numbers.reading(rng, True).answer) for _ in range(800)], minlength=5)[1:]
    assert lengths.min() > 160
    verdicts = [numbers.comparison(rng, True).answer.split(". ")[-1] for _ in range(300)]
    assert 110 < verdicts.count("The first.") < 190


@pytest.mark.thorough
def test_pictures_are_a_function_of_the_step(tmp_path):
    """And of the seed: the file of a curriculum is the same each time it is made, and each step has pictures of its own."""
    first, again, other, seeded = (
        [numbers.as_record(example) for example in numbers.examples_of_step(*of)] for of in ((7,), (7,), (8,), (7, 1))
    )
    assert first == again and first != other and first != seeded
    assert len(first) == len(other) == numbers.READINGS + numbers.COMPARED + numbers.WORDED
    files = [numbers.make(tmp_path / str(workers), steps=3, processes=workers) for workers in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    records = open_records(str(files[0]))
    assert len(records) == 300 and records[200][0] == numbers.as_record(numbers.examples_of_step(2)[0])


def test_pictures_and_numbers_grow():
    """One digit more every 150 steps; pictures that are alike at first, and differ from each other in the end."""
    digits = lambda step: max(len(e.answer) for e in numbers.examples_of_step(step) if e.answer.isdigit())
    assert [digits(step) for step in (0, 149, 150, 300, 450, 5000)] == [1, 1, 2, 3, 4, 4]
    sizes = lambda step: len({i["image"].size for e in numbers.examples_of_step(step) for i in pictures(e)})
    assert sizes(0) == sizes(500) == 2 < sizes(1000) <= sizes(2000)


def pictures(example):
    return [item for item in example.messages[0]["content"] if item["type"] == "image"]


@pytest.mark.thorough
def test_batches_weigh_by_their_tokens(setup):
    """The loss of several batches is the mean over all their labelled tokens."""
    model, processor = setup
    params = init_params(model)
    batches = make_batches(processor, 0)
    mesh = make_mesh(devices=jax.devices()[:1])
    partition = Partition.of(model, TrainConfig(steps=10))
    state = create_state(jax.tree.map(jnp.copy, params), partition)
    _, metrics = make_step(model, partition, mesh)(state, stacked(batches))
    sums = [token_losses(model, params, batch)[:2] for batch in batches]
    by_hand = sum(float(s) for s, _ in sums) / sum(int(n) for _, n in sums)
    assert float(metrics["loss"]) == pytest.approx(by_hand, rel=1e-5)
    own = lambda batch: model.apply(
        {"params": params},
        input_ids=batch["input_ids"],
        attention_mask=batch["segment_ids"],
        labels=batch["labels"],
        pixel_values=batch["pixel_values"][batch["tile_mask"]],
    )
    per_row = [own(batch).loss for batch in batches]
    weighted = sum(float(l) * int(n) for l, (_, n) in zip(per_row, sums, strict=True)) / sum(int(n) for _, n in sums)
    assert by_hand == pytest.approx(weighted, rel=1e-5)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:axis")
def test_a_step_on_a_mesh_equals_a_step_on_one_device(setup):
    model, processor = setup
    params = jax.device_get(init_params(model, 1))
    batch = stacked(make_batches(processor, 1))
    partition = Partition.of(model, TrainConfig(steps=10, learning_rate=1e-3))
    results = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(2, 2, 2)):
        shardings = state_shardings(partition, mesh)
        state = jax.jit(lambda p: create_state(p, partition), out_shardings=shardings)(params)
        step = make_step(model, partition, mesh)
        losses = []
        for _ in range(3):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        results.append((losses, state))
    (losses, single), (sharded_losses, sharded) = results
    assert sharded_losses == pytest.approx(losses, rel=1e-4)
    kernel = sharded.params["model"]["text_model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    moment = sharded.opt_state[1][0].mu["model"]["text_model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding == moment.sharding and kernel.addressable_shards[0].data.size == kernel.size // 4
    norm = lambda tree: float(jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))))
    assert norm(sharded.params) == pytest.approx(norm(single.params), rel=1e-5)


@pytest.mark.thorough
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(setup):
    model, processor = setup
    mesh = make_mesh(devices=jax.devices()[:1])
    partition = Partition.of(model, TrainConfig(steps=10))
    params = init_params(model)
    params["model"]["text_model"]["norm"]["scale"] = params["model"]["text_model"]["norm"]["scale"].at[0].set(jnp.nan)
    before = jax.device_get(params)
    state, metrics = make_step(model, partition, mesh)(create_state(params, partition), make_batches(processor, 0)[0])
    assert int(metrics["skipped"]) == int(state.skipped) == 1 and int(state.step) == 1
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
        assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.thorough
def test_resumed_equals_undisturbed(setup, tmp_path):
    """Six steps at once, and three, a stop, three more: the same parameters to the last bit, and one metrics file."""
    model, _ = setup
    mesh = make_mesh(devices=jax.devices()[:1])
    source = DataSource(str(write_records(tmp_path, 24)))

    class Stop(Exception):
        pass

    class Interrupted(TrainingData):
        left = 10**9

        def __next__(self):
            self.left -= 1
            if self.left < 0:
                raise Stop
            return super().__next__()

    def trained(directory, stop=10**9):
        config = TrainConfig(
            steps=6,
            learning_rate=1e-3,
            warmup_steps=2,
            checkpoint_every=3,
            log_every=1,
            data=DataConfig(train=(source,), length=192, batch_size=4, tiles_per_row=12),
        )
        data = Interrupted(config.data, str(resolve("tiny")), seed=0)
        data.left = stop
        partition = Partition.of(model, config)
        return fit(model, init_params(model, 2, mesh=mesh), data, partition, mesh, directory)

    whole = trained(tmp_path / "whole")
    with pytest.raises(Stop):
        trained(tmp_path / "cut", 4)
    resumed = trained(tmp_path / "cut")
    for (path, a), b in zip(flatten_params(whole.params).items(), jax.tree.leaves(resumed.params), strict=True):
        assert np.array_equal(a, b), path
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    want = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in want] == [1, 2, 3, 4, 5, 6]
    assert {line["step"]: line["loss"] for line in lines} == {line["step"]: line["loss"] for line in want}
    assert want[-1]["loss"] < want[0]["loss"]


def test_prefetch_keeps_order_raises_and_leaves():
    assert list(prefetch(lambda i: i * i, 2, 6)) == [4, 9, 16, 25]

    def broken(i):
        if i == 3:
            raise ValueError("three")
        return i

    got = []
    with pytest.raises(ValueError, match="three"):
        for item in prefetch(broken, 0, 9):
            got.append(item)
    assert got == [0, 1, 2]
    endless = prefetch(lambda i: i, 0, 10**9)
    assert next(endless) == 0
    endless.close()


def test_learning_rate_cycles():
    """Warm-up and cosine, again from each restart; a short run has the first cycle alone."""
    config = TrainConfig(steps=100, learning_rate=1.0, warmup_steps=10, restarts=((60, 0.5),))
    rate = [float(learning_rate(config)(step)) for step in range(100)]
    assert rate[0] == 0 and rate[10] == pytest.approx(1) and rate[59] < 0.01 and rate[60] == 0
    assert rate[70] == pytest.approx(0.5) and rate[99] < 0.01
    assert rate[10:60] == sorted(rate[10:60], reverse=True) and rate[70:] == sorted(rate[70:], reverse=True)
    short = learning_rate(TrainConfig(steps=40, learning_rate=1.0, warmup_steps=10, restarts=((60, 0.5),)))
    assert float(short(39)) < 0.01


@pytest.mark.parametrize("steps", (1, 2, 10, 11, 12, 60))
@pytest.mark.parametrize("warmup", (0, 10, 11))
@pytest.mark.parametrize("restarts", ((), ((49, 1.0),)))
def test_a_warm_up_that_is_shortened_is_said(steps, warmup, restarts):
    """Namely where the peak is reached sooner than asked for, with the step where it is."""
    config = TrainConfig(steps=steps, learning_rate=1.0, warmup_steps=warmup, restarts=restarts)
    rate, said = learning_rate(config), shortened_warmup(config)
    starts = [start for start in (0, *(start for start, _ in restarts)) if start < steps]
    reached = [next(step for step in range(warmup + 1) if float(rate(start + step)) > 0.9999) for start in starts]
    assert bool(said) == any(step < warmup for step in reached)
    if said:
        assert f"takes {min(reached)} of the {(steps - starts[-1])} steps" in said and f"not {warmup}:" in said
        assert ("from the restart at step 49 on" in said) == (len(starts) > 1)


def test_answers_name_both_numbers_before_they_judge():
    rng = np.random.default_rng(0)
    for _ in range(200):
        example = numbers.comparison_in_words(rng)
        first, second = example.answer.split(". ")[0].split(" and ")
        verdict = "The first." if int(first) > int(second) else "The second."
        assert example.answer == f"{first} and {second}. {verdict}"
        assert first in example.messages[0]["content"][0]["text"] and second in example.messages[0]["content"][0]["text"]


def test_config_errors():
    for wrong in (
        dict(steps=0),
        dict(steps=5, learning_rate=0.0),
        dict(steps=5, checkpoint_every=0),
        dict(steps=5, restarts=((3, 1.0), (2, 1.0))),
    ):
        with pytest.raises(ConfigError):
            TrainConfig(**wrong)


@pytest.mark.thorough
def test_the_recipe_in_short(tmp_path):
    """From nothing to a Hugging Face directory that load() reads and transformers' file layout has."""
    train = numbers.make(tmp_path / "data", steps=1)
    words = [f"data.train={train}", f"output={tmp_path / 'run'}", "steps=4", "data.batch_size=4", "log_every=1"]
    result = run(load_recipe("tiny-numbers", words), progress=False)
    model, params = load(result.model)
    assert model.config.tie_word_embeddings and model.generation_config.eos_token_id
    assert sum(x.size for x in jax.tree.leaves(params)) < 1_000_000
    assert {path.name for path in result.model.iterdir()} == {path.name for path in resolve("tiny").iterdir()}
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] > 4, "it starts from random weights"
    result = numbers.evaluate(str(result.model), readings=8, comparisons=2, batch=5)
    assert 0 <= result["readings"] <= 1 and result["split"] == 1


@pytest.mark.thorough
def test_random_weights_see_no_brightness(tmp_path):
    """Filters with zero mean: a tile of one grey looks like a tile of another to them."""
    from smolvlm_jax.train.devices import open_mesh
    from smolvlm_jax.train.runner import open_model

    write_records(tmp_path, 3)
    config = load_recipe(str(recipe(tmp_path, "tiny", weights="random", seed=3)))
    _, params = open_model(config, open_mesh(config.mesh))
    kernel = params["model"]["vision_model"]["embeddings"]["patch_embedding"]["kernel"]
    assert np.abs(kernel.mean((0, 1, 2))).max() < 1e-7 < np.abs(kernel).max()
    assert not np.array_equal(kernel, load("tiny")[1]["model"]["vision_model"]["embeddings"]["patch_embedding"]["kernel"])
