"""Budgets: what the TPU compiler counts for two layers of each program, so that nothing gets slower unseen.

A program that costs less gets a smaller budget; one that costs more needs a reason. The whole programs' figures stand in
docs/plan.md (`python benchmarks/compiled.py`).
"""

import importlib.util

import pytest

from smolvlm_jax.plan import PlanConfig, plan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler: pip install 'smolvlm-jax[plan]' on x86-64 Linux"
)
SLACK = 1.02  # the scheduler's choices differ a little between versions

# Of the 256M on one v5e chip, 64 slots of 2,048 columns, of which rows see half, by program, dtype of cache, of weights:
# million cycles, GB moved, GB of temporaries.
BUDGETS = {
    # A step reads the table of the head, 0.057 GB, as that of the whole model does. With two layers XLA may keep it in the
    # core's memory from step to step, and then counts so much less.
    ("decode", None, None): (0.285, 0.173, 0.001),
    ("decode", "int8", None): (0.266, 0.127, 0.001),
    ("encode", None, None): (6.83, 0.306, 0.029),
    ("encode", None, "int8"): (5.46, 0.271, 0.001),
    ("prefill", None, None): (1.48, 0.260, 0.012),
}


@pytest.mark.parametrize(
    ("kind", "cache", "weights"),
    [pytest.param(*key, marks=pytest.mark.thorough if key[0] == "decode" else pytest.mark.slow) for key in BUDGETS],
)
def test_two_layers_stay_in_their_budget(kind, cache, weights):
    config = PlanConfig(
        model="256m",
        on="v5e",
        layers=(2, 2),
        ring_lengths=(2048,),
        slots=(64,),
        live=0.5,
        kinds=(kind,),
        kv_cache_dtype=cache,
        quantize=weights,
    )
    (cost,) = plan(config).programs
    cycles, gigabytes, temporaries = BUDGETS[kind, cache, weights]
    assert not cost.missing_kernels, "a kernel without a schedule would count nothing"
    assert cost.cycles / 1e6 <= SLACK * cycles, (cost.xla_cycles, cost.kernel_cycles)
    assert cost.floor_seconds <= cost.estimated_seconds
    assert cost.bytes / 1e9 <= SLACK * gigabytes
    assert cost.temporary_bytes / 1e9 <= SLACK * temporaries


@pytest.mark.thorough
def test_a_step_moves_weights_and_visible_columns_and_little_else():
    """Twice the visible columns cost twice their bytes; what is left is the weights that a step reads."""
    moved = {}
    for live in (0.25, 0.5):
        config = PlanConfig(
            model="256m", on="v5e", layers=(1, 2), ring_lengths=(2048,), slots=(64,), live=live, kinds=("decode",)
        )
        moved[live] = plan(config).programs[0]
    columns = 2 * 2 * 64 * 2048 * 3 * 64 * 2  # layers × (keys, values) × rows × columns × heads × size × bytes
    for live, cost in moved.items():
        assert cost.kernel_bytes == pytest.approx(live * columns, rel=0.02)
    fixed = [cost.bytes - cost.kernel_bytes for cost in moved.values()]
    assert fixed[0] == pytest.approx(fixed[1])
