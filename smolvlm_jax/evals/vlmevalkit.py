"""The model that VLMEvalKit evaluates, `SmolVLMJax`, and a command that starts its run.py with it.

    python -m smolvlm_jax.evals.vlmevalkit VLMEvalKit --pretrained CHECKPOINT --data MMMU_DEV_VAL AI2D_TEST

VLMEvalKit asks most models one question at a time, and models behind an API from many threads. This model is used in the
second way: questions of all threads are answered in continuous batches.
"""

import argparse
import functools
import runpy
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, MissingExtraError, SmolVLMError, import_extra
from ..generation_config import SamplingParams
from ..terminal import say
from .answerer import Desk, Question
from .prompts import published_prompt
from .settings import answerer_of, request_settings

__all__ = ["NAME", "SmolVLMJax", "main"]

NAME = "smolvlm_jax"
_FAILED = "Failed to obtain answer via API."  # VLMEvalKit's own words
# Of no package index, and so of no extra.
_NEEDED = ("evaluating with VLMEvalKit", None, "pip install git+https://github.com/open-compass/VLMEvalKit")
try:
    _base: Any = import_extra("vlmeval.vlm.base", *_NEEDED)
except MissingExtraError as error:
    if __name__ != "__main__":
        raise
    say(str(error))
    sys.exit(error.exit_code)


class SmolVLMJax(_base.BaseModel):
    """A checkpoint under VLMEvalKit, with the prompts and limits of the published scores.

    Args:
        model_path: bundled name, directory, Hub id, or a PEFT adapter.
        prompts: "published", or "task": as VLMEvalKit words questions for models that it does not know.
        **options: generation settings as VLMEvalKit passes them, and what `answerer_of` takes.

    Raises:
        SmolVLMError: for arguments that are not known and a checkpoint that cannot be read.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    VIDEO_LLM = False
    is_api = True  # asked from many threads

    def __init__(self, model_path: str | None = None, prompts: str = "published", **options: Any):
        super().__init__()
        if prompts not in ("task", "published"):
            raise InputError(f"prompts is {prompts!r:.80}; it is task or published")
        sampling = {name: options.pop(name) for name in list(options) if name in (*_SETTINGS, "use_cache")}
        self._published = prompts == "published"
        self._answerer = answerer_of(model_path, SamplingParams(), options)
        limit = 1024 if self._answerer.family == "docling" else 2048
        self._settings = {"max_new_tokens": limit, **request_settings(sampling)}
        self._lock = threading.Lock()
        self._desk: Desk | None = None

    def generate_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to a question, from any thread; where there is none, what VLMEvalKit counts as a failure."""
        if self._published:
            content, begin = published_prompt(message, dataset, self._answerer.family)
        else:
            content, begin = [_item(item) for item in message], ""
        answer = self._answered([{"role": "user", "content": content}], begin)
        return answer.strip(".") if self._published and self._answerer.family == "docling" else answer

    def chat_inner(self, messages: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to the last turn of a conversation, by the checkpoint's chat template."""
        turns = [{"role": turn["role"], "content": [_item(item) for item in turn["content"]]} for turn in messages]
        return self._answered(turns, "")

    def _answered(self, messages: list[dict[str, Any]], begin: str) -> str:
        with self._lock:
            if self._desk is None:
                self._desk = Desk(self._answerer)
        result = self._desk.ask(Question(0, {"messages": messages, **self._settings}, begin))
        if result.error is not None:
            say(f"a question has no answer: {result.error}")
            return f"{_FAILED} {result.error}"
        return (result.text or "").strip()


_SETTINGS = (
    *("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "num_beams", "seed"),
    *("stop", "until", "max_tokens"),
)


def _item(item: dict[str, Any]) -> dict[str, Any]:
    kind = item["type"]
    return {"type": kind, "text" if kind == "text" else kind: item["value"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Register the model as `smolvlm_jax` and start run.py of a checkout of VLMEvalKit with it. The exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m smolvlm_jax.evals.vlmevalkit",
        description="Run VLMEvalKit with a checkpoint. Arguments that are not listed go to its run.py.",
    )
    parser.add_argument("checkout", type=Path, metavar="VLMEVALKIT", help="a checkout of VLMEvalKit's repository")
    parser.add_argument(
        "--pretrained", required=True, metavar="NAME", help="a bundled name, a directory, a Hub id, or a PEFT adapter"
    )
    parser.add_argument("--prompts", choices=("published", "task"), default="published", help="wording of the questions")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="limit on an answer (default: as published)")
    options, rest = parser.parse_known_args(arguments)
    script = options.checkout / "run.py"
    try:
        if not script.is_file():
            raise InputError(f"{script} does not exist: VLMEVALKIT is a checkout of https://github.com/open-compass/VLMEvalKit")
        known = import_extra("vlmeval.config", *_NEEDED).supported_VLM
        given = {"max_new_tokens": options.max_new_tokens} if options.max_new_tokens else {}
        known[NAME] = functools.partial(SmolVLMJax, model_path=options.pretrained, prompts=options.prompts, **given)
        sys.argv = [str(script), "--model", NAME, *rest]
        sys.path.insert(0, str(options.checkout))
        runpy.run_path(str(script), run_name="__main__")
    except SmolVLMError as error:
        say(str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
