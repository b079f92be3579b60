"""Settings of the wrong type are refused where they are made, by name."""

import dataclasses

import numpy as np
import pytest

from smolvlm_jax.batch.config import BatchConfig
from smolvlm_jax.errors import ConfigError, InputError, SmolVLMError
from smolvlm_jax.field_types import check_types
from smolvlm_jax.media_options import PictureOptions
from smolvlm_jax.processing import MediaLimits

WRONG = {
    int: (1.5, "3", True, float("nan"), [1]),
    float: ("3", True, None),
    bool: (1, "yes"),
    str: (7, b"x"),
    tuple: (5, "ab", (1.5,)),
}
JOB = {"input": "in", "output": "out", "model": "tiny"}


def kinds_of(settings: type) -> dict[str, type]:
    """The fields of the types above, by what their annotation begins with."""
    names = {"int": int, "float": float, "bool": bool, "str": str, "tuple[int": tuple}
    found = {}
    for field in dataclasses.fields(settings):
        hint = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        kind = next((kind for name, kind in names.items() if str(hint).startswith(name)), None)
        if kind is not None and "|" not in str(hint).replace(" | None", ""):
            found[field.name] = kind
    return found


@pytest.mark.parametrize("settings", [BatchConfig, PictureOptions, MediaLimits])
def test_every_field_refuses_other_types(settings):
    given = JOB if settings is BatchConfig else {}
    tried = 0
    for name, kind in kinds_of(settings).items():
        default = getattr(settings(**given), name)
        for value in WRONG[kind]:
            if value is None and default is None:
                continue
            with pytest.raises(SmolVLMError, match=name):
                settings(**{**given, name: value})
            tried += 1
    assert tried > 40


@pytest.mark.thorough
def test_every_field_of_the_engine_refuses_other_types():
    from smolvlm_jax.engine import EngineConfig

    for name in ("ring_lengths", "slots", "cache_bytes", "prefill_tokens", "chunk", "lookahead", "keep_special_tokens"):
        with pytest.raises(ConfigError, match=name):
            EngineConfig(**{name: 1.5})


@pytest.mark.parametrize(
    ("name", "value"),
    [("workers", 1.5), ("shard_size", 2.5), ("slots", (1.5,)), ("model", 7), ("columns", (("a",),)), ("input", 3)],
)
def test_a_job_says_which(name, value):
    with pytest.raises(ConfigError, match=f"{name} is .*needs a value of type"):
        BatchConfig(**{**JOB, name: value})


def test_numbers_of_numpy_and_lists_are_what_they_stand_for():
    config = BatchConfig(**JOB, workers=np.int64(2), record_timeout=np.float32(5), slots=[2, 3], columns=[["image", "jpg"]])
    assert config.workers == 2 and MediaLimits(timeout=3).timeout == 3
    with pytest.raises(InputError, match="negative"):
        MediaLimits(max_bytes=-1)


def test_hints_of_every_form():
    @dataclasses.dataclass
    class Settings:
        pair: tuple[int, str] = (1, "a")
        many: tuple[tuple[str, int], ...] = ()
        maybe: dict[str, int] | None = None
        path: float | str = 1.0

    for good in ({}, {"pair": (2, "b")}, {"many": [("a", 1)]}, {"maybe": {"a": 1}}, {"path": 2}, {"path": "x"}):
        check_types(Settings(**good))
    for bad in ({"pair": (2,)}, {"pair": ("b", 2)}, {"many": [("a", "1")]}, {"maybe": [1]}, {"path": None}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            check_types(Settings(**bad))
