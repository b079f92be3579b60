"""The adapters of a run as PEFT writes them: a directory that `PeftModel.from_pretrained` and our `load` put onto the base."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from ..convert.rules import factor_patterns, restore, torch_name
from ..errors import InputError
from ..io import write_json
from ..locate import ADAPTER, portable_name
from ..parameters import flatten_params
from ..staging import new_directory
from ..storage import AnyPath
from .config import LoraConfig

__all__ = ["ADAPTER_MODEL", "adapter_tensors", "export_adapter"]

ADAPTER_MODEL = "adapter_model.safetensors"
# PEFT wraps the model twice: PeftModel.base_model is a LoraModel, and its .model ours.
_WRAPPED = "base_model.model."


def adapter_tensors(trained: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """The tensors of an adapter, as PEFT names and shapes them.

    Args:
        trained: the run's parameters, a nested dict: `lora_a`, (in…, r), and `lora_b`, (r, out…), beside where their kernel
            is, and parameters of modules that were trained whole.

    Returns:
        float32 tensors by name, A (r, in) and B (out, r) among them; the names of the modules with adapters; those of the
        modules that were trained whole.

    Raises:
        InputError: a module has an adapter and was trained whole beside it, for which PEFT has no form.
    """
    tensors: dict[str, np.ndarray] = {}
    targets: set[str] = set()
    whole: set[str] = set()
    for path, array in flatten_params(jax.device_get(trained)).items():
        holder, _, leaf = path.rpartition("/")
        factor = leaf.removeprefix("lora_") if leaf.startswith("lora_") else None
        name, pattern = torch_name(f"{holder}/kernel" if factor else path)
        module = name.rpartition(".")[0]
        (targets if factor else whole).add(module)
        if factor:
            name, pattern = f"{module}.lora_{factor.upper()}.weight", factor_patterns(pattern)[factor == "b"]
        tensors[_WRAPPED + name] = np.ascontiguousarray(restore(np.asarray(array, np.float32), pattern))
    if both := sorted(targets & whole):
        raise InputError(f"{both[0]} has an adapter and was trained whole beside it, for which PEFT has no form")
    return tensors, sorted(targets), sorted(whole)


def export_adapter(base: str | os.PathLike, trained: Mapping[str, Any], destination: AnyPath, config: LoraConfig) -> None:
    """Write `destination` as PEFT's `save_pretrained` does; an adapter that is there is replaced.

    Args:
        base: the name of the checkpoint that training started from.
        trained: as in `adapter_tensors`.
        destination: the directory to write, or the place in a store.
        config: of the adapters.

    Raises:
        InputError: as `adapter_tensors` does.
        CheckpointError: the directory cannot be written.
    """
    tensors, targets, whole = adapter_tensors(trained)
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": portable_name(base),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": targets,
        "modules_to_save": whole or None,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with new_directory(destination, force=True, own=True) as target:
        write_json(target / ADAPTER, settings, sort_keys=True)
        save_file(tensors, target / ADAPTER_MODEL)
