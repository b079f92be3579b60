"""An open checkpoint: found, matched with its config, and offered as leaves.

It is a Hugging Face directory (safetensors or `pytorch_model*.bin`), one safetensors file with its config, or an orbax
checkpoint of ours, of a model or of a training run.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import SmolVLMConfig
from ..errors import CheckpointError, ConfigError
from ..io import companion_files
from ..locate import resolve_file
from .from_orbax import Found, find_checkpoint, open_orbax
from .leaves import Leaf, TorchLeaf, widest
from .manifest import MANIFEST, read_manifest
from .readers import TensorReader, checked_path
from .rules import check_shapes, match_parameters
from .safetensors_file import SafetensorsReader
from .tensors import open_tensors

__all__ = ["Checkpoint", "open_checkpoint", "parameter_shapes"]


@dataclass(kw_only=True)
class Checkpoint:
    """An open checkpoint; a context manager that closes it.

    Attributes:
        kind: "hf" or "orbax".
        path: the local directory or file that was opened.
        root: the directory with its config.json and companions.
        config: as config.json has it, except that `tie_word_embeddings` says what the weights say, in a checkpoint of the
            whole model.
        layout: "full", or "base" for a checkpoint of the base class, whose names lack `model.` and which has no head.
        leaves: our path -> parameter.
        files: everything that is read, for checksums.
        companions: tokenizer, processor and generation files by name.
        step: of a training run.
        reader: of a PyTorch checkpoint.
        name, revision: what `open_checkpoint` was asked for.
    """

    kind: str
    path: Path
    root: Path
    config: SmolVLMConfig
    layout: str
    leaves: Mapping[str, Leaf]
    files: list[Path]
    companions: dict[str, Path]
    step: int | None = None
    reader: TensorReader | None = None
    name: str = ""
    revision: str | None = None

    @property
    def model_config(self) -> SmolVLMConfig:
        """The config to build a model from: without a head of its own it is tied."""
        return self.config.replace(tie_word_embeddings="lm_head/kernel" not in self.leaves)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weights; the widest if they have several."""
        return widest(self.leaves.values())

    @property
    def commit(self) -> str | None:
        """The commit of a snapshot in the Hub's cache, whose folder is named so."""
        return self.path.name if self.path.parent.name == "snapshots" else None

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_checkpoint(
    source: str | os.PathLike, *, revision: str | None = None, config_file: str | os.PathLike | None = None
) -> Checkpoint:
    """Open a checkpoint.

    Args:
        source: a directory, the name of a bundled checkpoint, a Hub id, or a safetensors file.
        revision: branch, tag or commit of a Hub id.
        config_file: the config.json, if it is not beside the weights.

    Raises:
        CheckpointError, ConfigError: one message for everything that does not fit.
    """
    path = resolve_file(source, revision)
    try:
        opened = _open(path, None if config_file is None else Path(config_file))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    opened.name, opened.revision = str(source), revision
    return opened


def _open(path: Path, config_file: Path | None) -> Checkpoint:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is a file, and not a safetensors file: pass its directory")
        return _open_torch(path, path.parent, SafetensorsReader([path]), config_file)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    found = find_checkpoint(path)
    if found is not None:
        return _open_orbax(path, found, config_file)
    if config_file is None:
        checked_path(path, "config.json")
    return _open_torch(path, path, open_tensors(path), config_file)


def _open_torch(path: Path, directory: Path, tensors: TensorReader, config_file: Path | None) -> Checkpoint:
    config_path = config_file or checked_path(directory, "config.json")
    config = _read_config(config_path)
    _check_size(config, tensors.shapes, directory)
    base = not any(name.startswith("model.") for name in tensors.shapes)
    tied = "lm_head.weight" not in tensors.shapes
    parameters = parameter_shapes(config.replace(tie_word_embeddings=tied))
    by_tensor = {match.torch: match for match in match_parameters(parameters, tensors.shapes, str(directory))}
    matches = [by_tensor[name] for name in tensors.shapes]
    companions = _companions(directory)
    indices = sorted(directory.glob("*.index.json")) if len(tensors.files) > 1 else []
    return Checkpoint(
        kind="hf",
        path=path,
        root=directory,
        config=config if base else config.replace(tie_word_embeddings=tied),
        layout="base" if base else "full",
        leaves={match.path: TorchLeaf(match, parameters[match.path], tensors) for match in matches},
        files=[*tensors.files, *indices, config_path, *companions.values()],
        companions=companions,
        reader=tensors,
    )


def _open_orbax(directory: Path, found: Found, config_file: Path | None) -> Checkpoint:
    # config.json is beside the checkpoint, or above it: a training run has one for all its steps
    candidates = [directory, *list(found.item.parents)[:3]]
    root = next((folder for folder in candidates if (folder / "config.json").is_file()), None)
    if config_file is None and root is None:
        raise CheckpointError(f"{directory} is an orbax checkpoint without a config.json: pass --config FILE")
    root = root or directory
    config_path = config_file or checked_path(root, "config.json")
    config = _read_config(config_path)
    leaves = open_orbax(found)
    if any(path.endswith("/lora_a") for path in leaves):
        raise CheckpointError(
            f"{directory} holds the adapters of a training run, not a model: the merged model is in the run's folder model"
        )
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    _check_size(config, shapes, directory)
    tied = "lm_head/kernel" not in leaves
    check_shapes(parameter_shapes(config.replace(tie_word_embeddings=tied)), shapes, str(directory))
    manifest = read_manifest(root)
    companions = _companions(root)
    stored = sorted(path for path in found.item.rglob("*") if path.is_file())
    described = [config_path, *companions.values()] + ([root / MANIFEST] if manifest else [])
    layout = "base" if manifest.get("layout") == "base" and tied else "full"
    return Checkpoint(
        kind="orbax",
        path=directory,
        root=root,
        config=config if layout == "base" else config.replace(tie_word_embeddings=tied),
        layout=layout,
        leaves=leaves,
        files=[*stored, *described],
        companions=companions,
        step=found.step,
    )


def _read_config(path: Path) -> SmolVLMConfig:
    try:
        return SmolVLMConfig.from_pretrained(path)
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply for a config.json") from error


def _companions(directory: Path) -> dict[str, Path]:
    return {name: checked_path(directory, name) for name in companion_files(directory)}


# Names of layers and of the position embedding, as PyTorch checkpoints and ours spell them.
_TEXT_LAYER = re.compile(r"text_model[./]layers[._](\d+)[./]")
_VISION_LAYER = re.compile(r"vision_model[./]encoder[./]layers[._](\d+)[./]")
_POSITIONS = re.compile(r"vision_model[./]embeddings[./]position_embedding[./]")


def _check_size(config: SmolVLMConfig, shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Compare the numbers of layers and positions before anything is built: a config.json that claims a billion layers is an
    error and not a hang."""
    for pattern, count, key in (
        (_TEXT_LAYER, config.text_config.num_hidden_layers, "text_config.num_hidden_layers"),
        (_VISION_LAYER, config.vision_config.num_hidden_layers, "vision_config.num_hidden_layers"),
    ):
        layers = {found.group(1) for name in shapes if (found := pattern.search(name))}
        if len(layers) != count:
            raise CheckpointError(f"{where}: the weights have {len(layers)} layers, config.json says {key} = {count}")
    vision = config.vision_config
    for name, shape in shapes.items():
        if _POSITIONS.search(name) and shape and shape[0] != vision.num_patches:
            raise CheckpointError(
                f"{where}: the weights have {shape[0]} vision positions, config.json says {vision.num_patches} "
                f"(image_size {vision.image_size}, patch_size {vision.patch_size})"
            )


def parameter_shapes(config: SmolVLMConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters of a model. Raises ConfigError if no such model can be built."""
    from ..model import SmolVLMForConditionalGeneration
    from ..parameters import abstract_params, flatten_params

    try:
        tree = abstract_params(SmolVLMForConditionalGeneration(config))
    except (TypeError, OverflowError, ValueError, MemoryError) as error:
        raise ConfigError(f"config.json describes no model that can be built: {str(error).splitlines()[0]}") from error
    return {path: tuple(leaf.shape) for path, leaf in flatten_params(tree).items()}
