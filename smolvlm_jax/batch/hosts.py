"""Which shard a process works on: as it was told, or as the launcher's environment says."""

import os
import sys
from collections.abc import Mapping

from ..errors import InputError

__all__ = ["shard_of"]

# Environment variables (index, count) of launchers. Kubernetes gives an indexed job its index only; the count is for manifests
# that set it.
_LAUNCHERS = (("JOB_COMPLETION_INDEX", "JOB_COMPLETION_COUNT"), ("SLURM_PROCID", "SLURM_NTASKS"))


def shard_of(index: int | None, count: int | None, environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """The shard of this process.

    Args:
        index: As the user gave it, or None.
        count: As the user gave it, or None.
        environment: By default the process's own.

    Returns:
        (shard index, number of shards): as given, else from JOB_COMPLETION_INDEX and JOB_COMPLETION_COUNT, SLURM_PROCID and
        SLURM_NTASKS, or an initialised jax.distributed; else (0, 1).

    Raises:
        InputError: if only one of the two is known, or the index is not below the number.
    """
    environment = os.environ if environment is None else environment
    for index_name, count_name in _LAUNCHERS:
        if index is None and index_name in environment:
            index = _number(index_name, environment[index_name])
            if count is None and count_name in environment:
                count = _number(count_name, environment[count_name])
            if count is None:
                raise InputError(f"{index_name} is {index}, but the number of shards is not known: pass --num-shards")
    jax = sys.modules.get("jax")
    if index is None and count is None and jax is not None and jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    if index is None and count in (None, 1):
        return 0, 1
    if index is None or count is None:
        missing = "--shard-index" if index is None else "--num-shards"
        raise InputError(f"pass --num-shards and --shard-index together: {missing} is missing")
    if not 0 <= index < count:
        raise InputError(f"shard index {index} is not below the number of shards, {count} (indices begin with 0)")
    return index, count


def _number(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise InputError(f"the environment variable {name} is {text!r}; it needs a whole number")
    return int(text)
