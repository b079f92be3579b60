"""transformers' activation functions that have no parameters, by the names that `hidden_act` may have."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from .errors import ConfigError

__all__ = ["activation"]

_tanh_gelu = partial(jax.nn.gelu, approximate=True)
_exact_gelu = partial(jax.nn.gelu, approximate=False)


def _laplace(x: jax.Array) -> jax.Array:
    """The activation of MEGA (arXiv 2209.10655), with its mean 0.707107 and deviation 0.282095."""
    return 0.5 * (1 + jax.scipy.special.erf((x - 0.707107) / (0.282095 * 2**0.5)))


_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), _tanh_gelu),
    **dict.fromkeys(("gelu", "gelu_python"), _exact_gelu),
    "gelu_10": lambda x: jnp.clip(_exact_gelu(x), -10, 10),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    **dict.fromkeys(("silu", "swish"), jax.nn.silu),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "hardswish": jax.nn.hard_swish,
    "mish": jax.nn.mish,
    "laplace": _laplace,
    "linear": lambda x: x,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function behind a name. Raises ConfigError for an unknown one."""
    if name not in _FUNCTIONS:
        raise ConfigError(f"hidden_act {name!r} is none of {', '.join(sorted(_FUNCTIONS))}")
    return _FUNCTIONS[name]
