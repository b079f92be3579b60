"""What a SOURCE is: a Hugging Face directory, a Hub id, one safetensors file with its config, `pytorch_model*.bin`, or an orbax
checkpoint of ours; opened, matched with its config, and offered as leaves."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..config import SmolVLMConfig
from ..errors import CheckpointError, ConfigError
from ..io import companion_files
from .from_orbax import find_checkpoint, is_orbax, open_orbax
from .leaves import Leaf, TorchLeaf
from .manifest import MANIFEST, read_manifest
from .rules import match_parameters
from .tensors import SafetensorsReader, TensorReader, checked_path, open_tensors

__all__ = ["Source", "open_source"]


@dataclass
class Source:
    """An open checkpoint.

    kind: "hf" or "orbax". config: as config.json has it, except that `tie_word_embeddings` says what the weights say, in a
    checkpoint of the whole model. layout: "full", or "base" for a checkpoint of the base class, whose names lack `model.` and
    which never has a head. leaves: our path -> parameter. files: everything that was read, for checksums, under `root`.
    companions: name -> path of tokenizer, processor and generation files. manifest: of an orbax directory.
    """

    kind: str
    root: Path
    config: SmolVLMConfig
    layout: str
    leaves: dict[str, Leaf]
    files: list[Path]
    companions: dict[str, Path]
    manifest: dict = field(default_factory=dict)
    step: int | None = None
    reader: TensorReader | None = None

    @property
    def model_config(self) -> SmolVLMConfig:
        """The config to build a model from: without a head of its own it is tied."""
        return self.config.replace(tie_word_embeddings="lm_head/kernel" not in self.leaves)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weights; if they have several, the widest."""
        return max({leaf.dtype for leaf in self.leaves.values()}, key=lambda dtype: (dtype.itemsize, dtype.name))

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()


def open_source(path: Path, config_file: Path | None = None) -> Source:
    """Open a local checkpoint: a directory, or one safetensors file whose config.json lies beside it or is given.

    Raises CheckpointError or ConfigError with one message for everything that does not fit.
    """
    try:
        return _open(path, config_file)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _open(path: Path, config_file: Path | None) -> Source:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is a file, and not a safetensors file: pass its directory")
        return _open_torch(path.parent, SafetensorsReader(path.parent, [path]), config_file)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    if is_orbax(path):
        return _open_orbax(path, config_file)
    if config_file is None:
        checked_path(path, "config.json")
    return _open_torch(path, open_tensors(path), config_file)


def _open_torch(directory: Path, tensors: TensorReader, config_file: Path | None) -> Source:
    config_path, config = _read_config(config_file or checked_path(directory, "config.json"))
    base = not any(name.startswith("model.") for name in tensors.shapes)
    tied = "lm_head.weight" not in tensors.shapes
    names = [name.removeprefix("model.") for name in tensors.shapes]
    shapes = {name.removeprefix("model."): shape for name, shape in tensors.shapes.items()}
    position = shapes.get("vision_model.embeddings.position_embedding.weight")
    _check_size(config, names, position, directory, r"text_model\.layers\.(\d+)\.", r"vision_model\.encoder\.layers\.(\d+)\.")
    parameters = _abstract(config.replace(tie_word_embeddings=tied))
    by_path = {match.path: match for match in match_parameters(parameters, tensors.shapes, str(directory))}
    order = {name: number for number, name in enumerate(tensors.shapes)}
    matches = sorted(by_path.values(), key=lambda match: order[match.torch])
    companions = _companions(directory)
    return Source(
        kind="hf",
        root=directory,
        config=config if base else config.replace(tie_word_embeddings=tied),
        layout="base" if base else "full",
        leaves={match.path: TorchLeaf(match, parameters[match.path], tensors) for match in matches},
        files=[*tensors.files, *_index_of(directory, tensors), config_path, *companions.values()],
        companions=companions,
        reader=tensors,
    )


def _index_of(directory: Path, tensors: TensorReader) -> list[Path]:
    return [path for path in sorted(directory.glob("*.index.json")) if len(tensors.files) > 1]


def _open_orbax(directory: Path, config_file: Path | None) -> Source:
    found = find_checkpoint(directory)
    # config.json stands beside the checkpoint, or above it: a training run has one for all its steps
    candidates = [directory, found.item.parent, found.item.parent.parent, found.item.parent.parent.parent]
    homes = [folder for folder in candidates if (folder / "config.json").is_file()]
    if config_file is None and not homes:
        raise CheckpointError(f"{directory} is an orbax checkpoint without a config.json: pass --config FILE")
    home = homes[0] if homes else directory
    config_path, config = _read_config(config_file or checked_path(home, "config.json"))
    leaves = open_orbax(found)
    if any(path.endswith("/lora_a") for path in leaves):
        raise CheckpointError(
            f"{directory} holds the adapters of a training run, not a model: the merged model is in the run's folder model"
        )
    position = leaves.get("model/vision_model/embeddings/position_embedding/embedding")
    names = list(leaves)
    _check_size(
        config,
        names,
        position and position.shape,
        directory,
        r"text_model/layers_(\d+)/",
        r"vision_model/encoder/layers_(\d+)/",
    )
    parameters = _abstract(config.replace(tie_word_embeddings="lm_head/kernel" not in leaves))
    problems = [f"missing   {path} {shape}" for path, shape in parameters.items() if path not in leaves]
    problems += [f"surplus   {path} {leaf.shape}" for path, leaf in leaves.items() if path not in parameters]
    problems += [
        f"misshapen {path}: checkpoint has {leaves[path].shape}, config says {shape}"
        for path, shape in parameters.items()
        if path in leaves and leaves[path].shape != shape
    ]
    if problems:
        raise CheckpointError(
            f"{directory}: {len(problems)} parameters do not fit the config\n  " + "\n  ".join(sorted(problems))
        )
    manifest = read_manifest(home)
    companions = _companions(home)
    stored = sorted(path for path in found.item.rglob("*") if path.is_file())
    described = [config_path, *companions.values()] + ([home / MANIFEST] if manifest else [])
    layout = "base" if manifest.get("layout") == "base" and "lm_head/kernel" not in leaves else "full"
    return Source(
        kind="orbax",
        root=home,
        config=config if layout == "base" else config.replace(tie_word_embeddings="lm_head/kernel" not in leaves),
        layout=layout,
        leaves=dict(leaves),
        files=[*stored, *described],
        companions=companions,
        manifest=manifest,
        step=found.step,
    )


def _read_config(path: Path) -> tuple[Path, SmolVLMConfig]:
    try:
        return path, SmolVLMConfig.from_pretrained(path)
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply for a config.json") from error


def _companions(directory: Path) -> dict[str, Path]:
    return {name: checked_path(directory, name) for name in companion_files(directory)}


def _check_size(config: SmolVLMConfig, names, position, where: Path, text: str, vision: str) -> None:
    """Compare what costs memory or time to build with the file before anything is built: a config.json that claims a billion
    layers is an error, not a hang."""
    for pattern, count, key in (
        (text, config.text_config.num_hidden_layers, "text_config.num_hidden_layers"),
        (vision, config.vision_config.num_hidden_layers, "vision_config.num_hidden_layers"),
    ):
        layers = {found.group(1) for name in names if (found := re.search(pattern, name))}
        if len(layers) != count:
            raise CheckpointError(f"{where}: the weights have {len(layers)} layers, config.json says {key} = {count}")
    if position is not None and position[0] != config.vision_config.num_patches:
        raise CheckpointError(
            f"{where}: the weights have {position[0]} vision positions, config.json says {config.vision_config.num_patches} "
            f"(image_size {config.vision_config.image_size}, patch_size {config.vision_config.patch_size})"
        )


def _abstract(config: SmolVLMConfig) -> dict[str, tuple[int, ...]]:
    from ..model import SmolVLMForConditionalGeneration
    from ..parameters import abstract_params, flatten_params

    try:
        tree = abstract_params(SmolVLMForConditionalGeneration(config))
    except (TypeError, OverflowError, ValueError, MemoryError) as error:
        raise ConfigError(f"config.json describes no model that can be built: {str(error).splitlines()[0]}") from error
    return {path: tuple(leaf.shape) for path, leaf in flatten_params(tree).items()}
