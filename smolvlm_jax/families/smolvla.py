"""SmolVLA, lerobot's policy for robots: a SmolVLM2 with fewer layers of text, and an action expert beside it.

The config.json of a policy does not hold the VLM's sizes: it names the checkpoint that the VLM was made from, and how many of
its layers were kept. The backbone is what `policy.model.vlm_with_expert.vlm` computes when it is called. The action expert does
not belong to it; the policy, which runs both together, attends and rotates differently.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..io import companion_files, read_json
from .translation import Translation

__all__ = ["recognises", "translate"]

_VLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"  # the default of SmolVLAConfig, as is the number of layers
_LAYERS = 16


def recognises(data: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a SmolVLA policy."""
    return data.get("type") == "smolvla"


def translate(path: Path, data: Mapping[str, Any], find: Callable[[str], Path]) -> Translation:
    """The VLM of a policy. Arguments and errors as in `families.translated`."""
    name, layers = data.get("vlm_model_name", _VLM), data.get("num_vlm_layers", _LAYERS)
    if not isinstance(name, str) or not name.isprintable():
        raise ConfigError(f"{path}: vlm_model_name = {name!r:.80} is not a name")
    if not isinstance(layers, int) or isinstance(layers, bool):
        raise ConfigError(f"{path}: num_vlm_layers = {layers!r:.80} is not a number of layers")
    try:
        directory = find(name)
    except CheckpointError as error:
        raise type(error)(
            f"{path} is the config.json of a SmolVLA policy, and of the VLM that it names, {name}, the config.json cannot be "
            f"had: pass that with --config (config=…) ({error})"
        ) from error
    config = read_json(directory / "config.json", error=ConfigError)
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(f"{directory / 'config.json'}: text_config must be a mapping")
    whole = text.get("num_hidden_layers", 32)
    kept = min(layers, whole) if layers > 0 else whole
    files = {file: found for file, found in companion_files(directory).items() if file != "generation_config.json"}
    return Translation(family="smolvla", config={**config, "text_config": {**text, "num_hidden_layers": kept}}, copied=files)
