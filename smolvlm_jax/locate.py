"""What the name of a model stands for: a directory, a bundled checkpoint or a Hub id -> a local path. Imports no jax."""

import os
from importlib import resources
from pathlib import Path

from .errors import CheckpointError, DownloadError, InputError, import_extra

__all__ = ["bundled_models", "is_hub_id", "resolve", "resolve_file"]

_ASSETS = resources.files("smolvlm_jax") / "assets"
# What is downloaded: no code, and pickled weights only where there are no others.
_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "params/*")
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")
# Answers of the Hub that do not change with time; anything else is trouble of the network or the server.
_FINAL = ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "DisabledRepoError", "HFValidationError")


def bundled_models() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(entry.name for entry in _ASSETS.iterdir() if (entry / "config.json").is_file()) if _ASSETS.is_dir() else []


def resolve(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The local directory that the name of a model stands for.

    Args:
        source: an existing directory, the name of a bundled checkpoint, or a Hub id `owner/name`, which is downloaded unless
            the local cache has it.
        revision: branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: it is none of these, it is a file, an adapter alone or a training run, or it cannot be downloaded.
        InputError: a revision of what is no Hub id.
        MissingExtraError: it is a Hub id, and huggingface_hub is not installed.
    """
    path = resolve_file(source, revision)
    if path.is_file():
        raise CheckpointError(f"{path} is a file: pass the directory that holds it together with its config.json")
    if (path / "preprocessor_config.json").is_file():
        return path
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{path} is a PEFT adapter without the files of a processor: merge it into its base first, with "
            f"`smolvlm-jax convert {path} DEST --to hf`"
        )
    if (path / "run.json").is_file() and (path / "checkpoints").is_dir():
        model = path / "model"
        what = f"its model is {model}" if model.is_dir() else f"{model} is its model once it has ended (export: true)"
        raise CheckpointError(f"{path} is a training run, which has no processor: {what}")
    return path


def is_hub_id(source: str | os.PathLike) -> bool:
    """Whether a name is neither that of something local nor of a bundled checkpoint, which have no revisions."""
    return not Path(source).exists() and str(source) not in bundled_models()


def resolve_file(source: str | os.PathLike, revision: str | None = None) -> Path:
    """As `resolve`, except that whatever is at a path stands for itself."""
    path = Path(source)
    if revision is not None and not is_hub_id(source):
        raise InputError(
            f"{source} has no revision {revision!r}: only models of the Hub have revisions (--revision, revision=…)"
        )
    if path.exists():
        return path
    name, bundled = str(source), bundled_models()
    if name in bundled:
        return Path(str(_ASSETS / name))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"no model {name!r}: not a directory, not a bundled name ({', '.join(bundled) or 'none'}), "
            "not a Hub id (owner/name)"
        )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    """The snapshot of a Hub repository in the local cache: safetensors, or pickled weights if it has nothing else."""
    hub = import_extra("huggingface_hub", f"downloading {name} from the Hub", "hub")
    snapshot_download = hub.snapshot_download
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=list(_PATTERNS)))
        if not any(found.glob("*.safetensors")) and not (found / "params").is_dir():
            # the same commit again: a branch may have moved on meanwhile
            pinned = found.name if found.parent.name == "snapshots" else revision
            found = Path(snapshot_download(name, revision=pinned, allow_patterns=[*_PATTERNS, *_PICKLES]))
        return found
    except Exception as error:
        final = hub.constants.HF_HUB_OFFLINE or any(kind.__name__ in _FINAL for kind in type(error).__mro__)
        failure = CheckpointError if final else DownloadError
        first = next(iter(str(error).splitlines()), "")
        raise failure(f"cannot download {name}: {type(error).__name__}: {first}") from error
