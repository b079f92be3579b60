"""`load()` and `save()`: a bundled name, a Hugging Face directory, a Hub id or an orbax directory <-> (model, params).

An orbax directory of ours holds `params/` (an orbax checkpoint of the parameter tree, which any StandardCheckpointer
restores) beside the same small files a Hugging Face directory has: config.json, generation_config.json, tokenizer and
processor files.
"""

import json
import os
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .config import SmolVLMConfig
from .convert.rules import match_parameters, rearrange, restore, torch_name
from .errors import CheckpointError, MissingExtraError
from .generation_config import GenerationConfig
from .model import SmolVLMForConditionalGeneration
from .parameters import abstract_params, flatten_params, logical_axes, unflatten_params
from .sharding import parameter_shardings

__all__ = ["bundled_models", "default_dtype", "load", "resolve", "save", "save_hf"]

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def bundled_models() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    assets = resources.files("smolvlm_jax") / "assets"
    return sorted(entry.name for entry in assets.iterdir() if (entry / "config.json").is_file()) if assets.is_dir() else []


def resolve(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The local directory that a name stands for: an existing directory, a bundled name, or a Hub id `owner/name`."""
    path = Path(source)
    if path.is_dir():
        return path
    name = str(source)
    if name in bundled_models():
        return Path(str(resources.files("smolvlm_jax") / "assets" / name))
    if path.exists():
        raise CheckpointError(f"{path} is a file: pass the directory that holds it together with its config.json")
    looks_like_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not looks_like_id:
        raise CheckpointError(
            f"no model {name!r}: not a directory, not a bundled name ({', '.join(bundled_models()) or 'none'}), "
            "not a Hub id (owner/name)"
        )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError(f"downloading {name} from the Hub", "hub") from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:
        raise CheckpointError(f"cannot download {name}: {type(error).__name__}: {str(error).splitlines()[0]}") from error


def default_dtype() -> Any:
    """What to compute in: bfloat16 on TPU and GPU, float32 on CPU, whose bf16 matrix products are 5 to 10 times slower."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def load(
    source: str | os.PathLike, dtype=None, mesh: Mesh | None = None, *, revision: str | None = None
) -> tuple[SmolVLMForConditionalGeneration, dict]:
    """Read a checkpoint.

    source: a bundled name ("tiny"), a Hugging Face directory or Hub id, or an orbax directory of ours.
    dtype: what to compute in and store the parameters as. Default: parameters keep the dtype of the file, computation is
    in `default_dtype()`.
    mesh: place each parameter on this mesh as its logical axes say; every host reads only what its devices hold.

    Returns the model (a hashable description, safe as a jit static) and its parameters, a nested dict of jax arrays.
    Raises CheckpointError with one list of all missing, surplus and misshapen tensors.
    """
    directory = resolve(source, revision)
    config = SmolVLMConfig.from_pretrained(directory)
    compute = default_dtype() if dtype is None else dtype
    if (directory / "params").is_dir():
        model = SmolVLMForConditionalGeneration(config, dtype=compute)
        return model, _load_orbax(directory / "params", model, dtype, mesh)
    files = _Tensors(directory)
    # Whether the head is tied is a fact of the file: config.json has contradicted itself across transformers versions.
    config = config.replace(tie_word_embeddings="lm_head.weight" not in files.shapes)
    model = SmolVLMForConditionalGeneration(config, dtype=compute)
    return model, _load_tensors(files, model, dtype, mesh)


class _Tensors:
    """The tensors of one or several safetensors files, read one slice at a time."""

    def __init__(self, directory: Path):
        from safetensors import SafetensorError, safe_open

        self.directory = directory
        index = directory / "model.safetensors.index.json"
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{index} is not a safetensors index: {error}") from error
        else:
            names = sorted(p.name for p in directory.glob("*.safetensors"))
        if not names:
            raise CheckpointError(f"{directory} has neither *.safetensors nor an orbax params/ directory")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.handles: dict[str, Any] = {}
        for name in names:
            path = directory / name
            if Path(name).name != name:
                raise CheckpointError(f"{index} names a file outside its directory: {name}")
            try:
                handle = safe_open(path, framework="numpy")
                for key in handle.keys():  # noqa: SIM118
                    if key in self.handles:
                        raise CheckpointError(f"tensor {key} stands in more than one file of {directory}")
                    self.handles[key] = handle
                    self.shapes[key] = tuple(handle.get_slice(key).get_shape())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot read {path}: {error}") from error

    def read(self, name: str) -> np.ndarray:
        return self.handles[name].get_tensor(name)


def _load_tensors(files: _Tensors, model, dtype, mesh: Mesh | None) -> dict:
    abstract = abstract_params(model)
    flat = flatten_params(abstract)
    matches = match_parameters({k: v.shape for k, v in flat.items()}, files.shapes, str(files.directory))
    shardings = {} if mesh is None else flatten_params(parameter_shardings(abstract, logical_axes(model), mesh))
    params = {}
    for match in matches:
        array = rearrange(files.read(match.torch), match.pattern, flat[match.path].shape)
        array = array if dtype is None else array.astype(dtype)
        if mesh is None:
            params[match.path] = jnp.asarray(array)
        else:
            params[match.path] = jax.make_array_from_callback(array.shape, shardings[match.path], array.__getitem__)
    return unflatten_params(params)


def _load_orbax(path: Path, model, dtype, mesh: Mesh | None) -> dict:
    import orbax.checkpoint as ocp

    abstract = abstract_params(model)
    checkpointer = ocp.StandardCheckpointer()
    try:
        saved = flatten_params(checkpointer.metadata(path.absolute()).item_metadata.tree)
        expected = flatten_params(abstract)
        problems = [f"missing   {k} {v.shape}" for k, v in expected.items() if k not in saved]
        problems += [f"surplus   {k} {tuple(v.shape)}" for k, v in saved.items() if k not in expected]
        problems += [
            f"misshapen {k}: checkpoint has {tuple(saved[k].shape)}, config says {v.shape}"
            for k, v in expected.items()
            if k in saved and tuple(saved[k].shape) != v.shape
        ]
        if problems:
            raise CheckpointError(f"{path}: {len(problems)} parameters do not fit the config\n  " + "\n  ".join(problems))
        if mesh is None:
            shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
        else:
            shardings = parameter_shardings(abstract, logical_axes(model), mesh)
        dtypes = unflatten_params({k: jnp.dtype(saved[k].dtype) if dtype is None else dtype for k in expected})
        target = jax.tree.map(
            lambda leaf, kind, sharding: jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding),
            abstract,
            dtypes,
            shardings,
        )
        return checkpointer.restore(path.absolute(), target)
    finally:
        checkpointer.close()


def _write_whole(destination: Path, fill: Callable[[Path], None], force: bool) -> None:
    """Fill a temporary directory beside the destination, then rename: the destination is absent or whole."""
    destination = destination.absolute()
    if destination.exists() and not force:
        raise CheckpointError(f"{destination} exists: choose another name, or pass force=True to replace it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.part-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        if destination.exists():
            old = destination.with_name(f".{destination.name}.old-{os.getpid()}")
            destination.rename(old)
            temporary.rename(destination)
            shutil.rmtree(old)
        else:
            temporary.rename(destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _carry(companions: str | os.PathLike | None, target: Path) -> None:
    """Copy tokenizer, processor and generation files from another checkpoint directory."""
    for name in COMPANIONS if companions is not None else ():
        source = Path(companions) / name
        if source.is_file():
            shutil.copyfile(source, target / name)


def save(
    directory: str | os.PathLike, model, params, *, companions: str | os.PathLike | None = None, force: bool = False
) -> None:
    """Write an orbax directory that `load` reads. `companions`: a directory whose tokenizer and processor files to carry."""
    import orbax.checkpoint as ocp

    def fill(target: Path) -> None:
        model.config.save_pretrained(target)
        _carry(companions, target)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target / "params", params)

    _write_whole(Path(directory), fill, force)


def save_hf(
    directory: str | os.PathLike, model, params, *, companions: str | os.PathLike | None = None, force: bool = False
) -> None:
    """Write a Hugging Face directory with one safetensors file, which transformers and `load` read."""
    from safetensors.numpy import save_file

    def fill(target: Path) -> None:
        tensors = {}
        for path, leaf in flatten_params(params).items():
            name, pattern = torch_name(path)
            tensors[name] = np.ascontiguousarray(restore(np.asarray(leaf), pattern))
        dtype = max({str(t.dtype) for t in tensors.values()})
        model.config.replace(dtype=dtype).save_pretrained(target)
        _carry(companions, target)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    _write_whole(Path(directory), fill, force)


def generation_config(source: str | os.PathLike) -> GenerationConfig:
    """The generation defaults that came with a checkpoint."""
    return GenerationConfig.from_pretrained(resolve(source))
