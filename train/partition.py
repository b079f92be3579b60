"""What a run trains and what it leaves alone, decided once from the model and the configuration."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..model import SmolVLMForConditionalGeneration
from ..parameters import abstract_params, flatten_params, logical_axes, unflatten_params, with_scales
from ..quantization import is_quantized
from ..sharding import parameter_shardings
from .config import INT8, TrainConfig
from .lora import adapter_axes, adapter_shapes

__all__ = ["Partition", "combine", "join", "part_of", "split"]


def part_of(path: str) -> str:
    """The part of the model that a parameter path such as model/text_model/norm/scale belongs to.

    Returns:
        "vision", "connector", "text" (which includes the output head) or "lora".
    """
    if path.rsplit("/", 1)[-1].startswith("lora_"):
        return "lora"
    for part, name in (("vision", "vision_model"), ("connector", "connector")):
        if path.startswith(f"model/{name}/"):
            return part
    return "text"


def split(tree: dict, choose: Callable[[str], bool]) -> tuple[dict, dict]:
    """Split a nested dict in two: the leaves whose path `choose` accepts, and the others. `join` is the inverse."""
    chosen: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for path, leaf in flatten_params(tree).items():
        (chosen if choose(path) else others)[path] = leaf
    return unflatten_params(chosen), unflatten_params(others)


def join(first: dict, second: dict) -> dict:
    """One nested dict with the leaves of both; where both have a leaf, the second's."""
    out = dict(first)
    for name, value in second.items():
        mine = out.get(name)
        out[name] = join(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return out


def combine(base: dict, trained: dict, scale: float = 1.0) -> dict:
    """The parameter tree to apply the model with.

    Args:
        base: parameters that stay as they are.
        trained: parameters that replace those of `base` or, as adapters, stand beside them.
        scale: factor of every `lora_b`.
    """
    if scale != 1.0:
        flat = flatten_params(trained)
        trained = unflatten_params({path: leaf * scale if path.endswith("/lora_b") else leaf for path, leaf in flat.items()})
    return join(base, trained)


@dataclass(frozen=True, eq=False)
class Partition:
    """The parameters of a run: which are in the training state, which of these the optimiser changes, which are the base.

    Without adapters the state holds the whole model and there is no base. With adapters (LoRA) the state holds the adapters
    and the parts that are trained whole, and the base everything else.

    Attributes:
        config: the run's configuration.
        params: shapes and dtypes of the state's parameters, a nested dict of ShapeDtypeStructs.
        axes: logical axis names of the same parameters.
        base: shapes and dtypes of the frozen base; empty without adapters.
        base_axes: logical axis names of the base.
    """

    config: TrainConfig
    params: dict[str, Any]
    axes: dict[str, Any]
    base: dict[str, Any]
    base_axes: dict[str, Any]

    @classmethod
    def of(cls, model: SmolVLMForConditionalGeneration, config: TrainConfig, *, quantized: bool = False) -> "Partition":
        """Resolve the partition. Nothing is allocated.

        Args:
            model: the model.
            config: the run's configuration.
            quantized: whether the weights that training starts from are in 8 bits; a frozen base then stays so, unless
                `frozen_dtype` says otherwise.

        Raises:
            ConfigError: `lora.targets` is no regular expression or matches no projection.
        """
        dtype = jnp.dtype(config.param_dtype)
        shapes, axes = abstract_params(model, dtype), logical_axes(model)
        if config.lora is None:
            return cls(config, shapes, axes, {}, {})
        chosen = lambda path: _is_trained(config, path)
        whole, _ = split(shapes, chosen)
        in_8_bits = config.frozen_dtype == INT8 or (quantized and config.frozen_dtype is None)
        _, base = split(abstract_params(model, model.dtype if in_8_bits else config.frozen_dtype or model.dtype), chosen)
        whole_axes, base_axes = split(axes, chosen)
        if in_8_bits:
            base, base_axes = with_scales(model, base), with_scales(model, base_axes)
        params = join(whole, adapter_shapes(model, config.lora, dtype))
        return cls(config, params, join(whole_axes, adapter_axes(model, config.lora)), base, base_axes)

    @property
    def in_8_bits(self) -> bool:
        """Whether the base is in 8 bits."""
        return is_quantized(self.base)

    @property
    def scale(self) -> float:
        """The factor of every `lora_b`, alpha / rank; 1 without adapters."""
        return 1.0 if self.config.lora is None else self.config.lora.scale

    def split(self, params: dict) -> tuple[dict, dict]:
        """(parameters that the optimiser changes, parameters that stay), of any tree with this model's paths."""
        return split(params, lambda path: _is_trained(self.config, path))

    def combine(self, base: dict, params: dict) -> dict:
        """The tree to apply the model with, of the base and the state's parameters."""
        return combine(base, params, self.scale)

    def shardings(self, mesh: Mesh) -> dict:
        """A sharding for each of the state's parameters."""
        return parameter_shardings(self.params, self.axes, mesh)

    def abstract_base(self, mesh: Mesh) -> dict:
        """The base as ShapeDtypeStructs that carry their shardings."""
        return with_shardings(self.base, parameter_shardings(self.base, self.base_axes, mesh))


def _is_trained(config: TrainConfig, path: str) -> bool:
    return config.peak(part_of(path)) > 0


def with_shardings(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of a tree of arrays or abstract arrays, each with its sharding."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
