"""What the CUDA compiler makes of the engine's and the trainer's programs, on cards that are not here.

Runs in an environment with the extra `plan-cuda`, which `.ci/run` makes for it.
"""

import importlib.util

import pytest

from smolvlm_jax.plan import CHIPS, PlanConfig, plan

CARDS = ("h100", "a100", "b200")
LAYERS = 30

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None, reason="the CUDA compiler: pip install 'smolvlm-jax[plan-cuda]'"
    ),
]


@pytest.mark.parametrize("card", CARDS)
def test_the_engines_programs(card):
    """The 256M with 64 rows of 2,048 columns: cuDNN for pictures and packed prompts, no scores, the cache in place."""
    found = plan(PlanConfig(model="256m", on=card, ring_lengths=(2048,), slots=(64,)))
    encode, prefill, insert, decode = found.programs
    assert encode.libraries == {"__cudnn$fmhaSoftmax": 12} and encode.temporary_bytes <= (0.25e9 if card == "h100" else 0.26e9)
    assert prefill.libraries == {"__cudnn$fmhaScaleBiasSoftmax": LAYERS} and prefill.temporary_bytes <= 0.1e9
    cache = found.memory.kinds["KV cache"]
    for program in (insert, decode):
        assert program.alias_bytes >= 0.99 * cache and program.temporary_bytes <= 0.05e9
    weights = 0.27e9
    assert decode.bytes <= 1.05 * (weights + cache), "a step reads weights and cache once"
    # Two norms, four products with weights, attention, the rotation of the queries, the new keys and values, SwiGLU; and what a
    # step does beside its layers, of which the head is a product too.
    assert decode.libraries == {"__cudnn$fmhaScaleBiasSoftmax": LAYERS, "__cublas$lt$matmul": 4 * LAYERS + 1}
    assert decode.launches <= 10 * LAYERS + 16
    assert found.memory.total < CHIPS[card].usable and found.rate.low < found.rate.high


@pytest.mark.parametrize(
    ("model", "options", "share"),
    [
        ("256m", {"kv_cache_dtype": "int8"}, 1.35),
        ("2.2b", {"kv_cache_dtype": "int8"}, 1.15),
        ("256m", {"quantize": "int8"}, 1.08),
        ("2.2b", {"quantize": "int8"}, 1.04),
    ],
)
def test_decoding_in_8_bits(model, options, share):
    """Four layers with weights or caches in 8 bits: neither is restored as a whole, in each step or before."""
    kinds = ("decode",)
    found = plan(PlanConfig(model=model, on="h100", ring_lengths=(2048,), slots=(64,), layers=(1, 4), kinds=kinds, **options))
    (decode,), held = found.programs, found.memory.kinds
    # Scores of the bytes are written in float32, which shows beside the cache of the 256M.
    assert decode.bytes <= share * (held["weights"] + held["KV cache"])
    assert decode.temporary_bytes <= 0.05e9 and decode.alias_bytes >= 0.99 * held["KV cache"]


@pytest.mark.parametrize("card", [CARDS[0], *(pytest.param(card, marks=pytest.mark.slow) for card in CARDS[1:])])
def test_a_training_step(card):
    """Everything in the 500M, eight rows of 2,048 tokens with 13 tiles each, on one card."""
    found = plan(PlanConfig(recipe="full-500m-fsdp", on=card, mesh="data=1", overrides=("data.batch_size=8",)))
    (step,) = found.programs
    assert {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"} <= step.libraries.keys()
    assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} <= step.libraries.keys()
    assert found.memory.total <= 20e9
