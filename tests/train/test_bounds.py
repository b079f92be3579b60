"""Every number of a recipe has a range, and a message that names key, range and value."""

import dataclasses
import typing

import pytest

from smolvlm_jax.errors import ConfigError
from smolvlm_jax.train import config as configs
from smolvlm_jax.train.bounds import PRODUCTS, RANGES, shown
from smolvlm_jax.train.config import TrainConfig
from smolvlm_jax.train.plain import from_dict

CLASSES = {
    "": TrainConfig,
    "data": configs.DataConfig,
    "data.train": configs.DataSource,
    "lora": configs.LoraConfig,
    "mesh": configs.MeshConfig,
    "evaluation": configs.EvaluationConfig,
}
REQUIRED = {"": {"steps": 1}, "data.train": {"path": "a"}, "evaluation": {"path": "a"}}
# Fields of pairs, whose numbers are tried in a test of their own.
PAIRS = ("restarts", "learning_rates")


def holds_number(hint) -> bool:
    return hint in (int, float) or any(holds_number(part) for part in typing.get_args(hint))


def recipe(place: str, key: str, value) -> dict:
    """A recipe with one setting."""
    inner = {**REQUIRED.get(place, {}), key: value}
    if place == "data.train":
        return {"steps": 1, "data": {"train": [inner]}}
    return {"steps": 1, place: inner} if place else inner


def numbers():
    for place, cls in CLASSES.items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if holds_number(hints[field.name]) and field.name not in PAIRS:
                yield place, cls, field.name


def test_every_number_has_a_range():
    assert {(cls.__name__, name) for _, cls, name in numbers()} == {(c, name) for c, held in RANGES.items() for name in held}


@pytest.mark.parametrize(("place", "cls", "name"), [pytest.param(*entry, id=f"{entry[0]}.{entry[2]}") for entry in numbers()])
def test_what_is_out_of_range_is_refused(place, cls, name):
    least, most = RANGES[cls.__name__][name]
    for value in (least - 1, -1e30, float("nan"), "1e18" if most < 1e18 else "-1e18"):
        with pytest.raises(ConfigError) as error:
            from_dict(recipe(place, name, value))
        message = str(error.value)
        assert name in message and ("must be a number from" in message or "it needs a value of type int" in message), message
    for value in (least, most):
        if value == value and abs(value) != float("inf"):
            kept = from_dict(recipe(place, name, value))
            holder = kept.data.train[0] if place == "data.train" else getattr(kept, place) if place else kept
            assert getattr(holder, name) == value
    assert all(part in message for part in (f"{least:,}" if isinstance(least, int) else f"{least:.7g}", " to "))


@pytest.mark.parametrize("value", [-1, 1e18, float("nan"), float("inf")])
def test_numbers_in_pairs(value):
    for name, pairs in (("restarts", [[value, 1e-3]]), ("restarts", [[5, value]]), ("learning_rates", {"text": value})):
        with pytest.raises(ConfigError, match=name):
            from_dict({"steps": 9, name: pairs})


@pytest.mark.parametrize(
    ("words", "product"),
    [
        ({"window_rows": 1024, "length": 2**20}, "1,073,741,824 tokens read"),
        ({"batch_size": 2**16, "length": 2**20}, "tokens of"),
    ],
)
def test_what_settings_multiply_to_is_bounded_too(words, product):
    with pytest.raises(ConfigError, match=product):
        from_dict({"steps": 1, "data": {"window_rows": 1, **words}})
    assert {key.rpartition(".")[2] for keys, _, _ in PRODUCTS for key in keys} >= set(words)


def test_a_number_that_python_does_not_print():
    assert shown(10**5000) == "a number of thousands of digits"
    with pytest.raises(ConfigError, match="steps must be a number from 1 to 2,147,483,647, not a number of thousands"):
        TrainConfig(steps=10**5000)
