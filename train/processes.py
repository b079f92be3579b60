"""Exchange between the processes of one job. Each function is a collective: all of them call it, or none."""

from jax.experimental import multihost_utils

from ..convert.hosts import everyones

__all__ = ["everyones", "on_host"]


def on_host(params: dict) -> dict:
    """Parameters as whole numpy arrays, on every process."""
    return multihost_utils.process_allgather(params, tiled=True)
