"""The process in which the compilers work: its environment is set before jax is imported. Imports no jax itself."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict

from ..child import parent
from ..errors import describe
from .figures import Plan
from .kernels import dump_options
from .settings import KINDS, PlanConfig
from .target import Target, chip_here, parse_target
from .workload import rate_of, slow_seconds

__all__ = ["prepare_environment", "serve", "work_out"]


def prepare_environment(target: Target, dump: str) -> None:
    """Set what the compilers read when they are loaded."""
    os.environ.update(target.environment)
    if target.chip is not None and target.chip.platform == "tpu":
        os.environ["LIBTPU_INIT_ARGS"] = dump_options(dump)


def serve() -> None:
    """In the child: answer a question (PlanConfig, on, directory for dumps) with ("program", name, number, of how many) for
    each compilation, and then with ("plan", Plan) or ("error", message, exit code)."""
    channel = parent()
    config, on, dump = channel.receive()
    channel.send(None)
    target = parse_target(on)
    prepare_environment(target, dump)
    try:
        found = work_out(config, target, dump, lambda *program: channel.send(("program", *program)))
    except Exception as error:  # whatever a compiler raises has to reach the parent
        channel.send(("error", describe(error), getattr(error, "exit_code", 1)))
    else:
        channel.send(("plan", found))


def work_out(config: PlanConfig, target: Target, dump: str | None, notify: Callable[[str, int, int], None]) -> Plan:
    """The plan, in this process, whose environment has been prepared.

    Args:
        config: the question.
        target: the chips.
        dump: where the TPU compiler writes schedules of kernels.
        notify: told the name of each program before it is compiled, its number and how many there are.

    Raises:
        InputError: it does not fit, or the settings contradict each other.
        MissingExtraError: the compiler is not installed.
    """
    started = time.perf_counter()
    devices = target.devices()
    from .measure import Measurer

    chip = target.chip or chip_here()
    measurer = Measurer(chip, dump if chip is not None and chip.platform == "tpu" and target.shape else None)
    answer = _training if config.trains else _inference
    found = answer(config, devices, measurer, notify)
    return Plan(**found, chip=chip.name if chip else devices[0].device_kind, seconds=time.perf_counter() - started)


def _training(config, devices, measurer, notify) -> dict:
    from .training import measure_step, recipe_of, training_mesh

    recipe = recipe_of(config)
    mesh = training_mesh(config, recipe, devices)
    notify(f"step of {recipe.data.batch_size} × {recipe.data.length}", 1, 1)
    cost, memory = measure_step(recipe, mesh, measurer)
    slow = slow_seconds(cost, measurer.chip) if measurer.chip else None
    times, unused = recipe.accumulation, len(devices) - mesh.size
    return dict(
        model=recipe.model,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        mode="train",
        shapes={
            "recipe": config.recipe,
            "rows": recipe.data.batch_size,
            "length": recipe.data.length,
            "accumulation": times,
            # As mesh.devices says: the recipe's own, or the user's.
            **({"unused_chips": unused} if unused else {}),
        },
        memory=memory,
        programs=(cost,),
        step_seconds=None if slow is None or cost.floor_seconds is None else (cost.floor_seconds, slow),
    )


def _inference(config, devices, measurer, notify) -> dict:
    from .inference import EngineOnChips, prefill_bucket
    from .models import describe as describe_model
    from .models import given_mesh, in_8_bits

    mesh = given_mesh(config, devices)
    model = describe_model(config.full_name, layers=config.layers, dtype=config.dtype or "bfloat16", attention=config.attention)
    quantized = config.quantize is not None or in_8_bits(config.full_name)
    engine = EngineOnChips(model, mesh, measurer, config, notify, quantized)
    shapes, costs, memory = engine.measure()
    programs, rate = engine.programs(shapes), None
    if measurer.chip is not None and config.kinds == KINDS:
        ran = engine.workload_costs(shapes)
        rate = rate_of(
            ran,
            measurer.chip,
            config.workload,
            lanes=shapes.lanes,
            slots=shapes.slots[engine.ring_of_workload(shapes)],
            tiles=programs.encoder_batches()[0],
            row=prefill_bucket(programs, config.workload),
        )
    wanted = ("ring_lengths", "slots", "prefill_tokens", "encoder_tiles", "chunk", "feature_places")
    return dict(
        model=config.full_name,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        mode="infer",
        shapes={name: value for name, value in asdict(shapes).items() if name in wanted},
        memory=memory,
        programs=tuple(costs),
        rate=rate,
    )
