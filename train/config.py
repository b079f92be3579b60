"""`TrainConfig`: the numbers of a training run."""

from dataclasses import dataclass

from ..errors import ConfigError

__all__ = ["TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser, schedule, length and bookkeeping of a run.

    learning_rate: peak; it rises linearly over warmup_steps and falls to final_fraction of itself along a cosine.
    restarts: further cycles of the same form, as (first step, peak); the first cycle then ends where the second begins.
    checkpoint_every, keep: an orbax checkpoint each so many steps, of which the newest `keep` stay.
    """

    steps: int
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    final_fraction: float = 0.0
    restarts: tuple[tuple[int, float], ...] = ()
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 500
    keep: int = 2

    def __post_init__(self):
        if self.steps < 1 or self.learning_rate <= 0 or self.checkpoint_every < 1:
            raise ConfigError(f"steps, learning_rate and checkpoint_every must be positive: {self}")
        starts = [0, *(start for start, _ in self.restarts)]
        if starts != sorted(set(starts)):
            raise ConfigError(f"restarts must come in order, each after step 0: {self.restarts}")
