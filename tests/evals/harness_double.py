"""Of the harnesses what our models use, for environments without them: the modules that they import, and requests."""

import sys
import types
from dataclasses import dataclass
from typing import Any


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: Any
    token_counts: TokenCounts | None = None


class lmms:
    is_simple = True

    def __init__(self):
        self.task_dict = {}

    @staticmethod
    def _resolve_system_prompt(value):
        return value


class BaseModel:
    """What generate does before generate_inner is asked: a string becomes a text item."""

    def __init__(self):
        self.dump_image_func = None

    def generate(self, message, dataset=None):
        message = [{"type": "text", "value": message}] if isinstance(message, str) else message
        return self.generate_inner(message, dataset)


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class Instance:
    args: tuple


MODULES: dict[str, dict[str, Any]] = {
    "lmms_eval": {},
    "lmms_eval.api": {},
    "lmms_eval.api.model": {"lmms": lmms},
    "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
    "lmms_eval.models": {},
    "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    "vlmeval": {},
    "vlmeval.vlm": {},
    "vlmeval.vlm.base": {"BaseModel": BaseModel},
    "vlmeval.config": {"supported_VLM": {}},
}


def install(monkeypatch) -> None:
    """Put the doubles in the place of the harnesses, and import our models anew."""
    for name, contents in MODULES.items():
        module = types.ModuleType(name)
        vars(module).update({key: dict(value) if isinstance(value, dict) else value for key, value in contents.items()})
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("smolvlm_jax.evals.lmms", "smolvlm_jax.evals.vlmevalkit"):
        monkeypatch.delitem(sys.modules, name, raising=False)
