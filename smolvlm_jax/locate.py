"""What the name of a model stands for: a directory, a bundled checkpoint or a Hub id -> a local path. Imports no jax.

A PEFT adapter is a directory of weights without the config.json of a model: everything else that a model needs is taken
from its base.
"""

import atexit
import difflib
import functools
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import CheckpointError, DownloadError, InputError, MissingFileError, import_extra
from .families import Translation, translated
from .habits import Neutral, unasked
from .io import companion_files, copy_companions, read_json
from .storage import StorePath, is_store, place
from .stored_models import stored_model

__all__ = [
    "ADAPTER",
    "HUB_IDS",
    "LOADING",
    "adapted",
    "bundled_models",
    "find_directory",
    "is_hub_id",
    "named_base",
    "portable_name",
]
__all__ += ["left_model", "resolve", "resolve_file", "small_files", "stack"]

ADAPTER = "adapter_config.json"

# The published checkpoints whose sizes are known here.
HUB_IDS = (
    "HuggingFaceTB/SmolVLM-256M-Instruct",
    "HuggingFaceTB/SmolVLM-500M-Instruct",
    "HuggingFaceTB/SmolVLM-Instruct",
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "ibm-granite/granite-docling-258M",
    "HuggingFaceM4/Idefics3-8B-Llama3",
)

_ASSETS = resources.files("smolvlm_jax") / "assets"
# What is downloaded: no code, and pickled weights only where there are no others.
_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "params/*")
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")
_SMALL = ("*.json", "*.txt", "*.jinja")
# Keywords of every `from_pretrained`: where the files are, and those of transformers that ask for nothing here.
_PLACE = ("revision", "subfolder", "cache_dir", "force_download", "local_files_only", "token")
LOADING: dict[str, Neutral] = {
    "trust_remote_code": Neutral((True, False)),  # there is no code in a checkpoint that would be run
    "use_fast": Neutral((True, False)),
    "backend": Neutral(("pil", "torchvision", "tokenizers", "auto")),
    "code_revision": Neutral(("main",)),
    "proxies": Neutral(({},), "set the environment variables HTTPS_PROXY and HTTP_PROXY"),
    "resume_download": Neutral((True, False)),
    "use_auth_token": Neutral((False,), "it is called token"),
    "return_unused_kwargs": Neutral((False,)),
    "gguf_file": Neutral((), "convert the file to safetensors first"),
}
# Nothing in the local cache, and no answer of the Hub.
_NOT_CACHED = ("LocalEntryNotFoundError", "OfflineModeIsEnabled")
# Answers of the Hub that do not change with time; anything else is trouble of the network or the server.
_FINAL = ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "DisabledRepoError", "HFValidationError")


def bundled_models() -> list[str]:
    """Which checkpoints the package brings.

    Returns:
        Their names, in order.
    """
    return sorted(entry.name for entry in _ASSETS.iterdir() if (entry / "config.json").is_file()) if _ASSETS.is_dir() else []


def find_directory(
    where: str, source: str | os.PathLike, keywords: Mapping[str, Any], known: Mapping[str, Any] | frozenset[str]
) -> tuple[Path, dict[str, Any]]:
    """What a `from_pretrained` of small files (config, tokenizer, processors) is given, found and checked.

    Args:
        where: the function, for messages.
        source: as `resolve` takes it; also the path of one of the files, or of a safetensors file beside them.
        keywords: of the call: where the files are (revision, subfolder and the keywords of the Hub's cache), those of
            transformers that ask for nothing, and the function's own.
        known: the function's own.

    Returns:
        The directory or file, and the function's own keywords.

    Raises:
        InputError: an unknown keyword.
        CheckpointError: as `resolve_file` raises it.
    """
    own = unasked(where, keywords, LOADING, {*known, *_PLACE})
    place = {name: own.pop(name) for name in _PLACE if name in own}
    path = resolve_file(source, small=True, **place)
    path = path.parent if path.is_file() and path.suffix == ".safetensors" else left_model(path) or path
    if path.is_file():
        directory, found = small_files(path.parent, path) if path.name == "config.json" else (path, None)
        return (path if found is None else directory), own
    return small_files(path)[0], own


def resolve(
    source: str | os.PathLike, revision: str | None = None, *, base: str | os.PathLike | None = None, **place: Any
) -> Path:
    """The local directory that the name of a model stands for.

    Args:
        source: an existing directory, the name of a bundled checkpoint, a Hub id `owner/name`, which is downloaded unless
            the local cache has it, or a URL of an object store, which is copied for as long as this process lives. For a PEFT
            adapter the directory is that of its base. If the adapter brings tokenizer or processor files, or a
            checkpoint spells its files otherwise than we do (see `families`), it is a temporary one without weights,
            removed when this process ends.
        revision: branch, tag or commit of a Hub id.
        base: the model that an adapter belongs to; default: the one its config names.
        **place: as in `resolve_file`.

    Returns:
        The directory.

    Raises:
        MissingFileError: it is none of these.
        CheckpointError: it is a file or a training run, its base cannot be found, or it cannot be downloaded.
        InputError: a revision of what is no Hub id, or `base` is given, and it is no adapter.
        MissingExtraError: it is a Hub id, and huggingface_hub is not installed.
    """
    *adapters, path = stack(source, revision, base=base, **place)
    if path.is_file():
        raise CheckpointError(f"{path} is a file: pass the directory that holds it together with its config.json")
    if (path / "run.json").is_file() and (path / "checkpoints").is_dir():
        model = path / "model"
        if not model.is_dir():
            raise CheckpointError(
                f"{path} is a training run, which has no processor: {model} is its model once it has ended (export: true)"
            )
        path = model
    path = left_model(path) or path
    directory, found = small_files(path)
    if found is not None and found.missing:
        raise CheckpointError(found.missing)
    brought: dict[str, Path] = {}
    for adapter in reversed(adapters):
        brought |= companion_files(adapter)
    if not brought:
        return directory
    config = directory / "config.json"
    own = {"config.json": config} if config.is_file() else {}
    overlaid = _temporary()
    copy_companions({**own, **companion_files(directory), **brought}, overlaid)
    return overlaid


def left_model(path: Path) -> Path | None:
    """The exported model of a training run whose checkpoints have been removed, which is all that is left of it; else None."""
    model, steps = path / "model", path / "checkpoints"
    if not (path / "run.json").is_file() or not (model / "config.json").is_file() or any(path.glob("*.safetensors")):
        return None
    return None if steps.is_dir() and any(steps.iterdir()) else model


def small_files(path: Path, config: Path | None = None) -> tuple[Path, Translation | None]:
    """Where config.json, tokenizer and processor files of a checkpoint are found in our spelling.

    Args:
        path: directory of the checkpoint.
        config: its config.json, if that is not in the directory.

    Returns:
        The directory itself and None; or for a checkpoint of another family a temporary directory, removed when this process
        ends, and what was translated.
    """
    found = translated(path, functools.partial(resolve_file, small=True), config)
    if found is None:
        return path, None
    directory = _temporary()
    found.write(directory)
    return directory, found


def stack(
    source: str | os.PathLike, revision: str | None = None, *, base: str | os.PathLike | None = None, **place: Any
) -> list[Path]:
    """The directories that a model is read from: its own alone, or an adapter's and then its base's, likewise.

    Arguments and errors are those of `resolve`.
    """
    paths = [resolve_file(source, revision, **place)]
    if base is not None and not (paths[0] / ADAPTER).is_file():
        raise InputError(f"{paths[0]} is no PEFT adapter: only an adapter is merged into a base")
    while (paths[-1] / ADAPTER).is_file():
        adapter = paths[-1]
        name, revision = (base, None) if base is not None else named_base(adapter / ADAPTER, read_json(adapter / ADAPTER))
        base = None
        if name is None:
            raise CheckpointError(f"{adapter} is a PEFT adapter that names no base: say which, with --base (base=…)")
        try:
            path = resolve_file(name, revision if is_hub_id(name) else None)
        except CheckpointError as error:
            raise type(error)(
                f"{adapter} is a PEFT adapter, and its base {name} cannot be opened: name the base with --base (base=…) "
                f"({error})"
            ) from error
        if path.resolve() in [known.resolve() for known in paths]:
            raise CheckpointError(f"{adapter} is a PEFT adapter that names itself as its base: say which, with --base (base=…)")
        paths.append(path)
    return paths


def named_base(path: Path, settings: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The base that an adapter's config names, and its revision.

    Args:
        path: of the config, for the message.
        settings: what it holds.

    Raises:
        CheckpointError: for a value that is no name.
    """
    for key in ("base_model_name_or_path", "revision"):
        name = settings.get(key)
        if name is not None and not (isinstance(name, str) and name.isprintable() and len(name) < 4096):
            raise CheckpointError(f"{path}: {key} = {settings[key]!r:.80} is not a name")
    return settings.get("base_model_name_or_path") or None, settings.get("revision") or None


def adapted(
    model: str | os.PathLike | None, adapter: str | os.PathLike | None = None, base: str | os.PathLike | None = None
) -> tuple[str | os.PathLike, str | os.PathLike | None]:
    """A model, or None for the one that the adapter names, and perhaps an adapter, as the `source` and `base` to open both by.

    Raises:
        InputError: `adapter` is no adapter, or the base is named twice.
    """
    if adapter is None:
        if model is None:
            raise InputError("neither a model nor an adapter is named")
        return model, base
    if base is not None:
        raise InputError(f"the adapter {adapter} has two bases, {model} and {base}: name one")
    if not (resolve_file(adapter) / ADAPTER).is_file():
        raise InputError(f"{adapter} is no PEFT adapter: it has no {ADAPTER}")
    return adapter, model


def portable_name(source: str | os.PathLike) -> str:
    """A name by which other programs find a model: a Hub id or a URL as it is, and of everything else the absolute path."""
    return str(source) if is_hub_id(source) or is_store(source) else str(resolve_file(source).absolute())


def _temporary() -> Path:
    """A directory that is removed when this process ends."""
    directory = Path(tempfile.mkdtemp(prefix="smolvlm-jax-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def is_hub_id(source: str | os.PathLike) -> bool:
    """Whether a name is neither that of something local nor of a bundled checkpoint, which have no revisions."""
    return not is_store(source) and not Path(source).exists() and str(source) not in bundled_models()


def resolve_file(
    source: str | os.PathLike,
    revision: str | None = None,
    *,
    subfolder: str | os.PathLike | None = "",
    small: bool = False,
    **cache: Any,
) -> Path:
    """As `resolve`, except that whatever is at a path stands for itself.

    Args:
        source: see `resolve`.
        revision: see `resolve`.
        subfolder: where in it the checkpoint is.
        small: of a Hub id everything but the weights.
        **cache: for a Hub id huggingface_hub's cache_dir, force_download, local_files_only and token.
    """
    folder = os.fspath(subfolder or "")
    if os.path.isabs(folder) or ".." in Path(folder).parts:
        raise CheckpointError(f"subfolder is {folder!r}; it is a path inside of {source}")
    if revision not in (None, "main") and not is_hub_id(source):  # "main" is what transformers' code writes for none
        raise InputError(
            f"{source} has no revision {revision!r}: only models of the Hub have revisions (--revision, revision=…)"
        )
    path = place(source)
    if isinstance(path, StorePath):
        return stored_model(path / folder, small=small)
    name, bundled = str(source), bundled_models()
    if path.exists() and name in bundled:
        _announce_shadow(name, path.absolute())
    if not path.exists():
        if name in bundled:
            path = Path(str(_ASSETS / name))
        elif name.count("/") != 1 or name.startswith((".", "/", "~")):
            if name.startswith((".", "/", "~")):
                raise MissingFileError(f"no model {name!r}: no such directory")
            raise MissingFileError(
                f"no model {name!r}: not a directory, not a bundled name ({', '.join(bundled) or 'none'}), "
                f"not a Hub id (owner/name), not a URL of an object store (s3://…, gs://…){_nearest_id(name)}"
            )
        else:
            patterns = _SMALL if small else _PATTERNS
            path = _download(name, revision, [f"{folder}/{pattern}" if folder else pattern for pattern in patterns], cache)
    if folder and not (path / folder).is_dir():
        raise MissingFileError(f"{source} has no directory {folder!r}")
    return path / folder if folder else path


@functools.cache
def _announce_shadow(name: str, path: Path) -> None:
    """Say once that a name means a directory and no bundled checkpoint."""
    warnings.warn(
        f"{name} is the directory {path} here, not the bundled checkpoint: write ./{name} if that is meant, or rename it",
        stacklevel=1,
    )


def _nearest_id(name: str) -> str:
    """A question at the end of a message, if a published checkpoint is called so without its owner, or nearly so."""
    ids = {known.rpartition("/")[2].lower(): known for known in HUB_IDS}
    found = difflib.get_close_matches(name.lower(), ids, n=1, cutoff=0.7)
    return f"; did you mean {ids[found[0]]}?" if found else ""


def _download(name: str, revision: str | None, patterns: list[str], cache: Mapping[str, Any]) -> Path:
    """The snapshot of a Hub repository in the local cache: safetensors, or pickled weights if it has nothing else."""
    hub = import_extra("huggingface_hub", f"downloading {name} from the Hub", "hub")
    snapshot_download = hub.snapshot_download
    folder = patterns[0].rpartition("/")[0]
    pickles = [f"{folder}/{pattern}" if folder else pattern for pattern in _PICKLES]
    given = {key: value for key, value in cache.items() if value is not None}
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **given))
        weights = any(pattern.endswith(".safetensors") for pattern in patterns)
        if weights and not any((found / folder).glob("*.safetensors")) and not (found / folder / "params").is_dir():
            # the same commit again: a branch may have moved on meanwhile
            pinned = found.name if found.parent.name == "snapshots" else revision
            found = Path(snapshot_download(name, revision=pinned, allow_patterns=[*patterns, *pickles], **given))
        return found
    except Exception as error:
        final = hub.constants.HF_HUB_OFFLINE or any(kind.__name__ in _FINAL for kind in type(error).__mro__)
        failure = CheckpointError if final else DownloadError
        first = next(iter(str(error).splitlines()), "")
        if any(kind.__name__ in _NOT_CACHED for kind in type(error).__mro__):
            why = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
            said = "" if hub.constants.HF_HUB_OFFLINE else f" ({first})"
            what = f"it is not whole in the local cache, and {why}{said}; pass a directory that holds it"
            raise failure(f"cannot download {name}: {what}") from error
        raise failure(f"cannot download {name}: {type(error).__name__}: {first}") from error
