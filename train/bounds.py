"""The ranges of the numbers in a recipe. Every number has one: too large a number would make a run read, allocate or wait
without end."""

from numbers import Real
from typing import Any

from ..errors import ConfigError

__all__ = ["PRODUCTS", "RANGES", "RATE", "STEP", "check_products", "check_range", "check_ranges", "shown"]

_COUNT = 2**31 - 1  # steps, and tokens of a step, are counted in int32 on the device
_ROWS = (1, 2**16)
_AXIS = (-1, 2**20)
# Of a learning rate that trains something, and of a step at which something begins.
RATE = (1e-12, 1e3)
STEP = (1, _COUNT)

# Class -> field -> (least, most). The upper ends are far beyond any use, and within what machine and devices can count.
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "DataSource": {"weight": (1e-9, 1e9), "limit": (1, 2**40)},
    "DataConfig": {
        "length": (1, 2**20),
        "batch_size": _ROWS,
        "tiles_per_row": (0, 2**16),
        "workers": (0, 1024),
        "window_rows": (1, 1024),
    },
    "LoraConfig": {"rank": (1, 4096), "alpha": (1e-9, 1e9)},
    "MeshConfig": {"data": _AXIS, "fsdp": _AXIS, "tensor": _AXIS, "devices": (1, 2**20)},
    "EvaluationConfig": {
        "every": (0, _COUNT),
        "samples": (1, 2**30),
        "batch_size": _ROWS,
        "max_new_tokens": (1, 2**20),
        "show": (0, 100_000),
    },
    "TrainConfig": {
        "steps": STEP,
        "learning_rate": RATE,
        "warmup_steps": (0, _COUNT),
        "warmup_fraction": (0, 1),
        "final_fraction": (0, 1),
        "weight_decay": (0, 1e3),
        "beta1": (0, 0.999999),  # 1, to which float32 rounds what is nearer to it, would divide by zero
        "beta2": (0, 0.999999),
        "epsilon": (1e-30, 1e3),
        "clip_norm": (1e-12, float("inf")),
        "accumulation": _ROWS,
        "tile_chunk": (1, 2**20),
        "loss_chunk": (1, 2**20),
        "seed": (0, _COUNT),
        "log_every": STEP,
        "checkpoint_every": STEP,
        "keep": (1, 1_000_000),
    },
}
# Settings that multiply to something which is bounded too: its name and the most that it may be.
PRODUCTS: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("data.window_rows", "data.length"), "tokens read before the first step", 2**22),
    (("accumulation", "data.batch_size", "data.length"), "tokens of a step", _COUNT),
)


def shown(value: Any) -> str:
    """A value in a message, shortened."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python prints no number of thousands of digits
        return "a number of thousands of digits"


def check_range(key: str, value: Any, least: float, most: float) -> None:
    """Raise ConfigError unless least <= value <= most, which nan never is. key: as a recipe has it, such as "data.length"."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and least <= value <= most):
        raise ConfigError(f"{key} must be a number from {_words(least)} to {_words(most)}, not {shown(value)}")


def check_ranges(where: str, config: Any) -> None:
    """`check_range` the fields of a settings dataclass that are not None. where: in front of their names, such as "data."."""
    for name, (least, most) in RANGES[type(config).__name__].items():
        value = getattr(config, name)
        if value is not None:
            check_range(where + name, value, least, most)


def check_products(config: Any) -> None:
    """Raise ConfigError where settings, each within its range, multiply to too much. config: a TrainConfig."""
    for keys, what, most in PRODUCTS:
        product = 1
        for key in keys:
            holder, _, name = key.rpartition(".")
            product *= getattr(getattr(config, holder) if holder else config, name)
        if product > most:
            raise ConfigError(f"{' × '.join(keys)} is {product:,} {what}; it must be a number from 1 to {most:,}")


def _words(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:.7g}"
