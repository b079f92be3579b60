"""The models that lmms-eval loads: `ChatSmolVLM`, whose questions are messages, and `SimpleSmolVLM`, whose are texts.

All requests of a run come in one call, and go to the engine as it has room for them. Documents and their pictures are
read only then.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import InputError, import_extra
from ..generation_config import SamplingParams
from ..terminal import say
from .answerer import Question
from .prompts import task_prompt
from .settings import answerer_of, request_settings

# Without its dependencies: it asks for an older PyAV than videos are read with here.
_NEEDED = ("evaluating with lmms-eval", "lmms-eval", "pip install --no-deps lmms_eval")
_base: Any = import_extra("lmms_eval.api.model", *_NEEDED)
_instance: Any = import_extra("lmms_eval.api.instance", *_NEEDED)

__all__ = ["ChatSmolVLM", "SimpleSmolVLM"]

_SHOWN = 3
_MOST_ROUNDS = 100  # of a task that never ends


class _SmolVLM(_base.lmms):
    """A checkpoint under lmms-eval.

    Args:
        pretrained: bundled name, directory, Hub id, or a PEFT adapter.
        prompts: "task": as the task words its questions; "published": as the scores of the model's card were taken.
        max_new_tokens: for tasks that set no limit.
        system_prompt: a system turn before each conversation, or the name of a file with it.
        batch_size, max_batch_size: without effect: the engine fills its slots.
        device: None; jax chooses devices, as JAX_PLATFORMS says.
        **options: as `answerer_of` takes them.

    Raises:
        SmolVLMError: for arguments that are not known and a checkpoint that cannot be read.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        prompts: str = "task",
        max_new_tokens: int = SamplingParams.max_new_tokens,
        system_prompt: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if prompts not in ("task", "published"):
            raise InputError(f"prompts is {prompts!r:.80}; it is task or published")
        if device is not None:
            raise InputError(f"device is {device!r:.80}: jax chooses devices, as the variable JAX_PLATFORMS says; leave it out")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("one process uses all devices of this host: start lmms-eval without accelerate launch or torchrun")
        self._published = prompts == "published"
        self._system = self._resolve_system_prompt(system_prompt) if system_prompt else None
        self._answerer = answerer_of(pretrained, SamplingParams(max_new_tokens=max_new_tokens), options)

    # ---- what a form says: documents to questions

    def _asked(self, args: tuple) -> tuple[dict[str, Any], Mapping[str, Any], tuple]:
        """(the record of a request, its generation settings, (task, split, number) of its document)."""
        raise NotImplementedError

    def _doc(self, place: tuple) -> Any:
        number, task, split = place
        return self.task_dict[task][split][number]

    def _question(self, args: tuple) -> Question:
        record, kwargs, place = self._asked(args)
        number, task, split = place
        begin = ""
        if self._published:
            content, begin = task_prompt(task, self._doc(place), self._answerer.family)
            record = {"messages": [{"role": "user", "content": content}]}
        return Question(f"{task}/{split}/{number}", self._with_system(record) | request_settings(kwargs), begin)

    def _with_system(self, record: dict[str, Any]) -> dict[str, Any]:
        if self._system is None:
            return record
        if "messages" not in record:
            return {**record, "system": self._system}
        messages = [message for message in record["messages"] if message["role"] != "system"]
        system = {"role": "system", "content": [{"type": "text", "text": self._system}]}
        return {**record, "messages": [system, *messages]}

    # ---- what lmms-eval calls

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """A GenerationResult for each request, in their order. One that cannot be answered has an empty text."""
        questions = self._repeated(requests, lambda request: self._question(request.args))
        return self._finished(questions, len(requests))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds of each request. The task words each round's question after the answers so far."""
        if self.is_simple:
            raise InputError("tasks with several rounds need the chat form: leave out --force_simple")
        answers: list[list[str]] = [[] for _ in requests]
        infos: list[Any] = [None] * len(requests)
        left = list(range(len(requests)))
        for round_number in range(_MOST_ROUNDS):
            questions: list[tuple[int, Question]] = []
            for index in left:
                question, infos[index] = self._round(requests[index].args, round_number, answers[index], infos[index])
                if question is not None:
                    questions.append((index, question))
            left = [index for index, _ in questions]
            for index, result in zip(left, self._finished((q for _, q in questions), len(questions)), strict=True):
                answers[index].append(result.text)
            if not left:
                return answers
        raise InputError(f"a task asks for more than {_MOST_ROUNDS} rounds")

    def _round(self, args: tuple, number: int, answers: list[str], info: Any) -> tuple[Question | None, Any]:
        """(the question of a round, None after the last; what the task remembers)."""
        _, doc_to_messages, kwargs, *place = args
        doc = self._doc(tuple(place))
        if not number:
            messages = doc_to_messages(doc)
        else:
            said = doc_to_messages(doc, round_idx=number, previous_output=list(answers), previous_round_info=info)
            if not (isinstance(said, tuple) and len(said) == 4):
                return None, info
            messages, ended, _, info = said
            if ended:
                return None, info
        index, task, split = place
        record = self._with_system({"messages": messages}) | request_settings(kwargs)
        return Question(f"{task}/{split}/{index}/{number}", record), info

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """How probable given answers are, and whether greedy decoding writes them: pairs, each as a GenerationResult, which
        keeps lmms-eval 0.7.3 from turning a pair into its text.

        lmms-eval takes the answer with the smallest number for a model's choice, so that of a choice is the mean loss of its
        tokens, as its own models return it. A task that gives its answer as a function wants the log-likelihood, which is the
        sum over the tokens.
        """
        found: list[Any] = []
        of_choice: list[bool] = []

        def scored() -> Iterator[tuple[Question, str]]:
            for request in requests:
                question, text, choice = self._given(request.args)
                of_choice.append(choice)
                yield question, text

        for number, score in enumerate(self._answerer.score(scored())):
            if score.loglikelihood is None or not score.token_ids:
                raise InputError(f"request {number} has no likelihood: {score.error or 'its answer is empty'}")
            mean = -score.loglikelihood / len(score.token_ids)
            found.append(_instance.GenerationResult((mean if of_choice[number] else score.loglikelihood, score.is_greedy)))
        return found

    def _given(self, args: tuple) -> tuple[Question, str, bool]:
        """(the question, the answer that is given, whether it is one of several choices)."""
        if len(args) == 2:  # a choice alone, without a question
            return Question("unconditional", {"prompt": ""}), args[1], True
        context, target, doc_to_visual, number, task, split = args
        doc = self._doc((number, task, split))
        record = self._with_system(_simple_record(context, doc_to_visual, doc))
        text = target(doc) if callable(target) else target
        return Question(f"{task}/{split}/{number}", record), str(text), not callable(target)

    # ---- answers

    def _repeated(self, requests: Sequence[Any], question_of: Callable[[Any], Question]) -> Iterator[Question]:
        """The questions. The same document asked again draws other tokens, so its id says for the how many-th time."""
        seen: dict[Any, int] = {}
        for request in requests:
            question = question_of(request)
            times = seen[question.id] = seen.get(question.id, 0) + 1
            yield question if times == 1 else Question(f"{question.id}#{times}", question.record, question.begin)

    def _finished(self, questions: Iterator[Question], count: int) -> list[Any]:
        from tqdm import tqdm

        out: list[Any] = [None] * count
        failed: dict[int, str] = {}
        with tqdm(total=count, desc="answers", disable=not count) as bar:
            for number, result in self._answerer.answer(questions):
                if result.error is not None:
                    failed[number] = result.error
                counts = _instance.TokenCounts(input_tokens=result.prompt_tokens, output_tokens=result.new_tokens)
                out[number] = _instance.GenerationResult(result.text or "", counts)
                bar.update()
        for number, error in sorted(failed.items())[:_SHOWN]:
            say(f"question {number} of {count} counts as an empty answer: {error}")
        if count and len(failed) == count:
            raise InputError(f"none of {count} questions could be answered; the first: {failed[0]}")
        if len(failed) > _SHOWN:
            say(f"{len(failed)} of {count} questions count as empty answers")
        return out


class ChatSmolVLM(_SmolVLM):
    """The chat form: a document of a task becomes messages by the task's doc_to_messages."""

    is_simple = False

    def _asked(self, args: tuple) -> tuple[dict[str, Any], Mapping[str, Any], tuple]:
        _, doc_to_messages, kwargs, *place = args
        return {"messages": doc_to_messages(self._doc(tuple(place)))}, kwargs, tuple(place)


class SimpleSmolVLM(_SmolVLM):
    """The simple form (--force_simple): a text and pictures beside it. Tasks that compare probabilities need it."""

    is_simple = True

    def _asked(self, args: tuple) -> tuple[dict[str, Any], Mapping[str, Any], tuple]:
        context, kwargs, doc_to_visual, *place = args
        return _simple_record(context, doc_to_visual, self._doc(tuple(place))), kwargs, tuple(place)


def _simple_record(context: str, doc_to_visual: Any, doc: Any) -> dict[str, Any]:
    """A text with its pictures, which stand where it says <image>, or before it. A string is the path of a video."""
    visuals = list((doc_to_visual(doc) if callable(doc_to_visual) else doc_to_visual) or [])
    record: dict[str, Any] = {"prompt": context}
    if any(isinstance(visual, Mapping) for visual in visuals):
        raise InputError("the task has sounds, and the model hears nothing")
    if pictures := [visual for visual in visuals if not isinstance(visual, str)]:
        record["images"] = pictures
    if videos := [visual for visual in visuals if isinstance(visual, str)]:
        record["videos"] = videos
    return record
