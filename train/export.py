"""A trained model home again: a Hugging Face directory, adapters merged tensor by tensor through the converter's leaves."""

import os
from pathlib import Path

import jax
import numpy as np

from ..checkpoint import resolve_file
from ..convert.leaves import ArrayLeaf, Leaf
from ..convert.source import open_source
from ..convert.to_hf import parse_size, write_hf
from ..errors import CheckpointError
from ..io import copy_companions, whole_directory
from ..parameters import flatten_params
from .lora import product

__all__ = ["MergedLeaf", "export"]


class MergedLeaf(Leaf):
    """A kernel with its adapter added in float32, in the kernel's own dtype; only this one is in memory."""

    def __init__(self, base: Leaf, a: np.ndarray, b: np.ndarray, scale: float):
        self.path, self.shape, self.dtype = base.path, base.shape, base.dtype
        self._base, self._a, self._b, self._scale = base, a, b, scale

    def read(self, region=None, dtype=None) -> np.ndarray:
        wide = self._base.read(dtype=np.dtype(np.float32))
        wide += product(self._a.astype(np.float32), self._b.astype(np.float32), self._scale, self.shape)
        return np.ascontiguousarray((wide if region is None else wide[region]).astype(dtype or self.dtype))


def export(
    base: str | os.PathLike,
    trained: dict,
    destination: str | os.PathLike,
    *,
    scale: float = 1.0,
    max_shard_size: str | int = "4GB",
    force: bool = True,
) -> Path:
    """Write `destination` as a Hugging Face directory.

    base: the checkpoint that training started from; its config, tokenizer and processor files are carried over. trained: the
    parameters of the run, all of the model's, or under LoRA the adapters and what else was trained; B times `scale` is merged.
    Raises CheckpointError where a trained parameter is not the base's.
    """
    destination = Path(destination)
    flat = {path: np.asarray(leaf) for path, leaf in flatten_params(jax.device_get(trained)).items()}
    source = open_source(resolve_file(base))
    try:
        leaves: dict[str, Leaf] = dict(source.leaves)
        used = set()
        for path, leaf in source.leaves.items():
            holder = path.removesuffix("kernel")
            names = (f"{holder}lora_a", f"{holder}lora_b")
            if path in flat:
                leaves[path] = ArrayLeaf(path, flat[path])
                used.add(path)
            elif path.endswith("/kernel") and names[0] in flat:
                leaves[path] = MergedLeaf(leaf, flat[names[0]], flat[names[1]], scale)
                used.update(names)
        strange = sorted(set(flat) - used)
        if strange:
            raise CheckpointError(f"{base} has no parameter for what was trained: {', '.join(strange[:5])}")
        with whole_directory(destination, force) as target:
            dtype = max({leaf.dtype for leaf in leaves.values()}, key=lambda d: (d.itemsize, d.name))
            source.config.replace(dtype=dtype.name).save_pretrained(target)
            copy_companions(source.root, target)
            write_hf(target, leaves, max_shard_bytes=parse_size(max_shard_size), base=source.layout == "base")
    finally:
        source.close()
    return destination
