"""Which file of a checkpoint holds which part of the processor.

transformers 5 nests the image and video processors in processor_config.json. Version 4 has preprocessor_config.json,
sometimes video_preprocessor_config.json, and a processor_config.json with image_seq_len only. Chat templates are in
chat_template.json (which takes precedence, as in the reference), chat_template.jinja and a folder of named ones.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from ..io import read_json, read_text, write_text
from .file_values import whole
from .images import SmolVLMImageProcessor
from .media import checkpoint_directory
from .tokenizer import SmolVLMTokenizer
from .tokenizer_files import named_templates
from .videos import SmolVLMVideoProcessor

_TEMPLATE_FOLDER = "additional_chat_templates"
# Keywords for a hub, which have no meaning for a local directory.
_IGNORED = {"cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code", "use_fast", "backend"}


def load_parts(path: str | os.PathLike, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of SmolVLMProcessor from a checkpoint.

    Args:
        path: the checkpoint's directory.
        overrides: image_seq_len, chat_template and arguments of the two processors, which override the files.

    Raises:
        CheckpointError: there is no directory or no tokenizer, or a file is broken.
        InputError: neither processor knows a keyword.
    """
    directory = checkpoint_directory(path)
    given = {name: value for name, value in overrides.items() if name not in _IGNORED}
    path = os.path.join(directory, "processor_config.json")
    own = read_json(path, missing_ok=True)
    image_seq_len = own.get("image_seq_len")
    if image_seq_len is not None and not whole(image_seq_len, 1, 2**16):
        raise CheckpointError(f"{path}: image_seq_len must be a positive whole number, got {image_seq_len!r:.80}")
    image_seq_len = given.pop("image_seq_len", None) or image_seq_len or 169
    template = given.pop("chat_template", None) or find_template(directory, own)
    parts: dict[str, Any] = {"image_seq_len": image_seq_len, "chat_template": template}
    unknown = set(given)
    for name, kind in (("image_processor", SmolVLMImageProcessor), ("video_processor", SmolVLMVideoProcessor)):
        unknown -= set(kind.DEFAULTS)
        parts[name] = kind.from_pretrained(directory, **{k: v for k, v in given.items() if k in kind.DEFAULTS})
    if unknown:
        raise InputError(f"neither the image nor the video processor has an argument {min(unknown)!r}")
    return {**parts, "tokenizer": SmolVLMTokenizer.from_pretrained(directory)}


def find_template(directory: str, own: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template of a checkpoint with the processor_config.json `own`; a dictionary where it has several, or None."""
    paths = [os.path.join(directory, name) for name in ("processor_config.json", "chat_template.json")]
    for path, config in zip(paths, (own, read_json(paths[1], missing_ok=True)), strict=True):
        found = config.get("chat_template")
        if found and not isinstance(found, str):
            found = named_templates(found)
            if found is None:
                raise CheckpointError(
                    f"{path}: chat_template must be a text, or texts by name, got {config['chat_template']!r:.80}"
                )
        if found:
            return found
    default = Path(directory, "chat_template.jinja")
    templates = {"default": read_text(default)} if default.exists() else {}
    templates.update({path.stem: read_text(path) for path in sorted(Path(directory, _TEMPLATE_FOLDER).glob("*.jinja"))})
    return templates["default"] if list(templates) == ["default"] else templates or None


def save_templates(directory: str | os.PathLike, chat_template: str | Mapping[str, str] | None) -> list[str]:
    """Write the chat template or templates in the form of transformers 5; returns the paths of the files."""
    paths = []
    templates = chat_template if isinstance(chat_template, Mapping) else {"default": chat_template}
    for name, text in templates.items():
        if text is None:
            continue
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"the chat template's name {name!r} does not make a file name")
        file = "chat_template.jinja" if name == "default" else os.path.join(_TEMPLATE_FOLDER, f"{name}.jinja")
        paths.append(write_text(os.path.join(directory, file), text))
    return paths
