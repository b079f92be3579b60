"""What a run that is started again may have changed: nothing that its checkpoints depend on, and all else is named."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..io import read_json, write_json
from ..storage import AnyPath
from .config import TrainConfig
from .plain import require_same, to_dict

__all__ = ["EXPORTED", "changes", "earlier", "note_export", "remarks", "write_settings"]

_NAME = "run.json"
EXPORTED = "exported_step"  # in it, beside the settings: of which step the model is
# What the checkpoints of a run depend on: it cannot be continued with another.
_FIXED = ("model", "adapter", "lora", "learning_rates", "param_dtype", "seed")
# What may change, and changes what the steps from there on do.
_COURSE = (
    "learning_rate",
    "steps",
    "warmup_steps",
    "warmup_fraction",
    "schedule",
    "final_fraction",
    "restarts",
    "weight_decay",
    "beta1",
    "beta2",
    "epsilon",
    "clip_norm",
    "accumulation",
    "dtype",
    "frozen_dtype",
    "data.batch_size",
)
# What a run that is finished still does as it is told, or where its files are.
_STILL = ("output", "export", "check", "model", "adapter", "mesh", "distributed", "topology", "loggers", "data.train")


def earlier(config: TrainConfig, directory: Path, shown: AnyPath) -> Mapping[str, Any] | None:
    """The settings of the run whose checkpoints are in a directory; None if there are none.

    Args:
        config: of the run that is started.
        directory: the directory.
        shown: its name in messages.

    Raises:
        CheckpointError: it is a run of another model or other trained parts, or has lost its run.json.
    """
    path, steps = directory / _NAME, directory / "checkpoints"
    if not steps.is_dir() or not any(step.name.isdecimal() for step in steps.iterdir()):
        return None
    if not path.exists():
        raise CheckpointError(
            f"{shown / path.name} is gone, which says what {shown / steps.name} belong to: put it back, or choose "
            "another output"
        )
    before = read_json(path)
    require_same(f"the run in {shown}", before, to_dict(config), *_FIXED)
    return before


def changes(before: Mapping[str, Any], config: TrainConfig) -> str:
    """In words, which settings of the steps to come were others before: "steps was 100, is 200"; "" if none were."""
    now = json.loads(json.dumps(to_dict(config)))
    found: list[str] = []
    for key in _COURSE:
        old: Any = before
        new: Any = now
        for name in key.split("."):
            old, new = (old.get(name, old) if isinstance(old, Mapping) else old), new[name]
        if old != new and not isinstance(old, Mapping):  # a mapping: of a key that older versions did not write down
            found.append(f"{key} was {_written(old)}, is {_written(new)}")
    return "; ".join(found)


def remarks(before: Mapping[str, Any], config: TrainConfig, first: int, model: AnyPath) -> Iterator[str]:
    """What to tell the user of a run that goes on.

    Args:
        before: its settings until now.
        config: its settings from now on.
        first: steps that are done.
        model: where the export goes.
    """
    if first == config.steps:
        yield _finished(before, config, first, model)
        return
    if words := changes(before, config):
        yield f"{words} from step {first + 1:,} on"
    if config.export and model.exists():
        # Older versions did not write it down.
        step = before.get(EXPORTED, first if first == before.get("steps") else None)
        yield f"{model} is that of {'an earlier step' if step is None else f'step {step:,}'} until this run ends"


def _finished(before: Mapping[str, Any], config: TrainConfig, step: int, model: AnyPath) -> str:
    """What is not done for a run that has no step left, and how to go on."""
    unused = list(_unlike(before, json.loads(json.dumps(to_dict(config)))))
    line = f"the run is finished at step {step:,}, its last: steps=N with a larger N goes on, another output begins anew"
    if unused:
        line += f"; without a step to come these changes do nothing: {', '.join(unused)}"
    if config.evaluation is not None:
        line += f"; nothing is evaluated{' again' if before.get('evaluation') else ''}"
        line += f", docs/evaluate.md says how to evaluate {model}" if config.export or model.exists() else ""
    return line


def _unlike(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys that were others before, with dots between levels, but those of _STILL and those that older versions did not
    write down."""
    for key, new in now.items():
        name, old = f"{prefix}{key}", before.get(key, new)
        if name in _STILL or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _unlike(old, new, f"{name}.")
        else:
            yield name


def write_settings(directory: Path, before: Mapping[str, Any] | None, config: TrainConfig) -> None:
    """Write the settings of the steps to come into a run's directory. before: those until now."""
    exported = {} if before is None or EXPORTED not in before else {EXPORTED: before[EXPORTED]}
    write_json(directory / _NAME, {**to_dict(config), **exported})


def note_export(directory: Path, step: int) -> None:
    """Write down in a run's directory of which step its model is."""
    write_json(directory / _NAME, {**read_json(directory / _NAME), EXPORTED: step})


def _written(value: Any) -> str:
    return "null" if value is None else f"{value:.80}" if isinstance(value, str) else f"{value!r:.80}"
