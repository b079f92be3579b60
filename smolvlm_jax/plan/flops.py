"""Products and sums of a function's matrix products, from its jaxpr: what any chip has to do, however it is compiled."""

import math
from collections.abc import Iterator
from typing import Any

import jax

__all__ = ["flops"]


def flops(function: Any, *arguments: Any) -> float:
    """2 × the multiplications of all products and convolutions, on all chips together.

    A scan counts as often as it runs, a loop whose length is decided at run time once, of branches the largest. Attention is
    counted whole: kernels that leave out what a mask forbids do less.

    Args:
        function: to be traced.
        *arguments: abstract arrays.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[d] for d in contracted)
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            total += 2 * equation.outvars[0].aval.size * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in equation.params["branches"])
        else:
            total += (equation.params["length"] if name == "scan" else 1) * sum(map(_count, _inner(equation.params)))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part
