"""Which file of a checkpoint holds which part of the processor.

v5 nests the image and video processors in processor_config.json. v4 has preprocessor_config.json, sometimes
video_preprocessor_config.json, and a processor_config.json with image_seq_len only. Templates are chat_template.json
(which wins, as in the reference), chat_template.jinja and a folder of named ones.
"""

import os
import re

from ..errors import CheckpointError, InputError
from ..io import read_json, read_text, write_json, write_text
from .images import SmolVLMImageProcessor
from .tokenizer import SmolVLMTokenizer
from .videos import SmolVLMVideoProcessor

_TEMPLATE_FOLDER = "additional_chat_templates"
# what code for a hub passes along; here everything is local already
_IGNORED = {"cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code", "use_fast", "backend"}


def load_parts(path, overrides: dict) -> dict:
    """The keywords of SmolVLMProcessor, from the directory at `path` with `overrides` on top."""
    directory = os.fspath(path)
    if not os.path.isdir(directory):
        raise CheckpointError(f"no directory {directory!r}; pass the local directory of a checkpoint")
    overrides = {name: value for name, value in overrides.items() if name not in _IGNORED}
    own = read_json(os.path.join(directory, "processor_config.json"), missing_ok=True)
    image_seq_len = overrides.pop("image_seq_len", None) or own.get("image_seq_len", 169)
    template = overrides.pop("chat_template", None) or find_template(directory, own)
    parts = {}
    for name, kind in (("image_processor", SmolVLMImageProcessor), ("video_processor", SmolVLMVideoProcessor)):
        known = {*kind.DEFAULTS, *kind.INIT_ONLY}
        parts[name] = kind.from_pretrained(directory, **{k: v for k, v in overrides.items() if k in known})
        parts.setdefault("known", set()).update(known)
    unknown = sorted(set(overrides) - parts.pop("known"))
    if unknown:
        raise InputError(f"neither the image nor the video processor has an argument {unknown[0]!r}")
    tokenizer = SmolVLMTokenizer.from_pretrained(directory)
    return {**parts, "tokenizer": tokenizer, "image_seq_len": image_seq_len, "chat_template": template}


def find_template(directory: str, own: dict) -> str | dict[str, str] | None:
    """The chat template of a checkpoint, a dict where it has several, None where it has none."""
    if own.get("chat_template"):
        return own["chat_template"]
    legacy = read_json(os.path.join(directory, "chat_template.json"), missing_ok=True).get("chat_template")
    if legacy:
        return legacy
    templates = {}
    path = os.path.join(directory, "chat_template.jinja")
    if os.path.exists(path):
        templates["default"] = read_text(path)
    folder = os.path.join(directory, _TEMPLATE_FOLDER)
    if os.path.isdir(folder):
        for name in sorted(os.listdir(folder)):
            if name.endswith(".jinja"):
                templates[name.removesuffix(".jinja")] = read_text(os.path.join(folder, name))
    return templates["default"] if list(templates) == ["default"] else templates or None


def save_parts(processor, directory) -> list[str]:
    """Write `processor` in the v5 form; returns the paths."""
    paths = [write_json(os.path.join(directory, "processor_config.json"), processor.to_dict(), sort_keys=True)]
    template = processor.chat_template
    for name, text in (template if isinstance(template, dict) else {"default": template}).items():
        if text is None:
            continue
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"the chat template's name {name!r} does not make a file name")
        if name == "default":
            paths.append(write_text(os.path.join(directory, "chat_template.jinja"), text))
        else:
            paths.append(write_text(os.path.join(directory, _TEMPLATE_FOLDER, f"{name}.jinja"), text))
    return paths + processor.tokenizer.save_pretrained(directory)
