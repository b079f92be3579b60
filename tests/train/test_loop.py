"""The trainer: what it learns from, resuming, meshes, steps that are not finite."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smolvlm_jax import init_params, load, make_mesh
from smolvlm_jax.errors import ConfigError, InputError
from smolvlm_jax.parameters import flatten_params
from smolvlm_jax.processing import SmolVLMProcessor
from smolvlm_jax.train.config import TrainConfig
from smolvlm_jax.train.data import IGNORE, Example, collate, prefetch
from smolvlm_jax.train.loop import train
from smolvlm_jax.train.recipes import numbers, tiny_numbers
from smolvlm_jax.train.state import create_state, learning_rate, make_optimizer, state_shardings
from smolvlm_jax.train.step import make_step, token_losses


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """The tiny recipe's model with two layers in all, and its processor."""
    from smolvlm_jax import SmolVLMForConditionalGeneration

    directory = tmp_path_factory.mktemp("tiny")
    config = tiny_numbers.prepare(directory)
    config = config.replace(
        vision_config=config.vision_config.replace(num_hidden_layers=1),
        text_config=config.text_config.replace(num_hidden_layers=1),
    )
    return SmolVLMForConditionalGeneration(config), SmolVLMProcessor.from_pretrained(directory)


def make_batches(processor, step: int):
    rng = np.random.default_rng([5, step])
    return (
        collate(processor, [numbers.reading(rng, False, 2, True) for _ in range(8)], 64, 24),
        collate(processor, [numbers.comparison(rng, False, 2, (True, True)) for _ in range(4)], 112, 24),
    )


def test_labels_are_the_answer_and_nothing_else(setup):
    _, processor = setup
    rng = np.random.default_rng(0)
    examples = [numbers.reading(rng, False), numbers.comparison(rng, False)]
    batch = collate(processor, examples, 128, 20)
    for row, example in enumerate(examples):
        learned = batch["labels"][row]
        text = processor.decode(learned[learned != IGNORE], skip_special_tokens=False)
        assert text == f" {example.answer}<end_of_utterance>"
        ids = batch["input_ids"][row]
        assert np.array_equal(ids[learned != IGNORE], learned[learned != IGNORE])
        whole = processor.decode(ids[batch["attention_mask"][row] == 1], skip_special_tokens=False)
        assert whole.endswith(f"Assistant: {example.answer}<end_of_utterance>")
    tiles = int(batch["num_tiles"])
    slots = int((batch["input_ids"] == processor.image_token_id).sum())
    assert slots == tiles * processor.image_seq_len and not batch["pixel_values"][tiles:].any()


def test_what_does_not_fit_is_refused_with_its_length(setup):
    _, processor = setup
    examples = [numbers.reading(np.random.default_rng(0), False)]
    with pytest.raises(InputError, match=r"needs \d+ tokens, the rows hold 20"):
        collate(processor, examples, 20)
    with pytest.raises(InputError, match="the batch holds 1"):
        collate(processor, examples, 64, 1)


def test_text_only_examples(setup):
    model, processor = setup
    example = Example([{"role": "user", "content": [{"type": "text", "text": "Number?"}]}], "7")
    batch = collate(processor, [example], 32)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
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


def test_pictures_are_a_function_of_the_step(setup):
    _, processor = setup
    first, again, other = (tiny_numbers.make_batches(processor, 0, step) for step in (7, 7, 8))
    for a, b in zip(first, again, strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(first[0]["pixel_values"], other[0]["pixel_values"])
    assert first[0]["pixel_values"].shape == other[0]["pixel_values"].shape, "one program for all steps"


def test_batches_weigh_by_their_tokens(setup):
    """The loss of several batches is the mean over all their labelled tokens."""
    model, processor = setup
    params = init_params(model)
    batches = make_batches(processor, 0)
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer = make_optimizer(TrainConfig(steps=10))
    _, metrics = make_step(model, optimizer, mesh)(create_state(jax.tree.map(jnp.copy, params), optimizer), batches)
    sums = [token_losses(model, params, batch)[:2] for batch in batches]
    by_hand = sum(float(s) for s, _ in sums) / sum(int(n) for _, n in sums)
    assert float(metrics["loss"]) == pytest.approx(by_hand, rel=1e-5)
    per_row = [model.apply({"params": params}, **batch).loss for batch in batches]
    weighted = sum(float(l) * int(n) for l, (_, n) in zip(per_row, sums, strict=True)) / sum(int(n) for _, n in sums)
    assert by_hand == pytest.approx(weighted, rel=1e-5)


@pytest.mark.filterwarnings("ignore:axis")
def test_a_step_on_a_mesh_equals_a_step_on_one_device(setup):
    model, processor = setup
    params = jax.device_get(init_params(model, 1))
    batches = make_batches(processor, 1)
    optimizer = make_optimizer(TrainConfig(steps=10, learning_rate=1e-3))
    results = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(2, 2, 2)):
        shardings = state_shardings(model, optimizer, mesh)
        state = jax.jit(lambda p: create_state(p, optimizer), out_shardings=shardings)(params)
        step = make_step(model, optimizer, mesh)
        losses = []
        for _ in range(3):
            state, metrics = step(state, batches)
            losses.append(float(metrics["loss"]))
        results.append((losses, state))
    (losses, single), (sharded_losses, sharded) = results
    assert sharded_losses == pytest.approx(losses, rel=1e-4)
    kernel = sharded.params["model"]["text_model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    moment = sharded.opt_state[1][0].mu["model"]["text_model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding == moment.sharding and kernel.addressable_shards[0].data.size == kernel.size // 4
    norm = lambda tree: float(jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))))
    assert norm(sharded.params) == pytest.approx(norm(single.params), rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(setup):
    model, processor = setup
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer = make_optimizer(TrainConfig(steps=10))
    params = init_params(model)
    params["model"]["text_model"]["norm"]["scale"] = params["model"]["text_model"]["norm"]["scale"].at[0].set(jnp.nan)
    before = jax.device_get(params)
    state, metrics = make_step(model, optimizer, mesh)(create_state(params, optimizer), make_batches(processor, 0))
    assert int(metrics["skipped"]) == int(state.skipped) == 1 and int(state.step) == 1
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
        assert np.array_equal(a, b, equal_nan=True)


def test_resumed_equals_undisturbed(setup, tmp_path):
    """Six steps at once, and three, a stop, three more: the same parameters to the last bit, and one metrics file."""
    model, processor = setup
    mesh = make_mesh(devices=jax.devices()[:1])
    run = lambda directory, steps, stop: train(
        model,
        init_params(model, 2, mesh=mesh),
        lambda step: interrupt(step, stop) or make_batches(processor, step),
        TrainConfig(steps=steps, learning_rate=1e-3, warmup_steps=2, checkpoint_every=3, log_every=1),
        mesh,
        directory,
        progress=False,
    )

    class Stop(Exception):
        pass

    def interrupt(step, stop):
        if step == stop:
            raise Stop

    whole = run(tmp_path / "whole", 6, None)
    with pytest.raises(Stop):
        run(tmp_path / "cut", 6, 4)
    resumed = run(tmp_path / "cut", 6, None)
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


def test_the_recipe_in_short(tmp_path, monkeypatch):
    """From nothing to a Hugging Face directory that load() reads and transformers' file layout has."""
    monkeypatch.setattr(tiny_numbers, "READINGS", 8)
    monkeypatch.setattr(tiny_numbers, "COMPARED", 2)
    monkeypatch.setattr(tiny_numbers, "IN_WORDS", 2)
    monkeypatch.setattr(tiny_numbers, "SQUARE_READINGS", 2)
    monkeypatch.setattr(tiny_numbers, "SQUARE_COMPARED", 1)
    monkeypatch.setattr(tiny_numbers, "READING_TILES", 28)
    monkeypatch.setattr(tiny_numbers, "COMPARED_TILES", 14)
    out = tiny_numbers.train(tmp_path, 4)
    model, params = load(out)
    assert model.config.tie_word_embeddings and model.generation_config.eos_token_id
    assert sum(x.size for x in jax.tree.leaves(params)) < 1_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= {p.name for p in out.iterdir()}
    result = tiny_numbers.evaluate(str(out), readings=8, comparisons=2, batch=5, progress=False)
    assert 0 <= result["readings"] <= 1 and result["split"] == 1
