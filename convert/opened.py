"""An open checkpoint: found, matched with its config, and offered as leaves.

It is a Hugging Face directory (safetensors or `pytorch_model*.bin`), one safetensors file with its config, an orbax checkpoint
of ours, of a model or of a training run, or a PEFT adapter, which is merged into its base.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..config import SmolVLMConfig
from ..errors import ChangedError, CheckpointError, ConfigError, InputError, MissingFileError, SmolVLMError, first_few
from ..io import COMPANIONS, Identity, companion_files
from ..locate import is_hub_id, left_model, resolve_file, small_files
from ..storage import StorePath, place
from ..stored_models import stored_file
from .adapters import Adapter, is_part, open_adapter
from .arrays import Digests, mismatches
from .family_names import check_frequencies, from_unit_pixels, left_out, names_of
from .file_sums import damaged_files
from .from_orbax import Found, OrbaxLeaf, find_checkpoint, open_orbax
from .leaves import Leaf, TorchLeaf, widest
from .manifest import MANIFEST, read_manifest, stored_digests
from .quantized import dequantized_leaves
from .readers import TensorReader, checked_path
from .rules import Names, check_shapes, match_parameters
from .safetensors_file import SafetensorsReader
from .tensors import check_whole, open_tensors

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
        readers: of PyTorch files.
        item: the directory of an orbax checkpoint's tree.
        digests: checksums of the parameters, as the manifest of an orbax directory has them; None if it has none.
        stored: what `digests` are of, if not `leaves`: the base of an adapter, weights in 8 bits.
        quantized: the leaves as they are stored, with scales, where weights are in 8 bits; `leaves` are what they stand for.
        states: of the files, from before they were read.
        notes: what is not read, in words.
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
    readers: tuple[TensorReader, ...] = ()
    item: Path | None = None
    digests: Digests | None = None
    stored: Mapping[str, Leaf] | None = None
    quantized: Mapping[str, Leaf] | None = None
    states: dict[Path, Identity] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
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

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Around everything that is read.

        Raises:
            ChangedError: at the end, or in place of another error: a file is no longer the one that was opened, or was
                written to since.
        """
        try:
            yield
        except Exception:
            self._check_unchanged()
            raise
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        for path, state in self.states.items():
            if _states([path]).get(path) != state:
                raise ChangedError(f"{path} changed while it was read: nothing of it is used. Try again when it is complete")

    def damage(self, progress: Callable[[int], object] = lambda count: None) -> list[str] | None:
        """Read everything, and compare it with the checksums of the manifest, or of a training run's step.

        Returns:
            A line for each array, or file, that is not what was written; None if there are no checksums.
        """
        if self.item is None:
            return None
        if self.digests is None:
            return damaged_files(self.item.parent)
        leaves = self.stored or self.leaves
        lines = [f"{path} is missing, which {MANIFEST} has" for path in self.digests if path not in leaves]
        for path in mismatches(leaves, self.digests, progress):
            leaf = leaves[path]
            files = leaf.files() if isinstance(leaf, OrbaxLeaf) else []
            where = f" ({', '.join(first_few(files, 3))})" if files else ""
            lines.append(f"{path} is not what {MANIFEST} says{where}")
        return lines

    def check_arrays(self) -> bool:
        """Read everything, and raise CheckpointError if it is not what its checksums say.

        Returns:
            False if there are no checksums, so that nothing could be checked.
        """
        damage = self.damage()
        if damage:
            raise CheckpointError(f"{self.path} is damaged: " + "; ".join(first_few(damage)))
        return damage is not None

    def close(self) -> None:
        for reader in self.readers:
            reader.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_checkpoint(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    config_file: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
) -> Checkpoint:
    """Open a checkpoint.

    Args:
        source: a directory, the name of a bundled checkpoint, a Hub id, or a safetensors file.
        revision: branch, tag or commit of a Hub id.
        config_file: the config.json, if it is not beside the weights.
        base: the model that a PEFT adapter is merged into, named as `source` is; default: the one its config names.

    Raises:
        CheckpointError, ConfigError: one message for everything that does not fit.
    """
    path = resolve_file(source, revision)
    config = None if config_file is None else place(config_file)
    config = stored_file(config) if isinstance(config, StorePath) else config
    if config is not None and not config.is_file():
        raise MissingFileError(f"no file {config}: --config (config=…) names a config.json")
    try:
        opened = _open(path, config, base)
    except SmolVLMError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    opened.name, opened.revision = str(source), revision
    return opened


def _states(paths: Iterable[Path]) -> dict[Path, Identity]:
    """The files among some paths, as they are now."""
    found = {}
    for path in paths:
        with suppress(OSError):
            found[path] = Identity.of(path)
    return found


def _open(path: Path, config_file: Path | None, base: str | os.PathLike | None) -> Checkpoint:
    # of everything that may turn out to be a part of it, before any of it is read
    around = path.iterdir() if path.is_dir() else [path, *(path.parent / name for name in ("config.json", *COMPANIONS))]
    before = _states([*around, *([config_file] if config_file else [])])
    opened = _open_any(path, config_file, base)
    used = {file: before[file] for file in opened.files if file in before}
    opened.states = {**_states(opened.files), **used, **opened.states}
    return opened


def _open_any(path: Path, config_file: Path | None, base: str | os.PathLike | None) -> Checkpoint:
    adapter = open_adapter(path) if path.is_dir() else None
    if adapter is not None:
        return _open_adapted(adapter, base, config_file)
    if base is not None:
        raise InputError(f"{path} is no PEFT adapter: only an adapter is merged into a base")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is a file, and not a safetensors file: pass its directory")
        check_whole(path)
        return _open_torch(path, path.parent, SafetensorsReader([path]), config_file)
    if not path.is_dir():
        raise MissingFileError(f"{path} does not exist")
    found = find_checkpoint(path)
    if found is not None:
        return _open_orbax(path, found, config_file)
    if (model := left_model(path)) is not None:
        return _open_any(model, config_file, None)
    if config_file is None:
        checked_path(path, "config.json")
    return _open_torch(path, path, open_tensors(path), config_file)


def _open_torch(path: Path, directory: Path, tensors: TensorReader, config_file: Path | None) -> Checkpoint:
    try:
        return _match_torch(path, directory, tensors, config_file)
    except BaseException:
        tensors.close()
        raise


def _match_torch(path: Path, directory: Path, tensors: TensorReader, config_file: Path | None) -> Checkpoint:
    if any(is_part(name) for name in tensors.shapes):
        raise CheckpointError(
            f"{directory} holds adapters that are not merged: save the adapter by itself (PEFT's save_pretrained), or the "
            "model after merge_and_unload()"
        )
    config_path = config_file or checked_path(directory, "config.json")
    root, found = small_files(directory, config_path)
    names = names_of(None if found is None else found.family, tensors.shapes)
    stated = _read_config(config_path if found is None else root / "config.json")
    config = _as_stored(stated, names, tensors.shapes)
    _check_size(config, tensors.shapes, directory)
    base = names is None and not any(name.startswith("model.") for name in tensors.shapes)
    parameters = parameter_shapes(config)
    matches = match_parameters(parameters, tensors.shapes, str(directory), names)
    order = {name: place for place, name in enumerate(tensors.shapes)}
    matches.sort(key=lambda match: order[match.torch])
    leaves: dict[str, Leaf] = {match.path: TorchLeaf(match, parameters[match.path], tensors) for match in matches}
    notes = [f"{directory} also holds {what}, which is left out" for what in left_out(names, tensors.shapes)]
    if found is not None and found.family == "nanovlm":
        check_frequencies(tensors, config.text_config, directory)
        leaves, notes = from_unit_pixels(leaves), []
    if found is not None and found.missing:
        notes.append(f"there will be no tokenizer: {found.missing}")
    companions = _companions(root)
    indices = sorted(directory.glob("*.index.json")) if len(tensors.files) > 1 else []
    return Checkpoint(
        kind="hf",
        path=path,
        root=root,
        config=stated if base else config,
        layout="base" if base else "full",
        leaves=leaves,
        files=[*tensors.files, *indices, config_path, *companions.values()],
        companions=companions,
        readers=(tensors,),
        notes=tuple(notes),
    )


def _as_stored(config: SmolVLMConfig, names: Names | None, shapes: Mapping[str, tuple[int, ...]]) -> SmolVLMConfig:
    """A config with what the weights say better: whether the head is tied, the width of a retrieval model's vectors, and how
    many layers a policy has kept of its VLM."""
    named = lambda path: (names or Names()).match(path).torch
    tied = named("lm_head/kernel") not in shapes or named("lm_head/kernel") == named("model/text_model/embed_tokens/embedding")
    projection = shapes.get(named("linear/kernel"))
    if names is not None and names.prefix:
        kept = len({found.group(1) for name in shapes if name.startswith(names.prefix) and (found := _TEXT_LAYER.search(name))})
        text = config.text_config
        config = config.replace(text_config=text.replace(num_hidden_layers=min(text.num_hidden_layers, max(kept, 1))))
    return config.replace(tie_word_embeddings=tied, embedding_dim=projection[0] if projection else None)


def _open_orbax(directory: Path, found: Found, config_file: Path | None) -> Checkpoint:
    # config.json is beside the checkpoint, or above it: a training run has one for all its steps
    candidates = [directory, *list(found.item.parents)[:3]]
    root = next((folder for folder in candidates if (folder / "config.json").is_file()), None)
    if config_file is None and root is None:
        raise CheckpointError(f"{directory} is an orbax checkpoint without a config.json: pass --config FILE")
    root = root or directory
    config_path = config_file or checked_path(root, "config.json")
    config = _read_config(config_path)
    stored = sorted(path for path in found.item.rglob("*") if path.is_file())
    states = _states(stored)
    arrays: dict[str, Leaf] = dict(open_orbax(found))
    if any(path.endswith("/lora_a") for path in arrays):
        merged = directory / "model"
        made = max((file.stat().st_mtime for file in merged.glob("*.safetensors")), default=0)
        if config_file is None and made >= found.item.stat().st_mtime:
            return _open_any(merged, None, None)  # a run with adapters that has ended stands for its model
        raise CheckpointError(
            f"{directory} holds the adapters of a training run, not a model: the merged model is in the run's folder model"
        )
    plain = dequantized_leaves(arrays, directory)
    leaves, quantized = (arrays, None) if plain is None else (plain, arrays)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    _check_size(config, shapes, directory)
    tied = "lm_head/kernel" not in leaves
    width = shapes.get("linear/kernel", (0, None))[-1]
    check_shapes(parameter_shapes(config.replace(tie_word_embeddings=tied, embedding_dim=width)), shapes, str(directory))
    manifest = read_manifest(root)
    companions = _companions(root)
    described = [config_path, *companions.values()] + ([root / MANIFEST] if manifest else [])
    layout = "base" if manifest.get("layout") == "base" and tied else "full"
    return Checkpoint(
        kind="orbax",
        path=directory,
        root=root,
        config=config if layout == "base" else config.replace(tie_word_embeddings=tied, embedding_dim=width),
        layout=layout,
        leaves=leaves,
        files=[*stored, *described],
        companions=companions,
        step=found.step,
        item=found.item,
        digests=stored_digests(root / MANIFEST, manifest),
        stored=quantized,
        quantized=quantized,
        states=states,
    )


def _open_adapted(adapter: Adapter, base: str | os.PathLike | None, config_file: Path | None) -> Checkpoint:
    """An adapter in its base, which may be any checkpoint that can be opened."""
    try:
        name, revision = (base, None) if base is not None else (adapter.base, adapter.revision)
        if name is None:
            raise CheckpointError(f"{adapter.path} is a PEFT adapter that names no base: say which, with --base (base=…)")
        if Path(name).resolve() == adapter.path.resolve():
            raise CheckpointError(
                f"{adapter.path} is a PEFT adapter that names itself as its base: say which, with --base (base=…)"
            )
        try:
            under = open_checkpoint(name, revision=revision if is_hub_id(name) else None, config_file=config_file)
        except (SmolVLMError, RecursionError) as error:
            raise CheckpointError(
                f"{adapter.path} is a PEFT adapter, and its base {name} cannot be opened: name the base with "
                f"--base (base=…) ({error})"
            ) from error
        try:
            leaves = adapter.merged(under.leaves)
        except BaseException:
            under.close()
            raise
    except BaseException:
        adapter.reader.close()
        raise
    companions = {**under.companions, **_companions(adapter.path)}
    replaced = set(under.companions.values()) - set(companions.values())
    return replace(
        under,
        path=adapter.path,
        leaves=leaves,
        files=[*adapter.files, *(file for file in under.files if file not in replaced), *_companions(adapter.path).values()],
        companions=companions,
        readers=(*under.readers, adapter.reader),
        stored=under.stored or under.leaves,
        quantized=None,
    )


def _read_config(path: Path) -> SmolVLMConfig:
    try:
        return SmolVLMConfig.from_pretrained(path)
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply for a config.json") from error


def _companions(directory: Path) -> dict[str, Path]:
    return {name: checked_path(directory, name) for name in companion_files(directory)}


# Names of layers and of the position embedding, as PyTorch checkpoints and ours spell them.
_TEXT_LAYER = re.compile(r"(?:text_model[./]layers[._]|^decoder\.blocks\.)(\d+)[./]")
_VISION_LAYER = re.compile(r"(?:vision_model[./]encoder[./]layers[._]|^vision_encoder\.blocks\.)(\d+)[./]")
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
    from ..parameters import abstract_params, flatten_params
    from ..retrieval_model import model_of

    try:
        tree = abstract_params(model_of(config))
    except (TypeError, OverflowError, ValueError, MemoryError) as error:
        raise ConfigError(f"config.json describes no model that can be built: {str(error).splitlines()[0]}") from error
    return {path: tuple(leaf.shape) for path, leaf in flatten_params(tree).items()}
