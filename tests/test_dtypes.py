"""One reading of dtypes: every spelling at every door, and the same error for what is none."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from smolvlm_jax import (
    AutoModelForImageTextToText,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    abstract_params,
    init_params,
    load,
)
from smolvlm_jax.batch import BatchConfig
from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.dtypes import dtype_name, full_name
from smolvlm_jax.errors import SmolVLMError
from smolvlm_jax.plan import PlanConfig
from smolvlm_jax.processing import BatchFeature
from smolvlm_jax.train import TrainConfig
from smolvlm_jax.train.config import LoraConfig


class dtype:
    """As torch's."""

    def __init__(self, name):
        self.said = name

    def __repr__(self):
        return f"torch.{self.said}"


dtype.__module__ = "torch"
SPELLINGS = [
    "bfloat16", "bf16", "BF16", " torch.bfloat16 ", "jnp.bfloat16", "jax.numpy.bfloat16", "ml_dtypes.bfloat16",
    jnp.bfloat16, ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16), jnp.zeros(0, jnp.bfloat16).dtype, dtype("bfloat16"),
]  # fmt: skip
JOB = {"input": "in", "output": "out", "model": "tiny"}
MODEL = SmolVLMForConditionalGeneration(SmolVLMConfig.from_pretrained("tiny"))


def recipe(**fields) -> TrainConfig:
    return TrainConfig(model="tiny", output="out", steps=1, learning_rate=1e-3, lora=LoraConfig(), **fields)


# What a dtype is given to, with the result as a dtype or a name.
QUICK = {
    "config": lambda given: SmolVLMConfig(dtype=given).dtype,
    "config of 4.55": lambda given: SmolVLMConfig(torch_dtype=given).dtype,
    "batch": lambda given: BatchConfig(**JOB, dtype=given).dtype,
    "plan": lambda given: PlanConfig(model="256m", dtype=given).dtype,
    "computation": lambda given: recipe(dtype=given).dtype,
    "trained": lambda given: recipe(param_dtype=given).param_dtype,
    "frozen": lambda given: recipe(frozen_dtype=given).frozen_dtype,
    "inputs": lambda given: BatchFeature(x=np.zeros(3, np.float32)).to("cpu", given)["x"].dtype,
    "inputs, in place of a device": lambda given: BatchFeature(x=np.zeros(3, np.float32)).to(given)["x"].dtype,
    "model": lambda given: jnp.dtype(MODEL.clone(dtype=given).dtype),
    "shapes": lambda given: jax.tree.leaves(abstract_params(MODEL, given))[0].dtype,
}
SLOW = {
    "load": lambda given: load("tiny", given)[0].dtype,
    "from_pretrained": lambda given: AutoModelForImageTextToText.from_pretrained("tiny", dtype=given).dtype,
    "from_pretrained, torch_dtype": lambda given: AutoModelForImageTextToText.from_pretrained("tiny", torch_dtype=given).dtype,
    "a loaded model": lambda given: AutoModelForImageTextToText.from_pretrained("tiny").to(dtype=given).dtype,
}


@pytest.mark.parametrize("door", QUICK)
def test_every_spelling_at_every_door(door):
    for given in SPELLINGS:
        assert QUICK[door](given) == "bfloat16", given


@pytest.mark.thorough
@pytest.mark.parametrize("door", SLOW)
def test_every_spelling_where_weights_are_read(door):
    for given in ("bf16", jnp.bfloat16, dtype("bfloat16")):
        assert SLOW[door](given) == "bfloat16", given


@pytest.mark.parametrize("door", [*QUICK, *SLOW])
def test_what_is_no_dtype_is_refused_alike(door):
    doors = {**QUICK, **SLOW}
    for given in ("int4", "bfloat61", dtype("int16"), jnp.int32, np.dtype(np.uint8), "fp8"):
        if (door, given) == ("frozen", dtype("int8")):
            continue
        if (door == "model" and not isinstance(given, (str, dtype))) or (door.endswith("device") and isinstance(given, str)):
            continue  # a dtype of jax is taken as it is, and a word may be a device
        with pytest.raises(SmolVLMError, match=r"must be (one of )?float32") as found:
            doors[door](given)
        assert "\n" not in str(found.value)


def test_random_parameters_take_them_alone():
    with pytest.raises(SmolVLMError, match=r"must be (one of )?float32"):
        init_params(MODEL, dtype="int4")


def test_other_names():
    names = {
        "float": "float32",
        "fp32": "float32",
        "F32": "float32",
        "half": "float16",
        "torch.half": "float16",
        "F16": "float16",
    }
    assert {name: full_name(name) for name in names} == names
    assert full_name(np.float32) == full_name(jnp.float32) == full_name(np.dtype("f4")) == full_name("f4") == "float32"
    for wrong in (float, 3, None, True, np.zeros(2), jnp.float32(1)):
        with pytest.raises(SmolVLMError, match="kind must be one of float32, bfloat16, float16, not "):
            dtype_name(wrong, "kind")


@pytest.mark.thorough
def test_a_conversion_takes_them(tmp_path):
    for number, given in enumerate(("bf16", jnp.bfloat16, dtype("bfloat16"))):
        convert("tiny", tmp_path / str(number), to="hf", dtype=given, quiet=True)
        assert SmolVLMConfig.from_pretrained(tmp_path / str(number)).dtype == "bfloat16"
    with pytest.raises(SmolVLMError, match=r"must be (one of )?float32"):
        convert("tiny", tmp_path / "no", dtype="int4", quiet=True)
