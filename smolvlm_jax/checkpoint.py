"""`load()` and `save()`: a bundled name, a Hugging Face directory, a Hub id or an orbax directory <-> (model, params).

An orbax directory of ours holds `params/` (an orbax checkpoint of the parameter tree, which any StandardCheckpointer
restores) beside the same small files a Hugging Face directory has: config.json, generation_config.json, tokenizer and
processor files. Reading goes through the converter's lazy leaves, so a Hugging Face directory is placed on a mesh as it is,
each host reading only the slices its devices hold.
"""

import os
import warnings
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .attention import try_kernels
from .convert.hosts import concrete
from .convert.leaves import ArrayLeaf, Leaf
from .convert.source import Source, open_source
from .convert.to_hf import parse_size, write_hf
from .errors import CheckpointError, MissingExtraError
from .generation_config import GenerationConfig
from .io import COMPANIONS, copy_companions, whole_directory
from .model import SmolVLMForConditionalGeneration
from .parameters import abstract_params, flatten_params, logical_axes, unflatten_params
from .precision import default_dtype
from .sharding import parameter_shardings

__all__ = ["COMPANIONS", "bundled_models", "default_dtype", "load", "resolve", "save", "save_hf"]


def bundled_models() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    assets = resources.files("smolvlm_jax") / "assets"
    return sorted(entry.name for entry in assets.iterdir() if (entry / "config.json").is_file()) if assets.is_dir() else []


def resolve(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The local directory that a name stands for: an existing directory, a bundled name, or a Hub id `owner/name`."""
    path = resolve_file(source, revision)
    if path.is_file():
        raise CheckpointError(f"{path} is a file: pass the directory that holds it together with its config.json")
    return path


def resolve_file(source: str | os.PathLike, revision: str | None = None) -> Path:
    """As `resolve`, and a file stands for itself."""
    path = Path(source)
    if path.exists():
        return path
    name = str(source)
    if name in bundled_models():
        return Path(str(resources.files("smolvlm_jax") / "assets" / name))
    looks_like_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not looks_like_id:
        raise CheckpointError(
            f"no model {name!r}: not a directory, not a bundled name ({', '.join(bundled_models()) or 'none'}), "
            "not a Hub id (owner/name)"
        )
    return _download(name, revision)


_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "params/*"]


def _download(name: str, revision: str | None) -> Path:
    """The snapshot of a Hub repository in the local cache: safetensors, or the pickled weights if there is nothing else."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError(f"downloading {name} from the Hub", "hub") from error
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))
        if not any(found.glob("*.safetensors")) and not (found / "params").is_dir():
            # the same commit again: a branch may have moved on meanwhile
            pinned = found.name if found.parent.name == "snapshots" else revision
            found = Path(snapshot_download(name, revision=pinned, allow_patterns=[*_PATTERNS, "pytorch_model*.bin"]))
        return found
    except Exception as error:
        raise CheckpointError(f"cannot download {name}: {type(error).__name__}: {str(error).splitlines()[0]}") from error


def load(
    source: str | os.PathLike, dtype=None, mesh: Mesh | None = None, *, revision: str | None = None, attention: str = "auto"
) -> tuple[SmolVLMForConditionalGeneration, dict]:
    """Read a checkpoint.

    source: a bundled name ("tiny"), a Hugging Face directory or Hub id, an orbax directory of ours, or a training run, of
    which the parameters of the last step are read.
    dtype: what to compute in and store the parameters as. Default: parameters keep the dtype of the file, computation is
    in `default_dtype()`.
    mesh: place each parameter on this mesh as its logical axes say; every host reads only what its devices hold.
    attention: the model's field, "auto" or the name of a form. The kernels that it admits are tried here, where there is a TPU.

    Returns the model (a hashable description, safe as a jit static) and its parameters, a nested dict of jax arrays.
    Raises CheckpointError with one list of all missing, surplus and misshapen tensors.
    """
    try_kernels(attention)
    opened = open_source(resolve_file(source, revision))
    try:
        # Whether the head is tied is a fact of the weights: config.json has contradicted itself across transformers versions.
        compute = default_dtype() if dtype is None else dtype
        generation = opened.companions.get("generation_config.json")
        defaults = GenerationConfig.from_pretrained(generation.parent) if generation else None
        model = SmolVLMForConditionalGeneration(
            opened.model_config, dtype=compute, attention=attention, generation_config=defaults
        )
        if opened.layout == "base" and not opened.config.tie_word_embeddings:
            warnings.warn(
                f"{source} is a checkpoint of the base class, without the output head its config speaks of: "
                "hidden states are right, logits are made with the embedding instead",
                stacklevel=2,
            )
        return model, place(opened, model, dtype, mesh)
    finally:
        opened.close()


def place(source: Source, model, dtype=None, mesh: Mesh | None = None) -> dict:
    """The parameters of an open checkpoint as arrays, on the default device or on a mesh."""
    wanted = None if dtype is None else np.dtype(dtype)
    abstract = abstract_params(model)
    shardings = {} if mesh is None else flatten_params(parameter_shardings(abstract, logical_axes(model), mesh))
    params = {}
    for path, leaf in source.leaves.items():
        params[path] = jnp.asarray(leaf.read(dtype=wanted)) if mesh is None else _sharded(leaf, shardings[path], wanted)
    return unflatten_params({path: params[path] for path in flatten_params(abstract)})


def _sharded(leaf: Leaf, sharding, dtype: np.dtype | None) -> jax.Array:
    """One read for each distinct shard on this host, however many devices hold it."""
    parts: dict[tuple, np.ndarray] = {}

    def part(index):
        region = concrete(index, leaf.shape)
        key = tuple((piece.start, piece.stop) for piece in region)
        if key not in parts:
            parts[key] = leaf.read(region, dtype)
        return parts[key]

    return jax.make_array_from_callback(leaf.shape, sharding, part)


def save(
    directory: str | os.PathLike, model, params, *, companions: str | os.PathLike | None = None, force: bool = False
) -> None:
    """Write an orbax directory that `load` reads. `companions`: a directory whose tokenizer and processor files to carry.

    The parameters are in memory already, so orbax's own writer serves. Raises CheckpointError if the directory exists and
    `force` is not given, or if the disk is full; the directory is then as it was.
    """
    import orbax.checkpoint as ocp

    from .convert.manifest import write_manifest

    with whole_directory(Path(directory), force) as target:
        dtypes = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)}
        dtype = max(dtypes, key=lambda d: (d.itemsize, d.name)).name
        model.config.replace(dtype=dtype).save_pretrained(target)
        if companions is not None:
            copy_companions(companions, target)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target / "params", params)
        write_manifest(target, source=None, layout="full", dtype=dtype, files={})


def save_hf(
    directory: str | os.PathLike,
    model,
    params,
    *,
    companions: str | os.PathLike | None = None,
    force: bool = False,
    max_shard_size: str | int = "4GB",
) -> None:
    """Write a Hugging Face directory of safetensors shards, which transformers and `load` read. Raises as `save` does."""
    limit = parse_size(max_shard_size)
    with whole_directory(Path(directory), force) as target:
        leaves = {path: ArrayLeaf(path, array) for path, array in flatten_params(params).items()}
        dtype = max({leaf.dtype for leaf in leaves.values()}, key=lambda d: (d.itemsize, d.name))
        model.config.replace(dtype=dtype.name).save_pretrained(target)
        if companions is not None:
            copy_companions(companions, target)
        write_hf(target, leaves, max_shard_bytes=limit)
