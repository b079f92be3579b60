"""Export of a trained model as a Hugging Face directory; adapters are merged tensor by tensor."""

import os

import jax
import numpy as np

from ..convert.leaves import ArrayLeaf, Leaf, widest
from ..convert.manifest import describe
from ..convert.opened import open_checkpoint
from ..convert.to_hf import write_hf
from ..errors import CheckpointError
from ..locate import adapted
from ..parameters import flatten_params
from ..staging import new_directory
from ..storage import AnyPath
from .lora import product

__all__ = ["MergedLeaf", "export"]


class MergedLeaf(Leaf):
    """A kernel with its adapter added in float32, returned in the kernel's own dtype; read when it is written."""

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
    destination: AnyPath,
    *,
    scale: float = 1.0,
    adapter: str | os.PathLike | None = None,
) -> AnyPath:
    """Write `destination` as a Hugging Face directory; an export that is there is replaced.

    Args:
        base: the checkpoint that training started from; its config, tokenizer and processor files are copied.
        trained: the run's parameters: the whole model's, or under LoRA the adapters and the parts that were trained whole.
        destination: the directory to write, or the place in a store.
        scale: factor of every `lora_b`.
        adapter: a PEFT adapter that was merged into `base` before the training.

    Returns:
        `destination`.

    Raises:
        CheckpointError: a trained parameter is not one of the base's.
        ChangedError: the base changed while it was read; `destination` is then as it was.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten_params(jax.device_get(trained)).items()}
    origin, under = adapted(base, adapter)
    with open_checkpoint(origin, base=under) as source:
        leaves: dict[str, Leaf] = dict(source.leaves)
        used = set()
        for path in source.leaves:
            holder = path.removesuffix("kernel")
            names = (f"{holder}lora_a", f"{holder}lora_b")
            if path in flat:
                leaves[path] = ArrayLeaf(path, flat[path])
                used.add(path)
            if path.endswith("/kernel") and names[0] in flat:
                leaves[path] = MergedLeaf(leaves[path], flat[names[0]], flat[names[1]], scale)
                used.update(names)
        unknown = sorted(set(flat) - used)
        if unknown:
            raise CheckpointError(f"{base} has no parameter for what was trained: {', '.join(unknown[:5])}")
        with new_directory(destination, force=True, own=True) as target, source.unchanged():
            describe(target, source.config, dtype=widest(leaves.values()), companions=source.companions)
            write_hf(target, leaves, base=source.layout == "base")
    return destination
