"""`load()` and `save()`: a bundled name, a Hugging Face directory, a Hub id or an orbax directory <-> (model, params).

An orbax directory of ours holds `params/` (an orbax checkpoint of the parameter tree, which any StandardCheckpointer
restores) beside the same small files a Hugging Face directory has: config.json, generation_config.json, tokenizer and
processor files. Reading goes through the converter's lazy leaves, so a Hugging Face directory is placed on a mesh as it is,
each host reading only the slices its devices hold.
"""

import inspect
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.linen import Module
from jax.sharding import Mesh

from .attention import try_kernels
from .convert.arrays import checksum
from .convert.leaves import ArrayLeaf, Leaf, widest
from .convert.manifest import describe, write_manifest
from .convert.opened import open_checkpoint
from .convert.orbax_errors import reason, tell_once
from .convert.place import place
from .convert.quantized import dequantized_leaves, quantization
from .convert.to_hf import parse_size, write_hf
from .directories import disk_full
from .dtypes import dtype_name
from .errors import InputError, StorageError
from .field_types import check_kind
from .garbage import rare_collections
from .generation_config import GenerationConfig
from .habits import Neutral, named_arguments, unasked
from .io import COMPANIONS, companion_files, write_json
from .layers import Execution
from .locate import LOADING, adapted, bundled_models, find_directory, resolve, resolve_file
from .model import SmolVLMForConditionalGeneration
from .parameters import flatten_params
from .precision import default_dtype
from .retrieval_model import model_of
from .staging import new_directory
from .storage import StorePath
from .storage import place as place_of
from .vision import try_encoder

__all__ = ["COMPANIONS", "bundled_models", "default_dtype", "load", "resolve", "resolve_file", "save", "save_hf"]

# Keywords of huggingface_hub, for a Hub id.
_HUB = ("cache_dir", "force_download", "local_files_only", "token")
_PLACES = "load(source, mesh=…) places parameters on several devices, jax.device_put(params, device) on one"
_IN_8_BITS = "weights in 8 bits are a checkpoint of their own: smolvlm-jax convert SOURCE DEST --quantize int8, then load(DEST)"
# Keywords of transformers for a model.
NEUTRAL: dict[str, Neutral] = {
    **LOADING,
    "device_map": Neutral(("auto", "cpu", "balanced", "sequential"), _PLACES),
    "device": Neutral(("auto",), _PLACES),
    **dict.fromkeys(("low_cpu_mem_usage", "use_safetensors", "weights_only"), Neutral((True, False))),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit"), Neutral((False,), _IN_8_BITS)),
    **dict.fromkeys(("quantization_config", "quantize", "quantization"), Neutral((), _IN_8_BITS)),
    **dict.fromkeys(("from_tf", "from_flax", "ignore_mismatched_sizes"), Neutral((False,))),
    **dict.fromkeys(("max_memory", "offload_folder", "tp_plan"), Neutral((), _PLACES)),
    **dict.fromkeys(("config", "state_dict", "variant", "adapter_kwargs", "generation_config"), Neutral()),
}


@named_arguments
def load(
    source: str | os.PathLike,
    dtype: Any = None,
    mesh: Mesh | None = None,
    *,
    revision: str | None = None,
    attention: str = "auto",
    base: str | os.PathLike | None = None,
    adapter: str | os.PathLike | None = None,
    check: bool = False,
    subfolder: str | os.PathLike | None = None,
    **cache: Any,
) -> tuple[SmolVLMForConditionalGeneration, dict]:
    """Read a checkpoint.

    Args:
        source: a bundled name ("tiny"), a Hugging Face directory, a Hub id, a URL of an object store, a safetensors file, an
            orbax directory of ours, a training run, of which the parameters of the last step are read, or a PEFT adapter,
            which is merged into its base.
        dtype: what to compute in and store the parameters as: a name such as "bfloat16" or "bf16", or a dtype of jax, numpy or
            torch. Default: parameters keep the dtype of the file, and computation is in `default_dtype()`. Weights in 8 bits
            stay so.
        mesh: place each parameter on this mesh as its logical axes say; every host reads only what its devices hold.
        revision: branch, tag or commit of a Hub id.
        attention: the model's field, "auto" or the name of a form. The kernels that it admits are tried here, if there is a
            TPU.
        base: the model that an adapter is merged into, named as `source` is; default: the one its config names.
        adapter: a PEFT adapter that is merged into `source`: `load(base, adapter=DIR)` is `load(DIR, base=base)`.
        check: compare every array of an orbax directory with its checksum, which reads everything once more. A warning says
            if there are no checksums: in Hugging Face's formats, and in directories written before there were any.
        subfolder: the directory of the checkpoint in `source`.
        **cache: for a Hub id huggingface_hub's cache_dir, force_download, local_files_only and token. Keywords of transformers
            with values that ask for nothing, such as device_map="auto", are taken too.

    Returns:
        The model, which is a hashable description and may be a static argument of jit, and its parameters, a nested dict of
        jax arrays.

    Raises:
        CheckpointError: one message for all tensors that are missing, surplus or of the wrong shape; with `check`, an array
            is not what was written.
        ChangedError: the files changed while they were read.
        ConfigError: no model can be built from config.json.
        InputError: an argument is of another kind than these, or unknown.
    """
    if mesh is not None:
        check_kind("mesh", mesh, Mesh, "what make_mesh(data=…, fsdp=…, tensor=…) gives")
    compute = default_dtype() if dtype is None else jnp.dtype(dtype_name(dtype))
    try_kernels(attention)
    _require_cpu(cache.get("device_map"), mesh)
    hub = unasked("load", cache, NEUTRAL, (*_HUB, *(set(inspect.signature(load).parameters) - {"cache"})))
    if subfolder or hub or (adapter is not None and revision is not None):
        source, revision = resolve_file(source, revision, subfolder=subfolder, **hub), None
    source, base = adapted(source, adapter, base)
    with rare_collections(), open_checkpoint(source, revision=revision, base=base) as opened:
        # Whether the head is tied is read from the weights: what config.json says has varied between transformers versions.
        generation = opened.companions.get("generation_config.json")
        defaults = GenerationConfig.from_pretrained(generation.parent) if generation else None
        model = model_of(opened.model_config, dtype=compute, attention=attention, generation_config=defaults)
        for line in opened.notes:
            warnings.warn(line, stacklevel=2)
        quantized = opened.quantized is not None
        try_encoder(opened.model_config.vision_config, Execution(compute, attention=attention), quantized=quantized)
        if opened.layout == "base" and not opened.config.tie_word_embeddings:
            warnings.warn(
                f"{source} is a checkpoint of the base class, without the output head its config speaks of: "
                "hidden states are right, logits are made with the embedding instead",
                stacklevel=2,
            )
        with opened.unchanged():
            if check and not opened.check_arrays():
                warnings.warn(f"{source} has no checksums of its arrays: nothing was checked", stacklevel=2)
            return model, place(opened, model, None if dtype is None else compute, mesh)


def _require_cpu(device_map: Any, mesh: Mesh | None) -> None:
    """Raise InputError for device_map="cpu" where the parameters are placed elsewhere."""
    if not isinstance(device_map, str) or device_map != "cpu":
        return
    platform = (jnp.zeros(()).devices().pop() if mesh is None else mesh.devices.flat[0]).platform
    if platform != "cpu":
        where = "mesh has others" if mesh is not None else f"jax's default device is a {platform}"
        raise InputError(f'load: device_map="cpu" asks for the CPU, and {where}: leave it out, or set JAX_PLATFORMS=cpu')


def _companions(where: str, given: Any) -> dict[str, Path]:
    """The small files of what `companions` names, by name; none of a processor, which writes its own."""
    if given is None or _is_processor(given):
        return {}
    check_kind("companions", given, (str, os.PathLike), "what load was given, or a processor")
    return companion_files(given if os.path.isdir(given) else find_directory(where, given, {}, frozenset())[0])


def _is_processor(given: Any) -> bool:
    return hasattr(given, "tokenizer") and hasattr(given, "save_pretrained")


def _warn_of_missing(directory: Any, files: Mapping[str, Path], companions: Any) -> None:
    """Say that a checkpoint is written without what makes prompts for it."""
    lost = [
        what
        for what, names in (
            ("tokenizer (tokenizer.json)", ("tokenizer.json", "vocab.json")),
            ("processor (preprocessor_config.json)", ("preprocessor_config.json", "processor_config.json")),
        )
        if not files.keys() & set(names)
    ]
    if lost and not _is_processor(companions):
        warnings.warn(
            f"{directory} has no {' and no '.join(lost)}, and without them no prompt can be made for it: pass "
            "companions=SOURCE, what load was given, or companions=processor",
            stacklevel=4,
        )


def _describe(target: Path, model: Any, dtype: Any, files: Mapping[str, Path], companions: Any) -> None:
    """Write the small files of a checkpoint: those of `companions`, and the model's settings of generation in any case."""
    describe(target, model.config, dtype=dtype, companions=files)
    if _is_processor(companions):
        companions.save_pretrained(target)
    settings = getattr(model, "generation_config", None)
    if settings is not None and "generation_config.json" not in files:
        write_json(target / "generation_config.json", settings.said(), sort_keys=True)


def _check_saved(where: str, directory: Any, model: Any, params: Any) -> None:
    """Raise InputError for arguments in another order."""
    call = f"{where}(directory, model, params)"
    check_kind("directory", directory, (str, os.PathLike, StorePath), f"a path: {call}")
    check_kind("model", model, Module, f"the model that load(source) gave: {call}")
    check_kind("params", params, Mapping, f"the parameters that load(source) gave with the model: {call}")


def _leaves(params: Mapping[str, Any]) -> dict[str, Leaf]:
    return {path: ArrayLeaf(path, array) for path, array in flatten_params(params).items()}


@named_arguments
def save(
    directory: str | os.PathLike,
    model: SmolVLMForConditionalGeneration,
    params: Mapping[str, Any],
    *,
    companions: Any = None,
    force: bool = False,
) -> None:
    """Write an orbax directory that `load` reads. The parameters are in memory already, so orbax's own writer serves.

    Args:
        directory: where to, also a URL of an object store; it is written atomically.
        model: whose config is written.
        params: the parameters, a nested dict.
        companions: whose tokenizer, processor and generation files are copied, named as the source of `load`; or a processor,
            which writes its own. Without them a warning says what is missing.
        force: replace an existing checkpoint, which is kept beside it as `NAME_replaced-1`, or with the next free number.

    Raises:
        CheckpointError: the directory exists and `force` is not given, or it cannot be written; it is then as it was.
        InputError: an argument is of another kind than these.
    """
    _check_saved("save", directory, model, params)
    files = _companions("save", companions)
    _warn_of_missing(directory, files, companions)
    import orbax.checkpoint as ocp

    flat = flatten_params(params)
    dtype = widest(_leaves(params).values())
    # of several processes none has all values of an array, and then there are no checksums
    whole = all(getattr(array, "is_fully_addressable", True) for array in flat.values())
    arrays = {path: checksum(array) for path, array in sorted(flat.items())} if whole else None
    with new_directory(place_of(directory), force) as target:
        _describe(target, model, dtype, files, companions)
        try:
            tell_once()
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(target / "params", params)
        except ValueError as error:  # as which tensorstore raises errors of the system
            if disk_full(error):
                raise
            raise StorageError(f"cannot write {directory}: {reason(error)}") from error
        write_manifest(
            target, source=None, layout="full", dtype=dtype.name, **quantization(_leaves(params)), files={}, arrays=arrays
        )


@named_arguments
def save_hf(
    directory: str | os.PathLike,
    model: SmolVLMForConditionalGeneration,
    params: Mapping[str, Any],
    *,
    max_shard_size: str | int = "4GB",
    companions: Any = None,
    force: bool = False,
) -> None:
    """Write a Hugging Face directory, which transformers and `load` read; weights in 8 bits as the numbers they stand for.

    Args:
        directory, model, params: as in `save`.
        max_shard_size: of a safetensors file: "4GB", "500MiB" or a number of bytes.
        companions, force: as in `save`.

    Raises:
        CheckpointError: as `save` does.
        InputError: `max_shard_size` is no size, or an argument is of another kind than these.
    """
    _check_saved("save_hf", directory, model, params)
    files = _companions("save_hf", companions)
    _warn_of_missing(directory, files, companions)
    _write_hf(directory, model, params, files, max_shard_size=max_shard_size, companions=companions, force=force)


# Keywords of `save_hf` and their defaults.
SAVING = {name: one.default for name, one in inspect.signature(save_hf).parameters.items() if one.kind is one.KEYWORD_ONLY}


def write_pretrained(directory: Any, model: Any, params: Mapping[str, Any], **options: Any) -> None:
    """`save_hf` for somebody who writes the companions afterwards, as with transformers: without the warning.

    Args:
        directory, model, params: as in `save`.
        **options: keywords of `save_hf`.
    """
    chosen = SAVING | options
    _write_hf(directory, model, params, _companions("save_pretrained", chosen["companions"]), **chosen)


def _write_hf(
    directory: Any, model: Any, params: Any, files: Mapping[str, Path], *, max_shard_size: Any, companions: Any, force: bool
) -> None:
    limit, leaves = parse_size(max_shard_size), _leaves(params)
    leaves = dequantized_leaves(leaves, place_of(directory)) or leaves
    with new_directory(place_of(directory), force) as target:
        _describe(target, model, widest(leaves.values()), files, companions)
        write_hf(target, leaves, max_shard_bytes=limit)
