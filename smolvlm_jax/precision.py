"""Which dtype to compute in, and how exactly matrix products are made in it."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["default_dtype", "matmul_precision"]


def default_dtype() -> Any:
    """The dtype to compute in where none is given.

    Returns:
        bfloat16 on TPU and GPU; float32 on CPU, whose bfloat16 matrix products are 5 to 10 times slower.
    """
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def matmul_precision(dtype: Any) -> jax.lax.Precision | None:
    """The `precision` argument of a matrix product whose inputs have this dtype.

    Returns:
        HIGHEST for float32, because TPUs otherwise multiply float32 in one bfloat16 pass and GPUs in TF32; else None.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
