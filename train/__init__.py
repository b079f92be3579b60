"""Fine-tuning on a mesh: `run(TrainConfig(...))`. Importing this package imports no jax: data workers read it too."""

from ..lazy import lazy_exports
from .config import DataConfig, DataSource, EvaluationConfig, LoraConfig, MeshConfig, TrainConfig
from .config import DataSource as Source  # the former name

_lazy, __getattr__ = lazy_exports(__name__, {"train.recipes": ("load_recipe",), "train.runner": ("TrainResult", "run")})
__all__ = ["DataConfig", "DataSource", "EvaluationConfig", "LoraConfig", "MeshConfig", "Source", "TrainConfig", *_lazy]
