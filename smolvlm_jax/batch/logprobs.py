"""The columns of a row that say how probable its answer was. Importing this module imports nothing heavy."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["LOGPROBS", "logprob_columns"]

# What --logprobs may be, and the columns that it adds.
LOGPROBS: dict[str, tuple[str, ...]] = {
    "mean": ("mean_logprob", "min_logprob"),
    "tokens": ("mean_logprob", "min_logprob", "token_logprobs"),
}


def logprob_columns(names: Iterable[str], logprobs: Sequence[float] | None) -> dict[str, Any]:
    """Of these columns the values, from the log-probabilities of an answer's tokens; None where there is no answer."""
    if not logprobs:
        return dict.fromkeys(names)
    values = {
        "mean_logprob": _float32(math.fsum(logprobs) / len(logprobs)),
        "min_logprob": _float32(min(logprobs)),
        "token_logprobs": [_float32(value) for value in logprobs],
    }
    return {name: values[name] for name in names}


def _float32(value: float) -> float | None:
    """The shortest decimal of a float32, as which log-probabilities are computed; None where a broken model gives none."""
    import numpy as np

    return float(str(np.float32(value))) if math.isfinite(value) else None
