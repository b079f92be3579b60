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
from ..locate import find_directory
from .file_values import whole
from .images import SmolVLMImageProcessor
from .tokenizer import SmolVLMTokenizer
from .tokenizer_files import SETTINGS, named_templates
from .videos import SmolVLMVideoProcessor

_TEMPLATE_FOLDER = "additional_chat_templates"
_PARTS = {"image_processor": SmolVLMImageProcessor, "video_processor": SmolVLMVideoProcessor}
_OWN = {*_PARTS, "tokenizer", "image_seq_len", "chat_template", "pre_tokenizer"}


def load_parts(path: str | os.PathLike, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of SmolVLMProcessor from a checkpoint.

    Args:
        path: what `load` takes: a directory, the name of a bundled checkpoint, or a Hub id.
        overrides: image_seq_len, chat_template, the parts themselves (image_processor, video_processor, tokenizer) and
            arguments of the two processors and the tokenizer, which override the files; and where the files are.

    Raises:
        CheckpointError: there is no such checkpoint or no tokenizer, or a file is broken.
        InputError: no part knows a keyword.
    """
    takers = {name: frozenset({*kind.DEFAULTS, *kind.NEUTRAL}) - {"backend"} for name, kind in _PARTS.items()}
    known = frozenset(_OWN).union(SETTINGS, *takers.values())
    found, given = find_directory("SmolVLMProcessor.from_pretrained", path, overrides, known)
    if found.is_file():
        found = found.parent
    directory = str(found)
    path = os.path.join(directory, "processor_config.json")
    own = read_json(path, missing_ok=True)
    image_seq_len = own.get("image_seq_len")
    if image_seq_len is not None and not whole(image_seq_len, 1, 2**16):
        raise CheckpointError(f"{path}: image_seq_len must be a positive whole number, got {image_seq_len!r:.80}")
    image_seq_len = given.pop("image_seq_len", None) or image_seq_len or 169
    template = given.pop("chat_template", None) or find_template(directory, own)
    parts: dict[str, Any] = {"image_seq_len": image_seq_len, "chat_template": template}
    for name, kind in _PARTS.items():
        own_keywords = {key: value for key, value in given.items() if key in takers[name]}
        parts[name] = given.get(name) or kind.from_pretrained(directory, **own_keywords)
    own_keywords = {key: value for key, value in given.items() if key in SETTINGS or key == "pre_tokenizer"}
    parts["tokenizer"] = given.get("tokenizer") or SmolVLMTokenizer.from_pretrained(directory, **own_keywords)
    return parts


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
